"""TopK: the k largest pre-activations of each row (Gao et al. 2024, arXiv 2406.04093)."""

import torch
from torch import Tensor

from saes.numerics.sae import SAE, SAEConfig, SAEError, blank_zeros, require_positive_int


class TopKSAE(SAE):
    """acts = relu(z) where z is among the k largest of its row, else 0.

    relu comes after the choice (as in SAELens), so a row with fewer than k positive z fires fewer than k features.
    Raises SAEError unless 1 <= k <= d_sae.
    """

    architecture = "topk"

    def __init__(
        self, config: SAEConfig, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(config, device=device, dtype=dtype)
        if config.k is None:
            raise SAEError("A TopK SAE needs k, the number of features kept per row.")
        require_positive_int("k", config.k)
        if config.k > config.d_sae:
            raise SAEError(f"k is {config.k}, but this SAE has only {config.d_sae} features (d_sae).")
        self.k: int = config.k

    def activation(self, z: Tensor) -> Tensor:
        values, indices = z.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(z).scatter(-1, indices, values.relu())

    def encode_sparse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As SAE.encode_sparse, with m = k."""
        values, indices = self.pre_activations(x).topk(self.k, dim=-1)
        return blank_zeros(values.relu(), indices)
