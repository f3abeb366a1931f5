"""The standard SAE: ReLU codes, made sparse by an L1 penalty while training (Bricken et al. 2023); and its variants."""

from torch import Tensor

from saes.numerics.sae import SAE


class StandardSAE(SAE):
    """acts = relu(z)."""

    architecture = "standard"

    def activation(self, z: Tensor) -> Tensor:
        return z.relu()


class SkipSAE(StandardSAE):
    """acts = relu(z);  x_hat = x + denormalise(acts @ W_dec + b_dec): miStudio's skip autoencoder. Decoding needs x."""

    architecture = "skip_sae"

    def decode(self, acts: Tensor, x: Tensor | None = None) -> Tensor:
        return super().decode(acts, x) + self._required(x)

    def decode_sparse(self, values: Tensor, indices: Tensor, x: Tensor | None = None) -> Tensor:
        return super().decode_sparse(values, indices, x) + self._required(x)


class TanhReluSAE(StandardSAE):
    """acts = tanh(relu(z)), between 0 and 1: SAELens 2 to 5 with `activation_fn` tanh-relu."""

    architecture = "tanh_relu"

    def activation(self, z: Tensor) -> Tensor:
        return z.relu().tanh()
