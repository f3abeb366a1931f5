"""What was published of an SAE beside what was measured here: when the two differ too much, and what may be why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from saehub.figures import fig_text, percent_text
from saes.models import SAE

L0_APART = 0.2  # share of the published L0 by which the measured one may differ unremarked
VARIANCE_APART = 0.05  # of the explained variance, in its own units


@dataclass(frozen=True)
class Claim:
    """A figure as it was published and as it was measured here; None is not known. `why` is empty unless they differ by
    more than the limit."""

    label: str
    published: float | None
    measured: float | None
    n: int | None
    data: str
    why: str

    @property
    def apart(self) -> bool:
        return bool(self.why)


def claims(sae: SAE) -> list[Claim]:
    """L0 and explained variance, both ways; those of which neither is known are left out."""
    found = []
    for label, name, published, measured in (
        ("L0", "l0", sae.published_l0, sae.l0),
        ("explained variance", "explained_variance", sae.published_variance, sae.explained_variance),
    ):
        if published is None and measured is None:
            continue
        metric = sae.metrics.get(name, {})
        by = _too_far(name, published, measured)
        why = f"{by} {_reasons(sae, name, metric)}" if by else ""
        found.append(Claim(label, published, measured, metric.get("n"), metric.get("data", ""), why))
    return found


def differs(sae: SAE) -> bool:
    """Whether any measured figure is too far from the published one."""
    return any(claim.apart for claim in claims(sae))


def _too_far(name: str, published: float | None, measured: float | None) -> str:
    if published is None or measured is None:
        return ""
    difference = abs(measured - published)
    if name == "l0":
        if difference <= L0_APART * abs(published):
            return ""
        share = percent_text(difference / abs(published)) if published else "any share"
        return f"They differ by {share} of the published value; up to {percent_text(L0_APART)} is usual."
    if difference <= VARIANCE_APART:
        return ""
    return f"They differ by {fig_text(difference)}; up to {fig_text(VARIANCE_APART)} is usual."


def _reasons(sae: SAE, name: str, metric: dict[str, Any]) -> str:
    """What is known to be different, in one or two sentences."""
    said = sae.config | (sae.config.get("metadata") or {})
    dataset, length = said.get("dataset_path") or said.get("dataset"), said.get("context_size")
    here = metric.get("data") or "data not named"
    there = f"{dataset}" if dataset else "data that its config does not name"
    there += f" in contexts of {length:,}" if isinstance(length, int) else ""
    sentence = f"Measured on {here}; published on {there}."
    if name == "explained_variance":
        sentence += " Several formulas go by this name: see the definitions below."
    elif said.get("normalize_activations") not in (None, "none"):
        sentence += (
            f" It was trained on scaled inputs ({said['normalize_activations']}); a factor left out shows here first."
        )
    return sentence
