"""What the writers of formats have in common: refusing what a format cannot hold, and JSON."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saes.numerics.formats.files import NotRepresentable
from saes.numerics.sae import SAEConfig


def refuse_extras(config: SAEConfig, format: str) -> None:
    """Raises NotRepresentable for a normalisation or an option, which formats of plain weights have no place for."""
    if config.normalize_activations != "none":
        raise NotRepresentable(f"{format} cannot say that inputs are normalised ({config.normalize_activations}).")
    if config.options:
        raise NotRepresentable(f"{format} has no place for this SAE's options ({', '.join(sorted(config.options))}).")


def refuse_unusable(tensors: Mapping[str, Tensor]) -> None:
    """Raises NotRepresentable for weights that are not finite numbers: no reader would take them."""
    if any(not bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise NotRepresentable("This SAE has weights that are not finite numbers, so it is not worth saving.")


def json_of(value: dict[str, Any]) -> str:
    """Raises NotRepresentable for what JSON cannot hold."""
    try:
        return json.dumps(value, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise NotRepresentable(f"The SAE's metadata cannot be written as JSON ({error}).") from error
