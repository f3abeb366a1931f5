"""Looking for features in /api/v1: by label, by a token they write, by direction. By a text of one's own: /infer/{id}/features."""

from __future__ import annotations

from typing import Any, Literal

from django.http import HttpRequest
from django.shortcuts import get_object_or_404
from ninja import Query, Router, Schema
from pydantic import ConfigDict

from concepts.models import Label
from concepts.search import Found, SearchError, alike, alike_in, by_label, by_promoted, comparable
from saehub.accounts.api_access import Needs, Problem
from saehub.accounts.api_pages import LIMIT, OFFSET, Page, page
from saes.models import SAE

router = Router(tags=["Features"])
FOUND: Any = {
    "sae_id": 12, "sae": "one", "feature": 2117, "label": "capital cities", "tokens": [" Paris", " Rome"],
    "density": 0.0004, "maximum": 14.1, "logit": {"id": 9, "text": " Paris", "value": 0.91}, "cosine": None,
}  # fmt: skip


class FoundOut(Schema):
    """A feature that was found: `logit` is what it does to the token asked for, `cosine` how near it is."""

    model_config = ConfigDict(json_schema_extra={"examples": [FOUND]})

    sae_id: int
    sae: str
    feature: int
    label: str | None
    tokens: list[str]
    density: float | None
    maximum: float | None
    logit: dict[str, Any] | None
    cosine: float | None


@router.get(
    "/features/search", auth=Needs("concepts.view_featureview"), response=Page[FoundOut], summary="Look for features"
)
def feature_search(
    request: HttpRequest,
    by: Literal["label", "promotes", "lowers", "cosine"] = Query(
        "label", description="label: beginnings of words; promotes, lowers: a token; cosine: to `feature` of `sae_id`"
    ),
    q: str = Query("", max_length=200, description="Words of a label, or the token"),
    sae_id: int | None = Query(None, description="Only this SAE; all of them when left out"),
    feature: int | None = Query(None, description="cosine: of this feature"),
    among: str = Query(
        "",
        max_length=12,
        description="cosine: the id of another SAE of the same hook point, or others; sae_id when left out",
    ),
    limit: int = LIMIT,
    offset: int = OFFSET,
) -> Any:
    """Over the view of each SAE that rests on the most tokens. The best fifty of promotes, lowers and cosine are known."""
    sae = get_object_or_404(SAE, pk=sae_id) if sae_id is not None else None
    if by != "cosine" and not q.strip():
        raise Problem(422, f"q: say which {'words' if by == 'label' else 'token'} to look for.")
    if by == "label":
        return page(by_label(q, sae), limit, offset, _labelled)
    try:
        return page(_found(by, q, sae, feature, among), limit, offset, _shown)
    except SearchError as refusal:
        raise Problem(422, str(refusal)) from None


def _found(by: str, q: str, sae: SAE | None, feature: int | None, among: str) -> list[Found]:
    if by != "cosine":
        return by_promoted(q, None if sae is None else [sae], lowered=by == "lowers")
    if sae is None or feature is None:
        raise Problem(422, "cosine: say sae_id and feature.")
    if not among:
        return alike(sae, feature)
    others = [other for other in comparable(sae) if among in ("others", str(other.pk))]
    if not others:
        raise Problem(422, f"among: no harvested SAE {among} writes into the hook point of {sae.name}.")
    return alike_in(sae, feature, others)[0]


def _shown(one: Found) -> dict[str, Any]:
    names = ("feature", "label", "tokens", "density", "maximum", "cosine")
    return {name: getattr(one, name) for name in names} | {
        "sae_id": one.sae.pk, "sae": one.sae.name, "logit": vars(one.logit) if one.logit else None,
    }  # fmt: skip


def _labelled(row: Label) -> dict[str, Any]:
    return {
        "sae_id": row.sae_id, "sae": row.sae.name, "feature": row.feature, "label": row.text, "tokens": [],
        "density": None, "maximum": None, "logit": None, "cosine": None,
    }  # fmt: skip
