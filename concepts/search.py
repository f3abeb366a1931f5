"""Looking for features without a text: by what people call them, by the tokens they write, by where they point."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from concepts import featurefile
from concepts.models import FeatureView, Label, largest_view, name_of
from saes.models import SAE

FOUND = 50
VIEWS = 50  # SAEs whose views are asked at once, the newest SAEs
MOST_NUMBERS = 2**29  # of the directions of several SAEs that one search reads: 1 GB


class SearchError(ValueError):
    """What was asked for cannot be looked for; the message is one sentence."""


@dataclass(frozen=True)
class Found:
    """A feature that was found: what it writes or how near it is, and what is known of it in its SAE's largest view."""

    sae: SAE
    feature: int
    label: str | None  # the accepted one
    tokens: list[str]  # its top tokens, where harvested
    density: float | None
    maximum: float | None
    logit: featurefile.Logit | None = None
    cosine: float | None = None


def by_label(text: str, sae: SAE | None = None) -> Any:
    """Labels whose words begin with those of the text, accepted ones first; without a text all, the newest first."""
    rows = Label.objects.select_related("sae", "owner")
    rows = rows.with_words(text) if text.strip() else rows.order_by("-pk")
    return rows.filter(sae=sae) if sae is not None else rows


def largest_views(saes: Iterable[SAE] | None = None) -> list[FeatureView]:
    """The largest view of each SAE that has one, the newest SAE first; of these SAEs, or of all."""
    rows = FeatureView.objects.ready().largest_first("-sae_id").distinct("sae_id")
    rows = rows.filter(sae__in=[sae.pk for sae in saes]) if saes is not None else rows
    return list(rows.select_related("sae__model", "capture__model")[:VIEWS])


def by_promoted(text: str, saes: Iterable[SAE] | None = None, *, lowered: bool = False, n: int = FOUND) -> list[Found]:
    """Features whose decoder direction raises (or lowers) the token most, over the largest views of these SAEs (all: None).

    Known are the ten tokens a side that the logit lens kept of each feature; a view without them is passed over. Raises
    SearchError when there is no view with logits, or no token holds the text.
    """
    hits: list[tuple[FeatureView, featurefile.FeatureView, int, featurefile.Logit]] = []
    asked = known = 0
    for view in largest_views(saes):
        try:
            columns = view.opened()
            if not (columns.logit_lens and columns.logit_lens["logits"]):
                continue
            asked += 1
            ids = columns.token_ids(text)
            known += bool(len(ids))
            if len(ids):
                hits += [(view, columns, i, logit) for i, logit in columns.writing(ids, lowered=lowered, n=n)]
        except featurefile.ViewError:
            continue
    if not asked:
        raise SearchError("No harvested view holds logits yet; harvest an SAE that writes into the residual stream.")
    if not known:
        raise SearchError(f"No token holds “{text.strip()[:60]}”; write a shorter piece of it.")
    hits = sorted(hits, key=lambda hit: -abs(hit[3].value))[:n]
    labels = _labels((view.sae, i) for view, _, i, _ in hits)
    return [_found(view.sae, columns, i, labels, logit=logit) for view, columns, i, logit in hits]


def alike(sae: SAE, feature: int, n: int = FOUND) -> list[Found]:
    """The features of the same SAE whose decoder directions have the largest cosine with this one's.

    Raises SearchError when there is no such feature, or the SAE has no view with neighbours.
    """
    columns = _columns_with(sae, feature)
    try:
        near = columns.feature_neighbours(feature)[:n]
    except featurefile.ViewError as error:
        raise SearchError(str(error)) from error
    if not near:
        raise SearchError(_not_compared(sae))
    return _near(sae, columns, near)


