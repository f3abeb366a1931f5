"""Steered generation in /api/v1: a prompt with edits, beside the same without; made again at several strengths."""

from __future__ import annotations

from typing import Any

from django.http import HttpRequest
from django.shortcuts import get_object_or_404
from ninja import Field, Query, Router, Schema
from pydantic import ConfigDict

from concepts.models import ConceptConfig
from inference.edit_forms import EditFormSet
from inference.forms import GenerationForm, SweepForm, can_sweep, start_generation
from inference.models import Generation, Mode, Resident, Scope, Sweep
from inference.records import as_python, record
from inference.sweeps import EFFECT
from saehub.accounts.api_access import Needs, Problem
from saehub.accounts.api_pages import LIMIT, OFFSET, Page, like, page
from saehub.jobs.starting import starts
from saes.api_forms import laid_over, refuse

router = Router(tags=["Steering"])
TEXT: Any = {"text": " Rome, and", "ids": [9061, 28], "tokens": [" Rome", ","], "logprobs": [-0.4, -1.2]}
BRIEF: Any = {
    "id": 33, "status": "done", "model_id": 1, "sae_id": 12, "prompt": "The capital is", "baseline_text": " the city",
    "steered_text": " Rome, and", "owner": "ada", "created_at": "2026-11-22T08:00:00Z", "job_id": 51, "job_ids": [],
    "error": "",
}  # fmt: skip
DETAIL: Any = BRIEF | {
    "edits": [{"sae": 12, "feature": 2117, "mode": "add", "value": 12.0, "formula": "z' = z + v"}], "scope": "all",
    "scope_from": 0, "instruction": "", "chat": False, "max_new_tokens": 48, "temperature": 0.0, "seed": 0,
    "baseline": TEXT, "steered": TEXT, "prompted": {}, "policy": {"bos": True}, "versions": {"torch": "2.13.0"},
    "seconds": 1.9, "saes": [{"id": 12, "name": "one", "hook_name": "blocks.9.hook_resid_post", "sha256": ""}],
}  # fmt: skip
SWEPT: Any = {
    "id": 2, "status": "done", "generation_id": 33, "factors": [0.0, 0.5, 1.0], "points": [{"factor": 0.0, "text": " the"}],
    "effect": "mean code of the edited features", "seconds": 4.2, "owner": "ada", "created_at": "2026-11-22T08:00:00Z",
    "job_id": 52, "job_ids": [], "error": "",
}  # fmt: skip


class EditIn(Schema):
    """What becomes of a code z: add z + v, scale z * v, clamp v, ablate 0, cap min(z, v)."""

    model_config = ConfigDict(extra="forbid")

    feature: int | str = Field(description="Its index, its label, or the name of a concept")
    mode: Mode = Mode.ADD
    value: float | None = Field(None, description="v; not asked for by ablate")
    sae: int | None = Field(None, description="Another SAE of the same model")
    scope: Scope | None = Field(None, description="Where this one acts, if elsewhere than the others")
    first: int | None = Field(None, description="First position, for scope from")


class GenerateIn(Schema):
    """A prompt, and what to change while the model goes on from it."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"sae_id": 12, "prompt": "The capital is", "edits": [{"feature": 2117, "mode": "add", "value": 12.0}]},
                {"sae_id": 12, "prompt": "The capital is", "concept_config_id": 3, "max_new_tokens": 24},
            ]
        },
    )

    sae_id: int | None = Field(None, description="That of the concept config when left out")
    prompt: str
    edits: list[EditIn] = Field(default_factory=list, max_length=1000)
    concept_config_id: int | None = Field(None, description="Its edits, in this request alone")
    scope: Scope = Scope.ALL
    scope_from: int = Field(0, description="First position, for scope from")
    instruction: str = Field("", description="For a third text: asked for in words, without edits")
    chat: bool = False
    max_new_tokens: int = 48
    temperature: float = 0.0
    seed: int = 0


class GenerationBrief(Schema):
    """A generation in short."""

    model_config = ConfigDict(json_schema_extra={"examples": [BRIEF]})

    id: int
    status: str
    model_id: int
    sae_id: int | None
    prompt: str
    baseline_text: str
    steered_text: str
    owner: str | None
    created_at: Any
    job_id: int | None
    job_ids: list[int]
    error: str


class GenerationOut(GenerationBrief):
    """All that decided it and came out: three columns, `prompted` only where an instruction was given."""

    model_config = ConfigDict(json_schema_extra={"examples": [DETAIL]})

    edits: list[dict[str, Any]]
    scope: str
    scope_from: int
    instruction: str
    chat: bool
    max_new_tokens: int
    temperature: float
    seed: int
    baseline: dict[str, Any]
    steered: dict[str, Any]
    prompted: dict[str, Any]
    policy: dict[str, Any]
    versions: dict[str, Any]
    seconds: float | None
    saes: list[dict[str, Any]]


class SweepIn(Schema):
    """At which multiples of its strengths."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"factors": [0, 0.5, 1, 2]}]})

    factors: list[float] = Field(min_length=1, max_length=100)


