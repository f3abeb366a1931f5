"""Looking for features without a text: by what people call them, by the tokens they write, by where they point."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from concepts import featurefile
from concepts.models import FeatureView, Label, name_of
from saes.models import SAE

FOUND = 50
VIEWS = 50  # SAEs whose views are asked at once, the newest


class SearchError(ValueError):
    """What was asked for cannot be looked for; the message is one sentence."""


@dataclass(frozen=True)
class Found:
    """A feature that was found: what it writes or how near it is, and what is known of it in its SAE's newest view."""

    sae: SAE
    feature: int
    label: str | None  # the accepted one
    tokens: list[str]  # its top tokens, where harvested
    density: float | None
    maximum: float | None
    logit: featurefile.Logit | None = None
    cosine: float | None = None


def by_label(text: str, sae: SAE | None = None) -> Any:
    """Labels whose words begin with those of the text, accepted ones first, as a queryset."""
    rows = Label.objects.select_related("sae", "owner").with_words(text)
    return rows.filter(sae=sae) if sae is not None else rows


def newest_views(saes: Iterable[SAE] | None = None) -> list[FeatureView]:
    """The newest view of each SAE that has one, newest first; of these SAEs, or of all."""
    rows = FeatureView.objects.ready().select_related("sae__model", "capture__model")
    rows = rows.filter(sae__in=[sae.pk for sae in saes]) if saes is not None else rows
    newest: dict[int, FeatureView] = {}
    for view in rows.order_by("-pk")[: 4 * VIEWS]:
        newest.setdefault(view.sae_id, view)
    return list(newest.values())[:VIEWS]


def by_promoted(text: str, saes: Iterable[SAE] | None = None, *, lowered: bool = False, n: int = FOUND) -> list[Found]:
    """Features whose decoder direction raises (or lowers) the token most, over the newest views of these SAEs (all: None).

    Known are the ten tokens a side that the logit lens kept of each feature; a view without them is passed over. Raises
    SearchError when there is no view with logits, or no token holds the text.
    """
    hits: list[tuple[FeatureView, featurefile.FeatureView, int, featurefile.Logit]] = []
    asked = known = 0
    for view in newest_views(saes):
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
    if not 0 <= feature < sae.n_features:
        raise SearchError(f"There is no feature {feature}; {sae.name} has features 0 to {sae.n_features - 1:,}.")
    view = next(iter(newest_views([sae])), None)
    try:
        columns = view.opened() if view is not None else None
        near = columns.feature_neighbours(feature)[:n] if columns is not None else []
    except featurefile.ViewError as error:
        raise SearchError(str(error)) from error
    if columns is None or not near:
        raise SearchError(f"Directions of {sae.name} were not compared yet; harvest its features.")
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
