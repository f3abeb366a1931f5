"""Features in /api/v1: harvested, listed, looked at one by one."""

from __future__ import annotations

from typing import Any

from django.http import HttpRequest
from django.shortcuts import get_object_or_404
from ninja import Query, Router, Schema
from pydantic import ConfigDict

from concepts import featurefile
from concepts.chosen import no_feature
from concepts.forms import ORDERS, FeatureFilterForm, HarvestForm
from concepts.models import FeatureView, Label, name_of
from concepts.views import chosen_features
from saehub.accounts.api_access import Needs, Problem, require_own
from saehub.accounts.api_pages import LIMIT, OFFSET, Page, page
from saehub.jobs.starting import starts
from saes.api_forms import laid_over, refuse
from saes.models import SAE

router = Router(tags=["Features"])
TOKENS = 6
VIEW: Any = {
    "id": 3, "sae_id": 12, "activations_id": 5, "name": "sae on wikitext", "status": "ready", "k": 20,
    "n_tokens": 900000, "alive": 4520, "dead": 88, "seconds": 31.0, "created_at": "2026-11-22T08:00:00Z", "job_id": 44,
    "job_ids": [], "error": "",
}  # fmt: skip
FEATURE: Any = {
    "feature": 2117, "label": "capital cities", "name": [" Paris", " Rome"], "density": 0.0004, "n_fires": 372,
    "n_contexts": 300, "max": 14.1, "mean": 5.2,
}  # fmt: skip
CONTEXT: Any = {
    "document": 8, "context": 120, "peak": 4, "value": 14.1, "tokens": ["The", " city", " of", " light", " Paris"],
    "activations": [0, 0, 0, 0, 14.1],
}  # fmt: skip
LABEL: Any = {
    "id": 9, "sae_id": 12, "feature": 2117, "text": "capital cities", "accepted": True, "source": "person", "by": "",
    "method": "", "score": None, "confidence": 0.8, "notes": "", "owner": "ada", "created_at": "2026-11-22T08:00:00Z",
}  # fmt: skip


class ViewOut(Schema):
    """What was harvested of an SAE's features on one set of activations."""

    model_config = ConfigDict(json_schema_extra={"examples": [VIEW]})

    id: int
    sae_id: int
    activations_id: int
    name: str
    status: str
    k: int
    n_tokens: int | None
    alive: int | None
    dead: int | None
    seconds: float | None
    created_at: Any
    job_id: int | None
    job_ids: list[int]
    error: str


class HarvestIn(Schema):
    """On which activations."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"activations_id": 5}]})

    activations_id: int


class FeatureOut(Schema):
    """A feature of the list. `name` are its first top tokens, which stand for a label until it has one."""

    model_config = ConfigDict(json_schema_extra={"examples": [FEATURE]})

    feature: int
    label: str | None
    name: list[str]
    density: float
    n_fires: int
    n_contexts: int
    max: float
    mean: float | None


class FeaturePage(Page[FeatureOut]):
    """Features of one view."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"count": 1, "limit": 50, "offset": 0, "items": [FEATURE], "view": VIEW}]}
    )

    view: ViewOut


