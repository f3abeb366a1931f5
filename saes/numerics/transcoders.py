"""Transcoders: sparse codes of one hook point that predict another (Dunefsky et al. 2024, arXiv 2406.11944).

Their x_hat is of the other hook point, so they do not reconstruct their input. With a skip connection (Paulo et al.
2025, arXiv 2501.18823) a linear map of x is added, so decoding needs x as well: `decode(acts, x)`.
"""

import torch
from torch import Tensor, nn

from saes.numerics.jumprelu import JumpReLUSAE
from saes.numerics.sae import SAE, SAEConfig
from saes.numerics.standard import StandardSAE
from saes.numerics.topk import DecoderNormTopKSAE, TopKSAE


class Transcoder(StandardSAE):
    """acts = relu(z);  y_hat = acts @ W_dec + b_dec. Per-row normalisation, where there is one, is of x alone."""

    architecture = "transcoder"
    reconstructs = False

    def denormalise(self, y: Tensor, x: Tensor | None) -> Tensor:
        """y as it is: the statistics of x say nothing about the other hook point (as in SAELens)."""
        return y

    def decoder_scale(self, x: Tensor) -> Tensor | None:
        return None


class JumpReLUTranscoder(Transcoder, JumpReLUSAE):
    """acts = relu(z) * [z > threshold]."""

    architecture = "jumprelu_transcoder"
    activation = JumpReLUSAE.activation


class TopKTranscoder(Transcoder, TopKSAE):
    """acts = relu(z) of the k largest z of each row."""

    architecture = "topk_transcoder"
    activation = TopKSAE.activation


class DecoderNormTopKTranscoder(Transcoder, DecoderNormTopKSAE):
    """acts = relu(z) where z * |W_dec row| is among the k largest of its row (OpenMOSS)."""

    architecture = "topk_by_decoder_norm_transcoder"
    activation = DecoderNormTopKSAE.activation


class Skip(SAE):
    """Adds x @ W_skip.T to what is decoded; W_skip (d_out, d_in), x as it comes, not normalised."""

    reconstructs = False
    W_skip: nn.Parameter

    @classmethod
    def parameter_shapes(cls, config: SAEConfig) -> dict[str, tuple[int, ...]]:
        return super().parameter_shapes(config) | {"W_skip": (config.d_out, config.d_in)}

    def decode(self, acts: Tensor, x: Tensor | None = None) -> Tensor:
        return super().decode(acts, x) + self._skip(x)

    def decode_sparse(self, values: Tensor, indices: Tensor, x: Tensor | None = None) -> Tensor:
        return super().decode_sparse(values, indices, x) + self._skip(x)

    def _skip(self, x: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(self._required(x), self.W_skip)


class SkipTranscoder(Skip, Transcoder):
    architecture = "skip_transcoder"


class JumpReLUSkipTranscoder(Skip, JumpReLUTranscoder):
    architecture = "jumprelu_skip_transcoder"


class TopKSkipTranscoder(Skip, TopKTranscoder):
    architecture = "topk_skip_transcoder"
