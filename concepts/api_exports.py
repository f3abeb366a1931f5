"""Harvested features as files of other tools, in /api/v1."""

from __future__ import annotations

from typing import Any

from django.http import HttpRequest
from django.shortcuts import get_object_or_404
from ninja import Query, Router

from concepts import exports
from concepts.api_features import opened
from concepts.chosen import no_feature
from saehub.accounts.api_access import Needs, Problem
from saehub.accounts.api_pages import like
from saehub.streaming import attachment
from saes.models import SAE

router = Router(tags=["Features"])
MI_CROW: Any = {"2117": [{"text": "Paris is", "score": 11.8, "token_str": " Paris", "token_idx": 1}]}


@router.get(
    "/saes/{int:pk}/features/export",
    auth=Needs("concepts.view_featureview"),
    response=like(MI_CROW),
    summary="Features as a file",
)
def feature_export(
    request: HttpRequest,
    pk: int,
    format: str = Query("mi_crow", description=f"One of {', '.join(exports.FORMATS)}"),
    view: int | None = Query(None, description="The one over the most tokens when left out"),
    feature: list[int] = Query(default_factory=list, max_length=1000, description="These; all when left out"),
) -> Any:
    """Written as it is sent: top texts as mi_crow and its server have them, Neuronpedia's features, or one HTML page."""
    sae = get_object_or_404(SAE, pk=pk)
    if format not in exports.FORMATS:
        raise Problem(422, f"format: there is no {format[:40]}; choose one of {', '.join(exports.FORMATS)}.")
    row, columns = opened(sae, view)
    if wrong := [i for i in feature if not 0 <= i < columns.n_features]:
        raise Problem(422, f"feature: {no_feature(sae, wrong[0])}")
    chosen = sorted(set(feature)) or list(range(columns.n_features))
    kind = exports.FORMATS[format]
    if refused := kind.too_many(len(chosen)):
        raise Problem(422, f"feature: {refused}")
    name = f"features-of-sae-{sae.pk}-view-{row.pk}-{format}.{kind.suffix}"
    return attachment(request, kind.write(row, columns, chosen), name=name, kind=kind.content_type)
