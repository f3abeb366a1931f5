"""Gated: one path decides which features fire, another how strongly (Rajamanoharan et al. 2024, arXiv 2404.16014)."""

from torch import Tensor, nn

from saes.numerics.sae import SAE, SAEConfig


class GatedSAE(SAE):
    """z = (x' - [b_dec]) @ W_enc;  acts = [z + b_gate > 0] * relu(z * exp(r_mag) + b_mag).

    It has no b_enc: the two paths share W_enc and have biases of their own, each (d_sae,).
    """

    architecture = "gated"
    b_gate: nn.Parameter
    b_mag: nn.Parameter
    r_mag: nn.Parameter

    @classmethod
    def parameter_shapes(cls, config: SAEConfig) -> dict[str, tuple[int, ...]]:
        shapes = super().parameter_shapes(config)
        del shapes["b_enc"]
        return shapes | dict.fromkeys(("b_gate", "b_mag", "r_mag"), (config.d_sae,))

    def pre_activations(self, x: Tensor) -> Tensor:
        return self.encoder_input(x) @ self.W_enc

    def activation(self, z: Tensor) -> Tensor:
        return (z * self.r_mag.exp() + self.b_mag).relu() * (z + self.b_gate > 0)
