"""What the writers of formats have in common: refusing what a format cannot hold, and JSON."""

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from saes.numerics.formats.files import FormatError, NotRepresentable
from saes.numerics.formats.weights import refuse_non_finite
from saes.numerics.sae import SAEConfig


def refuse_extras(config: SAEConfig, format: str) -> None:
    """Raises NotRepresentable for a normalisation or an option, which formats of plain weights have no place for."""
    if config.normalize_activations != "none":
        raise NotRepresentable(f"{format} cannot say that inputs are normalised ({config.normalize_activations}).")
    if config.options:
        raise NotRepresentable(f"{format} has no place for this SAE's options ({', '.join(sorted(config.options))}).")


def refuse_unusable(tensors: Mapping[str, Tensor]) -> None:
    """Raises NotRepresentable for weights that are not finite numbers: no reader would take them."""
    try:
        refuse_non_finite(tensors)
    except FormatError as error:
        raise NotRepresentable(
            "This SAE has weights that are not finite numbers, so it is not worth saving."
        ) from error


def json_of(value: Mapping[str, Any]) -> str:
    """Raises NotRepresentable for what JSON cannot hold."""
    try:
        return json.dumps(value, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise NotRepresentable(f"The SAE's metadata cannot be written as JSON ({error}).") from error
