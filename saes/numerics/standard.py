"""The standard SAE: ReLU codes, made sparse by an L1 penalty while training (Bricken et al. 2023)."""

from torch import Tensor

from saes.numerics.sae import SAE


class StandardSAE(SAE):
    """acts = relu(z)."""

    architecture = "standard"

    def activation(self, z: Tensor) -> Tensor:
        return z.relu()