class SweepOut(Schema):
    """A generation at several strengths; `points` come as they are made."""

    model_config = ConfigDict(json_schema_extra={"examples": [SWEPT]})

    id: int
    status: str
    generation_id: int
    factors: list[float]
    points: list[dict[str, Any]]
    effect: str
    seconds: float | None
    owner: str | None
    created_at: Any
    job_id: int | None
    job_ids: list[int]
    error: str


def _rows() -> Any:
    return Generation.objects.select_related("owner", "job", "model", "sae__model")


def _standing(row: Any) -> dict[str, Any]:
    return {
        "id": row.pk,
        "status": row.job.state if row.job else row.state,
        "owner": row.owner.get_username() if row.owner else None,
        "created_at": row.created_at,
        "job_id": row.job_id,
        "job_ids": [row.job_id] if row.busy else [],
        "error": row.job.error if row.job else "",
    }


def generation_brief(row: Generation) -> dict[str, Any]:
    texts = {f"{side}_text": getattr(row, side).get("text", "") for side in ("baseline", "steered")}
    return _standing(row) | {"model_id": row.model_id, "sae_id": row.sae_id, "prompt": row.prompt} | texts


def generation_out(pk: Any) -> dict[str, Any]:
    row: Generation = get_object_or_404(_rows(), pk=pk)
    known = record(row)
    return generation_brief(row) | {name: known[name] for name in DETAIL if name not in BRIEF}


def sweep_out(pk: Any) -> dict[str, Any]:
    return _swept(get_object_or_404(Sweep.objects.select_related("owner", "job"), pk=pk))


@router.post(
    "/generate",
    auth=Needs("inference.add_generation"),
    response={200: GenerationOut, 202: GenerationOut},
    summary="Generate with features edited",
)
@starts(generation_out)
def generate(request: HttpRequest, given: GenerateIn) -> Any:
    """Queues a job of the live worker. The row never changes afterwards; without edits both texts are the same."""
    config = None
    if given.concept_config_id is not None:
        config = ConceptConfig.objects.filter(pk=given.concept_config_id).first()
    fields = given.dict(exclude={"sae_id", "edits", "concept_config_id"})
    fields["sae"] = config.sae_id if given.sae_id is None and config is not None else given.sae_id
    fields["config"] = given.concept_config_id
    form = GenerationForm(laid_over(GenerationForm(), fields))
    rows = _edit_rows(form, [edit.dict() for edit in given.edits])
    refuse(form, {"sae": "sae_id", "config": "concept_config_id"})
    _refuse_rows(rows, form)
    return start_generation(form, rows.edits(), request.user).pk


def _edit_rows(form: GenerationForm, edits: list[dict[str, Any]]) -> Any:
    """The formset of the page, filled in."""
    data: dict[str, Any] = {"edits-TOTAL_FORMS": len(edits), "edits-INITIAL_FORMS": 0}
    for number, edit in enumerate(edits):
        data |= {f"edits-{number}-{name}": value for name, value in edit.items() if value is not None}
    rows: Any = EditFormSet(data, prefix="edits", form_kwargs={"able": form.able})
    rows.able = form.able
    return rows


