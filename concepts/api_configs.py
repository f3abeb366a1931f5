"""Concept configs in /api/v1: edits previewed, kept as versions, read as mi_crow writes them."""

from __future__ import annotations

import json
from typing import Any

from django.http import HttpRequest
from django.shortcuts import get_object_or_404
from ninja import Field, Query, Router, Schema, Status
from pydantic import ConfigDict

from concepts import compile as compiler
from concepts.config_forms import LONGEST_JSON, ConfigForm, as_json, read_config
from concepts.dictionary_views import moved
from concepts.interchange import RowRefused
from concepts.models import ConceptConfig
from saehub.accounts.api_access import Needs, Problem, require_own
from saehub.accounts.api_pages import LIMIT, OFFSET, Page, like, page
from saehub.accounts.idempotency import keyed
from saes.api_forms import refuse
from saes.models import SAE

router = Router(tags=["Concepts"])
EDIT: Any = {"feature": 2117, "mode": "add", "value": 12.0}
MOVE: Any = {
    "feature": 2117, "mode": "add", "value": 12.0, "shift": 0.0, "label": "capital cities", "maximum": 14.1, "at_maximum": 26.1,
    "share_of_layer_norm": 0.195, "asked_by": ["feature 2117"],
}  # fmt: skip
CONFIG: Any = {
    "id": 3, "concept_config_id": 3, "sae_id": 12, "name": "more cities", "version": 1, "note": "", "edits": [EDIT],
    "compiled": [EDIT], "owner": "ada", "created_at": "2026-11-22T08:00:00Z",
}  # fmt: skip
ASKED: Any = {"sae_id": 12, "name": "more cities", "edits": [EDIT]}


class ConfigIn(Schema):
    """Edits, or mi_crow's weights and bias: z' = z * weight + bias of each feature named.

    An edit is `{feature | concept, mode, value}`, mode one of add, scale, clamp, ablate, cap. In mi_crow an empty bias means
    1 for every feature: with weights and no bias say in `bias_of_ones` whether that is meant.
    """

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [ASKED, {"sae_id": 12, "weights": {"2117": 2.0}, "bias_of_ones": False}]},
    )

    sae_id: int
    edits: list[dict[str, Any]] | dict[str, Any] | None = Field(
        None, description="A list of edits; or weights by feature, as mi_crow's server takes them"
    )
    weights: dict[str, float] | None = None
    bias: dict[str, float] | None = None
    bias_of_ones: bool | None = None
    name: str = Field("", max_length=10_000, description="/concepts/manipulate: of the config")
    note: str = Field("", max_length=10_000, description="What is different in this version")


class MoveOut(Schema):
    """A feature that moves: its mode and value, what a scaled code is then moved by (`shift`), what its largest code becomes,
    and the share of the layer's norm added."""

    model_config = ConfigDict(json_schema_extra={"examples": [MOVE]})

    feature: int
    mode: str
    value: float
    shift: float
    label: str | None
    maximum: float | None
    at_maximum: float | None
    share_of_layer_norm: float | None
    asked_by: list[str]