def alike_in(sae: SAE, feature: int, others: Iterable[SAE], n: int = FOUND) -> tuple[list[Found], list[SAE]]:
    """The features of other SAEs whose decoder directions have the largest cosine with this one's, and the SAEs left out.

    cosine_ij = w_i . w'_j over decoder rows at norm 1, which means something where both SAEs write into the same hook
    point of the same model: `comparable` lists those. The directions of one SAE are always read, those of several up to
    MOST_NUMBERS. Raises SearchError when there is no such feature, or no directions to compare.
    """
    columns = _columns_with(sae, feature)
    try:
        own = columns.directions
        if own is None:
            raise SearchError(f"{_not_compared(sae)[:-1]} again; the harvest it has kept no directions.")
        direction = own[feature].astype(np.float32)
        hits, left, read = [], [], 0
        for other in others:
            view = _with_directions(other, len(direction))
            if view is None or (read and read + view.n_features * len(direction) > MOST_NUMBERS):
                left.append(other)
                continue
            read += view.n_features * len(direction)
            hits += _near(other, view, view.nearest(direction, n))
    except featurefile.ViewError as error:
        raise SearchError(str(error)) from error
    if not read:
        names = ", ".join(other.name for other in left[:3])
        raise SearchError(f"The directions of {names or 'other SAEs'} are not kept yet; harvest their features again.")
    return sorted(hits, key=lambda hit: -(hit.cosine or 0))[:n], left


def comparable(sae: SAE) -> list[SAE]:
    """The other SAEs with a view whose decoders write into the same hook point of the same model, newest first."""
    if sae.model is None:
        return []
    rows = FeatureView.objects.ready().exclude(sae=sae).filter(sae__model=sae.model_id).select_related("sae__model")
    found = {view.sae_id: view.sae for view in rows.order_by("-sae") if _writes_into(view.sae) == _writes_into(sae)}
    return list(found.values())[:VIEWS]


def _writes_into(sae: SAE) -> str:
    """The hook point that its decoder's directions belong to, by one name whichever the files use."""
    name = sae.hook_name_out or sae.hook_name
    row = sae.model.hook(name) if sae.model else None
    return str(row["name"]) if row else name


def _columns_with(sae: SAE, feature: int) -> featurefile.FeatureView:
    """The largest view of the SAE. Raises SearchError without one, or when it has no such feature."""
    if not 0 <= feature < sae.n_features:
        raise SearchError(f"There is no feature {feature}; {sae.name} has features 0 to {sae.n_features - 1:,}.")
    found = largest_view(sae)
    if found is None:
        raise SearchError(_not_compared(sae))
    return found[1]


def _not_compared(sae: SAE) -> str:
    return f"Directions of {sae.name} were not compared yet; harvest its features."


def _with_directions(sae: SAE, width: int) -> featurefile.FeatureView | None:
    found = largest_view(sae)
    own = found[1].directions if found else None
    return found[1] if found and own is not None and own.shape[1] == width else None


def _near(sae: SAE, columns: featurefile.FeatureView, near: list[featurefile.Neighbour]) -> list[Found]:
    labels = _labels((sae, other.feature) for other in near)
    return [_found(sae, columns, other.feature, labels, cosine=other.cosine) for other in near]


def _labels(features: Iterable[tuple[SAE, int]]) -> dict[tuple[int, int], str]:
    """Accepted labels by SAE and feature, one query an SAE."""
    by_sae: dict[int, tuple[SAE, list[int]]] = {}
    for sae, i in features:
        by_sae.setdefault(sae.pk, (sae, []))[1].append(i)
    return {
        (pk, i): text
        for pk, (sae, found) in by_sae.items()
        for i, text in Label.objects.accepted_of(sae, found).items()
    }


def _found(sae: SAE, columns: featurefile.FeatureView, i: int, labels: dict[tuple[int, int], str], **why: Any) -> Found:
    n_fires = int(columns.column("n_fires")[i])
    maximum = float(columns.column("maximum")[i]) if n_fires else None
    return Found(sae, i, labels.get((sae.pk, i)), name_of(columns, i), n_fires / columns.n_tokens, maximum, **why)
