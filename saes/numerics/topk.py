"""The SAEs that keep the largest codes: TopK (Gao et al. 2024, arXiv 2406.04093) and its relatives."""

from math import isfinite
from typing import ClassVar

import torch
from torch import Tensor, nn

from saes.numerics.jumprelu import JumpReLUSAE
from saes.numerics.sae import SAE, SAEConfig, SAEError, blank_zeros, require_positive_int


class KSAE(SAE):
    """Base of the SAEs that keep k features per row. Raises SAEError unless 1 <= k <= d_sae."""

    def __init__(
        self, config: SAEConfig, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(config, device=device, dtype=dtype)
        self.k = checked_k(config)


def checked_k(config: SAEConfig) -> int:
    """k of a config. Raises SAEError unless it is a whole number from 1 to d_sae."""
    if config.k is None:
        raise SAEError("A TopK SAE needs k, the number of features kept per row.")
    require_positive_int("k", config.k)
    if config.k > config.d_sae:
        raise SAEError(f"k is {config.k}, but this SAE has only {config.d_sae} features (d_sae).")
    return int(config.k)


def keep_topk(z: Tensor, k: int) -> Tensor:
    """relu(z) where z is among the k largest of its row, else 0."""
    values, indices = z.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(z).scatter(-1, indices, values.relu())


class ByNorm(SAE):
    """While `by_norm` is set, features are chosen by what they add to x_hat, z * |W_dec row|; codes keep their own scale.

    For training with decoder rows of any norm (SAELens' `rescale_acts_by_decoder_norm`). Afterwards `fold_norms` gives
    the same SAE with rows of norm 1, where the two choices are one.
    """

    by_norm: bool = False

    def chosen(self, z: Tensor, count: int | None = None) -> Tensor:
        """Codes (n, d_sae) of z, chosen by their size."""
        raise NotImplementedError

    def activation(self, z: Tensor, count: int | None = None) -> Tensor:
        """`count`: see BatchTopKSAE.chosen."""
        if not self.by_norm:
            return self.chosen(z, count)
        norms = self.W_dec.norm(dim=-1).detach().clamp_min(torch.finfo(z.dtype).tiny)
        return self.chosen(z * norms, count) / norms


class TopKSAE(ByNorm, KSAE):
    """acts = relu(z) where z is among the k largest of its row, else 0.

    relu comes after the choice (as in SAELens), so a row with fewer than k positive z fires fewer than k features.
    """

    architecture = "topk"

    def chosen(self, z: Tensor, count: int | None = None) -> Tensor:
        return keep_topk(z, self.k)

    def encode_sparse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As SAE.encode_sparse, with m = k."""
        if self.by_norm:
            return super().encode_sparse(x)
        values, indices = self.pre_activations(x).topk(self.k, dim=-1)
        return blank_zeros(values.relu(), indices)


class DecoderNormTopKSAE(KSAE):
    """acts = relu(z) where z * |W_dec row| is among the k largest of its row, else 0 (OpenMOSS).

    The choice weighs a feature by what it adds to x_hat; the codes keep their own scale.
    """

    architecture = "topk_by_decoder_norm"

    def activation(self, z: Tensor) -> Tensor:
        norms = self.W_dec.norm(dim=-1)
        indices = (z * norms).topk(self.k, dim=-1, sorted=False).indices
        return torch.zeros_like(z).scatter(-1, indices, z.gather(-1, indices).relu())


class AbsTopKSAE(KSAE):
    """acts = z where |z| is among the k largest of its row, else 0: a feature may fire in either direction."""

    architecture = "abstopk"

    def activation(self, z: Tensor) -> Tensor:
        indices = z.abs().topk(self.k, dim=-1, sorted=False).indices
        return torch.zeros_like(z).scatter(-1, indices, z.gather(-1, indices))


class GroupMaxSAE(KSAE):
    """The features are split into k equal runs and of each run only the largest fires: acts = relu(z) there, else 0.

    (sparsify's `activation: groupmax`.) Raises SAEError when k does not divide d_sae.
    """

    architecture = "groupmax"

    def __init__(
        self, config: SAEConfig, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(config, device=device, dtype=dtype)
        if config.d_sae % self.k:
            raise SAEError(f"k is {self.k}, which does not divide the {config.d_sae} features into equal groups.")

    def activation(self, z: Tensor) -> Tensor:
        groups = z.unflatten(-1, (self.k, -1))
        values, places = groups.max(-1, keepdim=True)
        return torch.zeros_like(groups).scatter(-1, places, values.relu()).flatten(-2)


class BatchTopKSAE(ByNorm):
    """A BatchTopK SAE as it is while training (Bussmann et al. 2024, arXiv 2412.06410).

        acts = relu(z) where it is among the k * rows largest of the whole batch, else 0

    so what a row's codes are depends on its neighbours. `for_inference` gives the form to use afterwards: a JumpReLU
    SAE with the threshold that training learned. `k` is the mean number of features a row and need not be whole.
    Option `matryoshka_widths` (nested SAEs, Bussmann et al. 2025, arXiv 2503.17547) matters to the training loss alone:
    rising whole numbers of which the last is d_sae. Raises SAEError for a k or widths that cannot be.
    """

    architecture = "batchtopk"
    row_by_row: ClassVar[bool] = False
    threshold: nn.Parameter

    def __init__(
        self, config: SAEConfig, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(config, device=device, dtype=dtype)
        k = config.k
        if isinstance(k, bool) or not isinstance(k, int | float) or not (isfinite(k) and 0 < k <= config.d_sae):
            raise SAEError(f"k must be a number above 0 and at most {config.d_sae} (d_sae), but is {k!r}.")
        self.k = k
        widths = config.options.get("matryoshka_widths")
        if widths is not None and not _are_widths(widths, config.d_sae):
            raise SAEError(f"matryoshka_widths must be whole numbers that rise to d_sae ({config.d_sae}).")

    @classmethod
    def parameter_shapes(cls, config: SAEConfig) -> dict[str, tuple[int, ...]]:
        return super().parameter_shapes(config) | {"threshold": (config.d_sae,)}

    def chosen(self, z: Tensor, count: int | None = None) -> Tensor:
        """Of z (..., d_sae); `count`, how many codes are kept, is k * rows unless this is a part of the batch."""
        acts = z.relu()
        rows = acts.numel() // self.config.d_sae
        values, indices = acts.flatten().topk(int(self.k * rows) if count is None else count, sorted=False)
        return torch.zeros_like(acts).flatten().scatter(-1, indices, values).view_as(acts)

    def for_inference(self) -> JumpReLUSAE:
        """The JumpReLU SAE of the same tensors and the learned threshold; it shares the weights.

        What it was in training stays in the metadata, under SAELens' names.
        """
        widths = self.config.options.get("matryoshka_widths")
        details = {"k": self.k} | ({"matryoshka_widths": list(widths)} if widths else {})
        said = {
            "training_architecture": "matryoshka_batchtopk" if widths else "batchtopk",
            "training_architecture_details": details,
        }
        config = self.config.with_(
            architecture="jumprelu",
            k=None,
            options={name: value for name, value in self.config.options.items() if name != "matryoshka_widths"},
            metadata=said | self.config.metadata,
        )
        sae = JumpReLUSAE(config, device="meta", dtype=self.W_dec.dtype)
        sae.load_state_dict(self.state_dict(), strict=True, assign=True)
        return sae


def _are_widths(widths: object, d_sae: int) -> bool:
    if not isinstance(widths, list | tuple) or not all(type(width) is int and width > 0 for width in widths):
        return False
    return list(widths) == sorted(set(widths)) and widths[-1:] in ([d_sae], (d_sae,))