class PreviewOut(Schema):
    """Which features move, and by how much. Nothing is kept."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"sae_id": 12, "layer": "blocks.9.hook_resid_post", "n_latents": 4608, "neutral": False, "edits": [EDIT],
                 "compiled": [EDIT], "moved": [MOVE], "weights": None, "bias": {"2117": 12.0}}
            ]
        }
    )  # fmt: skip

    sae_id: int
    layer: str
    n_latents: int
    neutral: bool = Field(description="It changes nothing")
    edits: list[dict[str, Any]]
    compiled: list[dict[str, Any]]
    moved: list[MoveOut]
    weights: dict[str, float] | None = Field(description="As mi_crow says the same; null where it cannot")
    bias: dict[str, float] | None


class ConfigOut(Schema):
    """A version of a config. It never changes; `concept_config_id` is what /infer and /generate take."""

    model_config = ConfigDict(json_schema_extra={"examples": [CONFIG]})

    id: int
    concept_config_id: int
    sae_id: int
    name: str
    version: int
    note: str
    edits: list[dict[str, Any]]
    compiled: list[dict[str, Any]]
    owner: str | None
    created_at: Any


def config_out(row: ConceptConfig) -> dict[str, Any]:
    names = ("id", "sae_id", "name", "note", "edits", "created_at")
    return {name: getattr(row, name) for name in names} | {
        "concept_config_id": row.pk,
        "version": row.number,
        "compiled": row.compiled(),
        "owner": row.owner.get_username() if row.owner else None,
    }


def edits_of(sae: SAE, given: ConfigIn) -> list[dict[str, Any]]:
    """The edits that are asked for, checked as a pasted config is. Raises Problem 422."""
    listed = isinstance(given.edits, list)
    if sum(part is not None for part in (given.edits, given.weights)) + (given.bias is not None and listed) > 1:
        raise Problem(422, "Say one of edits, and weights with bias.")
    content: dict[str, Any] = {name: getattr(given, name) for name in ("edits", "weights", "bias")}
    content = {name: value for name, value in content.items() if value is not None}
    text = json.dumps(content)
    if len(text) > LONGEST_JSON:
        raise Problem(413, f"A config has at most {LONGEST_JSON // 2**20} MB.")
    try:
        edits = read_config(text, sae, given.bias_of_ones)[1]
        compiler.compile(edits)
    except (RowRefused, compiler.ConfigError) as refusal:
        field = "bias_of_ones" if str(refusal) == compiler.ONES_ASKED else "edits"
        raise Problem(422, str(refusal), errors={field: [str(refusal)]}) from None
    return edits


def _sae(pk: int) -> SAE:
    sae = get_object_or_404(SAE.objects.select_related("model"), pk=pk)
    if not sae.n_features:
        raise Problem(422, f"How many features {sae.name} has is not known yet.")
    return sae


@router.post(
    "/concepts/preview", auth=Needs("concepts.view_conceptconfig"), response=PreviewOut, summary="What edits would move"
)
def concepts_preview(request: HttpRequest, given: ConfigIn) -> Any:
    """Nothing is kept and nothing is run."""
    sae = _sae(given.sae_id)
    edits = edits_of(sae, given)
    compiled = compiler.compile(edits)
    try:
        peer: dict[str, Any] = compiler.to_mi_crow(edits)
    except compiler.ConfigError:
        peer = {"weights": None, "bias": None}
    rows = [_move(row) for row in moved(sae, edits)["moved"]]
    return {
        "sae_id": sae.pk, "layer": sae.hook_name, "n_latents": sae.n_features, "neutral": not compiled, "edits": edits,
        "compiled": compiled, "moved": rows, **peer,
    }  # fmt: skip


def _move(row: Any) -> dict[str, Any]:
    return {name: getattr(row.move, name) for name in ("feature", "mode", "value", "shift")} | {
        "label": row.label, "maximum": row.known.maximum if row.known else None, "at_maximum": row.at_maximum,
        "share_of_layer_norm": row.share, "asked_by": row.asked,
    }  # fmt: skip


@router.post(
    "/concepts/manipulate",
    auth=Needs("concepts.add_conceptconfig"),
    response={201: ConfigOut},
    summary="Keep edits as a concept config",
)
@keyed
def concepts_manipulate(request: HttpRequest, given: ConfigIn) -> Any:
    """The next version under its name. It acts only where a request names it."""
    sae = _sae(given.sae_id)
    form = ConfigForm({"name": given.name, "note": given.note})
    refuse(form)
    edits = edits_of(sae, given)
    newest = ConceptConfig.objects.filter(sae=sae, name=form.cleaned_data["name"]).order_by("-number").first()
    require_own(request, "concepts.add_conceptconfig", newest)
    row = ConceptConfig.next_version(sae, form.cleaned_data["name"], edits, request.user, form.cleaned_data["note"])
    return Status(201, config_out(row))


@router.get(
    "/concepts/configs", auth=Needs("concepts.view_conceptconfig"), response=Page[ConfigOut], summary="Concept configs"
)
def config_list(
    request: HttpRequest, sae_id: int | None = None, q: str = "", limit: int = LIMIT, offset: int = OFFSET
) -> Any:
    """Every version, newest first."""
    rows = ConceptConfig.objects.select_related("owner").filter(name__icontains=q)
    return page(rows.filter(sae=sae_id) if sae_id is not None else rows, limit, offset, config_out)


@router.get(
    "/concepts/configs/{int:pk}",
    auth=Needs("concepts.view_conceptconfig"),
    response=ConfigOut,
    summary="One concept config",
)
def config_detail(request: HttpRequest, pk: int) -> Any:
    return config_out(get_object_or_404(ConceptConfig.objects.select_related("owner"), pk=pk))


@router.get(
    "/concepts/configs/{int:pk}/export",
    auth=Needs("concepts.view_conceptconfig"),
    response=like({"name": "more cities", "version": 1, "n_features": 4608, "edits": [EDIT], "compiled": [EDIT]}),
    summary="A concept config as a file",
)
def config_export(
    request: HttpRequest,
    pk: int,
    format: str = Query("json", pattern="^(json|mi_crow)$", description="json or mi_crow"),
) -> Any:
    """409 for what mi_crow cannot say."""
    row = get_object_or_404(ConceptConfig.objects.select_related("sae"), pk=pk)
    try:
        return as_json(row) if format == "json" else compiler.to_mi_crow(row.edits)
    except compiler.ConfigError as refusal:
        raise Problem(409, str(refusal)) from None