class FeatureDetail(Schema):
    """All that is known of one feature: top contexts with their activations, samples by interval, tokens, logits."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                FEATURE | {
                    "sae_id": 12, "view_id": 3, "n_tokens": 900000, "decoder_norm": 1.0, "layer_norm": 61.4,
                    "top_texts": [CONTEXT], "intervals": [], "histogram": {"counts": [300, 72], "edges": [0, 7.05, 14.1]},
                    "top_tokens": [{"id": 9, "text": " Paris", "count": 80, "sum": 812.0}],
                    "logits_raised": [{"id": 4, "text": " France", "value": 0.91}], "logits_lowered": [],
                    "logits_how": None, "neighbours": [{"feature": 310, "cosine": 0.44}],
                    "together": [{"feature": 95, "correlation": 0.31, "count": 40, "share": 0.5}], "n_together": 65000, "labels": [LABEL],
                }
            ]
        }
    )  # fmt: skip

    sae_id: int
    view_id: int
    feature: int
    label: str | None
    name: list[str]
    n_tokens: int
    n_fires: int
    n_contexts: int
    density: float
    max: float
    mean: float | None
    decoder_norm: float | None
    layer_norm: float | None
    top_texts: list[dict[str, Any]]
    intervals: list[dict[str, Any]]
    histogram: dict[str, Any]
    top_tokens: list[dict[str, Any]]
    logits_raised: list[dict[str, Any]]
    logits_lowered: list[dict[str, Any]]
    logits_how: dict[str, Any] | None
    neighbours: list[dict[str, Any]]
    together: list[dict[str, Any]]
    n_together: int
    labels: list[dict[str, Any]]


class LabelOut(Schema):
    """What somebody calls a feature; at most one is accepted."""

    model_config = ConfigDict(json_schema_extra={"examples": [LABEL]})

    id: int
    sae_id: int
    feature: int
    text: str
    accepted: bool
    source: str
    by: str
    method: str
    score: float | None
    confidence: float | None
    notes: str
    owner: str | None
    created_at: Any


def view_out(row: FeatureView) -> dict[str, Any]:
    names = ("id", "sae_id", "name", "k", "n_tokens", "alive", "dead", "seconds", "created_at", "job_id")
    return {name: getattr(row, name) for name in names} | {
        "activations_id": row.capture_id,
        "status": row.state,
        "job_ids": [row.job_id] if row.job is not None and row.job.is_live else [],
        "error": row.job.error if row.job else "",
    }


def _views() -> Any:
    return FeatureView.objects.select_related("job", "capture__model", "sae__model")


def sae_of(pk: int) -> SAE:
    return get_object_or_404(SAE.objects.select_related("model", "run__capture"), pk=pk)


@router.get("/saes/{int:pk}/views", auth=Needs("concepts.view_featureview"), response=Page[ViewOut], summary="Harvests")
def feature_views(request: HttpRequest, pk: int, limit: int = LIMIT, offset: int = OFFSET) -> Any:
    return page(_views().filter(sae=sae_of(pk)), limit, offset, view_out)


@router.post(
    "/saes/{int:pk}/harvest",
    auth=Needs("concepts.add_featureview"),
    response={200: ViewOut, 202: ViewOut},
    summary="Harvest its features",
)
@starts(lambda pk: view_out(get_object_or_404(_views(), pk=pk)))
def feature_harvest(request: HttpRequest, pk: int, given: HarvestIn) -> Any:
    """Queues a job that finds the top texts and statistics of every feature. 409 while one does so already."""
    sae = sae_of(pk)
    form = HarvestForm(sae, {"capture": given.activations_id})
    refuse(form, {"capture": "activations_id"})
    view = form.view(request.user)
    require_own(request, "concepts.add_featureview", view)
    if view.job is not None and view.job.is_live:
        raise Problem(409, "These features are being harvested already.", job_id=view.job_id)
    view.start(request.user)
    return view.pk


def opened(sae: SAE, wanted: int | None) -> tuple[FeatureView, featurefile.FeatureView]:
    """The view asked for, else the finished one over the most tokens, with its columns. Raises Problem 404 or 409."""
    rows = _views().filter(sae=sae).largest_first()
    view = rows.filter(pk=wanted).first() if wanted is not None else rows.filter(ready_at__isnull=False).first()
    if view is None and wanted is not None:
        raise Problem(404, f"{sae.name} has no feature view {wanted}.")
    if view is None or not view.ready:
        raise Problem(409, f"The features of {sae.name} are not harvested; POST /saes/{sae.pk}/harvest does that.")
    try:
        return view, view.opened()
    except featurefile.ViewError as error:
        raise Problem(409, str(error)) from None


@router.get(
    "/saes/{int:pk}/features",
    auth=Needs("concepts.view_featureview"),
    response=FeaturePage,
    summary="List, sort and narrow its features",
)
def feature_list(
    request: HttpRequest,
    pk: int,
    view: int | None = Query(None, description="The one over the most tokens when left out"),
    sort: str = Query("feature", description=f"One of {', '.join(ORDERS)}; - before it turns it round"),
    state: str = Query("", description="alive or dead"),
    named: str = Query("", description="named or unnamed"),
    label: str = Query("", description="Words of a label"),
    token: str = Query("", description="Letters of a top token"),
    raises: str = Query("", description="Letters of a token whose logit it raises"),
    density_low: float | None = Query(None, description="Per cent"),
    density_high: float | None = Query(None, description="Per cent"),
    max_low: float | None = None,
    max_high: float | None = None,
    limit: int = LIMIT,
    offset: int = OFFSET,
) -> Any:
    sae = sae_of(pk)
    asked = {
        "sort": sort, "state": state, "named": named, "label": label, "token": token, "raises": raises, "density_low": density_low,
        "density_high": density_high, "max_low": max_low, "max_high": max_high,
    }  # fmt: skip
    form = FeatureFilterForm(laid_over(FeatureFilterForm(), asked))
    refuse(form)
    row, columns = opened(sae, view)
    order = chosen_features(sae, columns, form)
    shown = [int(i) for i in order[offset : offset + limit]]
    labels = Label.objects.accepted_of(sae, shown)
    items = [brief_feature(columns, i, labels.get(i)) for i in shown]
    return {"count": len(order), "limit": limit, "offset": offset, "items": items, "view": view_out(row)}


def brief_feature(columns: featurefile.FeatureView, i: int, label: str | None) -> dict[str, Any]:
    figures = {name: columns.summary[name][i].item() for name in ("density", "n_fires", "n_contexts", "max", "mean")}
    if not figures["n_fires"]:
        figures |= {"max": 0.0, "mean": None}
    return {"feature": i, "label": label, "name": name_of(columns, i, TOKENS)} | figures


@router.get(
    "/saes/{int:pk}/features/{int:index}",
    auth=Needs("concepts.view_featureview"),
    response=FeatureDetail,
    summary="One feature",
)
def feature_detail(
    request: HttpRequest,
    pk: int,
    index: int,
    view: int | None = Query(None, description="The one over the most tokens when left out"),
    contexts: int = Query(20, ge=0, le=100, description="Top texts at most"),
) -> Any:
    sae = sae_with(pk, index)
    row, columns = opened(sae, view)
    record = columns.feature(index)
    labels = [label_out(one) for one in Label.objects.filter(sae=sae, feature=index).select_related("owner")]
    accepted = next((one["text"] for one in labels if one["accepted"]), None)
    return brief_feature(columns, index, accepted) | {
        "sae_id": sae.pk,
        "view_id": row.pk,
        "n_tokens": record.n_tokens,
        "decoder_norm": record.decoder_norm,
        "layer_norm": row.layer_norm,
        "top_texts": [_context(one) for one in record.top[:contexts]],
        "intervals": [
            {"low": one.low, "high": one.high, "n_fires": one.n_fires, "share": one.share}
            | {"texts": [_context(example) for example in one.examples[:contexts]]}
            for one in record.intervals
        ],
        "histogram": {"counts": record.histogram.counts.tolist(), "edges": record.histogram.edges.tolist()},
        "top_tokens": [{"id": t.id, "text": t.text, "count": t.count, "sum": t.total} for t in record.top_tokens],
        "logits_raised": [vars(one) for one in record.raised],
        "logits_lowered": [vars(one) for one in record.lowered],
        "logits_how": columns.logit_lens,
        "neighbours": [vars(one) for one in record.neighbours],
        "together": [vars(one) for one in columns.companions(index)],
        "n_together": columns.n_together,
        "labels": labels,
    }


def _context(one: featurefile.Example) -> dict[str, Any]:
    return {
        "document": one.document, "context": one.context, "peak": one.peak, "value": one.value, "tokens": one.tokens,
        "activations": one.activations.tolist(),
    }  # fmt: skip


def sae_with(pk: int, index: int) -> SAE:
    """The SAE, which has this feature. Raises Problem 404."""
    sae = sae_of(pk)
    if index >= sae.n_features:
        raise Problem(404, no_feature(sae, index))
    return sae


# ------------------------------------------------------------------------------------------------------------- labels


def label_out(row: Label) -> dict[str, Any]:
    names = [name for name in LABEL if name != "owner"]
    return {name: getattr(row, name) for name in names} | {"owner": row.owner.username if row.owner else None}
