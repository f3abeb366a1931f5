"""Language models in /api/v1: which are here, one more, and the places in them that an SAE can read."""

from __future__ import annotations

from typing import Any

from django.http import HttpRequest
from django.shortcuts import get_object_or_404
from ninja import Field, Query, Router, Schema
from pydantic import ConfigDict

from saehub.accounts.api_access import Needs
from saehub.accounts.api_pages import LIMIT, OFFSET, Page, page
from saehub.jobs.starting import starts
from saes.api_forms import laid_over, refuse
from saes.forms import LanguageModelForm
from saes.models import LanguageModel

router = Router(tags=["Models"])
MODEL: Any = {
    "id": 1, "name": "SmolLM2-135M", "status": "available", "state": "ready", "source": "hub",
    "location": "HuggingFaceTB/SmolLM2-135M", "revision": "93efa2f097d58c2a74874c7e644dbc9b0cee75a2",
    "architecture": "LlamaForCausalLM", "n_layers": 30, "d_model": 576, "vocabulary": 49152, "context_length": 8192,
    "n_parameters": 134515008, "size_bytes": 269060552, "has_bos": True, "has_chat": False, "owner": "ada",
    "created_at": "2026-11-22T08:00:00Z", "job_ids": [], "job_id": None, "error": "",
}  # fmt: skip
LAYER: Any = {
    "layer_id": "blocks.9.hook_resid_post", "name": "model.layers.9", "type": "hook_resid_post", "side": "out",
    "layer": 9, "d": 576, "path": ["model", "layers", "9"],
}  # fmt: skip


class ModelOut(Schema):
    """A language model. `status`: available, or how the job that adds it stands."""

    model_config = ConfigDict(json_schema_extra={"examples": [MODEL]})

    id: int
    name: str
    status: str
    state: str
    source: str
    location: str
    revision: str
    architecture: str
    n_layers: int | None
    d_model: int | None
    vocabulary: int | None
    context_length: int | None
    n_parameters: int | None
    size_bytes: int | None
    has_bos: bool
    has_chat: bool
    owner: str | None
    created_at: Any
    job_id: int | None
    job_ids: list[int]
    error: str


class ModelIn(Schema):
    """Where a model is; everything else is found out."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"source": "hub", "location": "HuggingFaceTB/SmolLM2-135M"}]},
    )

    location: str = Field(max_length=400, description="Repository id, or path of the server")
    source: LanguageModel.Source = LanguageModel.Source.HUB
    revision: str = Field("", max_length=80)
    name: str = Field("", max_length=120)


class LayerOut(Schema):
    """A place in a model that an SAE can read: `layer_id` is its name, `name` its module."""

    model_config = ConfigDict(json_schema_extra={"examples": [LAYER]})

    layer_id: str
    name: str
    type: str
    side: str
    layer: int | None
    d: int
    path: list[str]


def model_out(row: LanguageModel) -> dict[str, Any]:
    names = [name for name in MODEL if name not in ("status", "owner", "job_id", "job_ids", "error")]
    return {name: getattr(row, name) for name in names} | {
        "status": "available" if row.ready else row.state,
        "owner": row.owner.get_username() if row.owner else None,
        "job_id": row.job_id,
        "job_ids": [row.job_id] if row.busy and row.job_id else [],
        "error": row.job.error if row.job else "",
    }


def _model(pk: Any) -> LanguageModel:
    return get_object_or_404(LanguageModel.objects.select_related("owner", "job"), pk=pk)


@router.get("/models", auth=Needs("saes.view_languagemodel"), response=Page[ModelOut], summary="Language models here")
def model_list(request: HttpRequest, q: str = "", limit: int = LIMIT, offset: int = OFFSET) -> Any:
    rows = LanguageModel.objects.select_related("owner", "job").filter(name__icontains=q)
    return page(rows, limit, offset, model_out)


@router.post(
    "/models",
    auth=Needs("saes.add_languagemodel"),
    response={200: ModelOut, 202: ModelOut},
    summary="Add a language model",
)
@starts(lambda pk: model_out(_model(pk)))
def model_create(request: HttpRequest, given: ModelIn) -> Any:
    """Queues a job that fetches or reads it and finds out its layers."""
    blank = LanguageModelForm(user=request.user)
    form = LanguageModelForm(laid_over(blank, given.dict()), user=request.user)
    refuse(form)
    return form.make().pk


@router.get("/models/{int:pk}", auth=Needs("saes.view_languagemodel"), response=ModelOut, summary="One language model")
def model_detail(request: HttpRequest, pk: int) -> Any:
    return model_out(_model(pk))


@router.get(
    "/models/{int:pk}/layers",
    auth=Needs("saes.view_languagemodel"),
    response=Page[LayerOut],
    summary="Its hook points",
)
def model_layers(
    request: HttpRequest,
    pk: int,
    layer: int | None = Query(None, description="Only those of this layer"),
    limit: int = LIMIT,
    offset: int = OFFSET,
) -> Any:
    """In the order of a forward pass. `layer_id` is what `layers` of /activations/save takes."""
    points = [one for one in _model(pk).hook_points if layer is None or one.get("layer") == layer]
    return page(points, limit, offset, _layer)


def _layer(point: dict[str, Any]) -> dict[str, Any]:
    return {
        "layer_id": point["name"],
        "name": point["module"],
        "type": point["name"].split(".", 2)[-1] if point.get("layer") is not None else point["name"],
        "side": point.get("side", "out"),
        "layer": point.get("layer"),
        "d": point["d"],
        "path": point["module"].split("."),
    }
