"""JumpReLU: a code is kept as it is above its feature's threshold (Rajamanoharan et al. 2024, arXiv 2407.14435)."""

from torch import Tensor, nn

from saes.numerics.sae import SAE, SAEConfig


class JumpReLUSAE(SAE):
    """acts = relu(z) * [z > threshold], threshold (d_sae,); strictly above, as everywhere.

    Also what a BatchTopK SAE is after training: its one learned threshold, once per feature.
    """

    architecture = "jumprelu"
    threshold: nn.Parameter

    @classmethod
    def parameter_shapes(cls, config: SAEConfig) -> dict[str, tuple[int, ...]]:
        return super().parameter_shapes(config) | {"threshold": (config.d_sae,)}

    def activation(self, z: Tensor) -> Tensor:
        return z.relu() * (z > self.threshold)