def _refuse_rows(rows: Any, form: GenerationForm) -> None:
    """Raise Problem 422 with what is wrong with which edit."""
    rows.is_valid()
    rows.check_against(form.cleaned_data.get("sae"), form.cleaned_data.get("config"))
    errors = {
        f"edits.{number}.{name}": [str(error) for error in found]
        for number, one in enumerate(rows.forms)
        for name, found in one.errors.items()
    } | ({"edits": [str(error) for error in rows.non_form_errors()]} if rows.non_form_errors() else {})
    if errors:
        name, said = next(iter(errors.items()))
        raise Problem(422, f"{name}: {said[0]}", errors=errors)


@router.get("/generate", auth=Needs("inference.view_generation"), response=Page[GenerationBrief], summary="Generations")
def generation_list(
    request: HttpRequest,
    sae_id: int | None = Query(None, description="With this SAE"),
    q: str = Query("", description="Letters of the prompt"),
    limit: int = LIMIT,
    offset: int = OFFSET,
) -> Any:
    rows = _rows().filter(prompt__icontains=q)
    return page(rows.filter(sae=sae_id) if sae_id is not None else rows, limit, offset, generation_brief)


@router.get(
    "/generate/{int:pk}", auth=Needs("inference.view_generation"), response=GenerationOut, summary="One generation"
)
def generation_detail(request: HttpRequest, pk: int) -> Any:
    """While it runs, with what is written so far."""
    return generation_out(pk)


@router.get(
    "/generate/{int:pk}/export",
    auth=Needs("inference.view_generation"),
    response=like(DETAIL | {"python": "from inference.numerics.generate import generate"}),
    summary="A generation to take along",
)
def generation_export(request: HttpRequest, pk: int) -> Any:
    """The record, with the Python that makes it again in `python`."""
    row = get_object_or_404(_rows(), pk=pk)
    return record(row) | {"python": as_python(row)}


@router.post(
    "/generate/{int:pk}/sweep",
    auth=Needs("inference.add_sweep"),
    response={200: SweepOut, 202: SweepOut},
    summary="Make it again at several strengths",
)
@starts(sweep_out)
def sweep_create(request: HttpRequest, pk: int, given: SweepIn) -> Any:
    row = get_object_or_404(_rows(), pk=pk)
    if not can_sweep(row.edits):
        raise Problem(422, "None of its edits has a strength; only add, scale, clamp and cap have one.")
    form = SweepForm({"factors": " ".join(repr(factor) for factor in given.factors)})
    refuse(form)
    return form.begin(row, request.user).pk


@router.get("/sweeps", auth=Needs("inference.view_sweep"), response=Page[SweepOut], summary="Sweeps of generations")
def sweep_list(
    request: HttpRequest,
    generation_id: int | None = Query(None, description="Of this generation"),
    limit: int = LIMIT,
    offset: int = OFFSET,
) -> Any:
    rows = Sweep.objects.select_related("owner", "job")
    rows = rows.filter(generation=generation_id) if generation_id is not None else rows
    return page(rows, limit, offset, _swept)


def _swept(row: Sweep) -> dict[str, Any]:
    shown = {"factors": row.factors, "points": row.points, "effect": EFFECT, "seconds": row.seconds}
    return _standing(row) | {"generation_id": row.generation_id} | shown


@router.get("/sweeps/{int:pk}", auth=Needs("inference.view_sweep"), response=SweepOut, summary="Strengths and texts")
def sweep_detail(request: HttpRequest, pk: int) -> Any:
    return sweep_out(pk)


RESIDENT: Any = {
    "host": "lab1", "pid": 4021, "kind": "model", "name": "SmolLM2-135M", "n_bytes": 538060288, "budget": 12884901888,
    "used_at": "2026-11-22T08:00:00Z",
}  # fmt: skip


class ResidentOut(Schema):
    """A model or SAE that a live worker keeps in memory."""

    model_config = ConfigDict(json_schema_extra={"examples": [RESIDENT]})

    host: str
    pid: int
    kind: str
    name: str
    n_bytes: int
    budget: int
    used_at: Any


@router.get("/residents", auth=Needs("inference.view_resident"), response=Page[ResidentOut], summary="What is loaded")
def resident_list(request: HttpRequest, limit: int = LIMIT, offset: int = OFFSET) -> Any:
    """Models and SAEs that are warm, as each live worker last wrote it."""
    return page(Resident.objects.values(*RESIDENT), limit, offset, dict)
