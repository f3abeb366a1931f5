"""Which SAE to use: of each model, site and layer the one a curator pinned, else the one that a fixed rule chooses.

The rule: of the SAEs that say their L0, those of the width nearest 16,384, and of them the L0 nearest 100, both compared by
ratio. Gemma Scope's authors chose their canonical SAEs by that L0; the narrow width is what most published features are
of. It is a place to begin, not a judgement of quality: that is what evaluations are for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from math import inf, log
from typing import Any

from django.db.models import Count, QuerySet

from saehub.figures import fig_text
from saes.filters import best_l0
from saes.models import SAE

L0, WIDTH = 100.0, 16_384
FIELDS = (
    "pk", "name", "site", "layer", "model_name", "architecture", "d_sae", "l0", "published_l0", "ready_at", "pin", "job",
)  # fmt: skip
MODELS = 60
AUTOENCODERS = ("resid_pre", "resid_mid", "resid_post", "mlp_out", "attn_out", "hook_z", "embed")  # first in the table


@dataclass(frozen=True)
class Recommended:
    """The SAE to begin with at one place of a model, and why it is that one."""

    site: str
    layer: int | None
    sae: SAE
    of: int  # how many there are at that place
    why: str

    @property
    def pinned(self) -> bool:
        return bool(self.sae.pin)

    @property
    def l0(self) -> float | None:
        """Measured here, else as published."""
        return self.sae.published_l0 if self.sae.l0 is None else self.sae.l0


def recommended(model_name: str, site: str = "", layer: int | None = None) -> list[Recommended]:
    """For each site and layer of the model that has an SAE, or for the one that is named. One query."""
    rows: QuerySet[Any] = _candidates().filter(model_name=model_name)
    if site:
        rows = rows.filter(site=site)
    if layer is not None:
        rows = rows.filter(layer=layer)
    ordered = sorted(rows.annotate(best=best_l0()).only(*FIELDS), key=_place)
    return [_chosen(list(saes)) for _, saes in groupby(ordered, key=_place)]


def recommended_beside(sae: SAE) -> Recommended | None:
    """What is recommended at the place of this SAE; None where its place is not known or it is the only one there."""
    if not (sae.model_name and sae.site and sae.layer is not None):
        return None
    found = recommended(sae.model_name, sae.site, sae.layer)
    return found[0] if found and (found[0].of > 1 or found[0].pinned) else None


def models_with_saes() -> list[tuple[str, int]]:
    """Models by the number of their SAEs, for the choice."""
    counts = _candidates().exclude(model_name="").order_by().values_list("model_name").annotate(n=Count("pk"))
    return list(counts.order_by("-n", "model_name")[:MODELS])


def _candidates() -> QuerySet[Any]:
    """What may be recommended: neither deprecated nor gone from the directory, unless its files are here."""
    rows = SAE.objects.exclude(curation=SAE.Curation.DEPRECATED)
    return rows.filter(gone_at=None) | rows.filter(ready_at__isnull=False)


def _place(sae: SAE) -> tuple[Any, ...]:
    order = AUTOENCODERS.index(sae.site) if sae.site in AUTOENCODERS else len(AUTOENCODERS)
    return order, sae.site, -1 if sae.layer is None else sae.layer


def _apart(value: float | None, goal: float) -> float:
    """How many times larger or smaller, as |log ratio|; what is not known, or 0, is farthest."""
    return abs(log(value / goal)) if value else inf


def _rank(sae: Any) -> tuple[Any, ...]:
    return (not sae.pin, sae.best is None, _apart(sae.d_sae, WIDTH), _apart(sae.best, L0), sae.ready_at is None, sae.pk)


def _chosen(saes: list[Any]) -> Recommended:
    best = min(saes, key=_rank)
    return Recommended(best.site, best.layer, best, len(saes), _why(best, saes))


def _why(best: Any, saes: Iterable[Any]) -> str:
    if best.pin:
        return f"Pinned by a curator: {best.pin}"
    others = list(saes)
    if len(others) == 1:
        return "It is the only one here."
    if best.best is None:
        return "None of them says its L0; its width is nearest 16,384."
    same = sum(one.d_sae == best.d_sae and one.best is not None for one in others)
    width = f"{best.d_sae:,} features are nearest 16,384" if best.d_sae else "no width is known"
    of = f"; of the {same} with that width" if same > 1 else ";"
    whose = "as measured here" if best.l0 is not None else "as published"
    return f"{width}{of} its L0, {fig_text(best.best)} {whose}, is nearest 100."
