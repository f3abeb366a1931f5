"""What all of miStudio's files have in common: its names for architectures and normalisations."""

from collections.abc import Mapping
from typing import Any

from saes.numerics.formats.files import FormatError, MissingFact

ARCHITECTURES = {  # ours by theirs
    "standard": "standard",
    "standard_saelens": "standard",
    "standard_anthropic": "standard",
    "jumprelu": "jumprelu",
    "topk": "topk",
    "skip": "skip_sae",
    "transcoder": "transcoder",
}
# One and the same in miStudio: every row is brought to the norm sqrt(d_in).
NORMALIZATIONS = {
    "none": "none",
    "constant_norm_rescale": "constant_norm_rescale",
    "anthropic_rescale": "constant_norm_rescale",
}


def architecture_of(said: Any, source: str) -> str:
    """Our name of an architecture. Raises FormatError for one that miStudio does not have."""
    if not isinstance(said, str) or said not in ARCHITECTURES:
        raise FormatError(f"{source} says architecture {said!r:.40}; miStudio has {', '.join(ARCHITECTURES)}.")
    return ARCHITECTURES[said]


def normalization_of(said: Any, source: str) -> str:
    """Our name of a normalisation; null and false mean none. Raises FormatError."""
    if said is None or said is False:
        return "none"
    if not isinstance(said, str) or said not in NORMALIZATIONS:
        raise FormatError(
            f"{source} says normalize_activations {said!r:.40}; it is one of {', '.join(NORMALIZATIONS)}."
        )
    return NORMALIZATIONS[said]


def require_facts(needed: Mapping[str, Any]) -> None:
    """Raises MissingFact with all that are None, so that they can be asked for at once."""
    missing = [name for name, value in needed.items() if value is None]
    if missing:
        raise MissingFact(f"The files do not say {' and '.join(missing)}, which a miStudio SAE needs.", *missing)
