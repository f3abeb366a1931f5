"""Training in /api/v1: started from saved activations, watched, paused, stopped; and what SAE classes there are."""

from __future__ import annotations

from typing import Any

from django import forms
from django.http import HttpRequest
from django.shortcuts import get_object_or_404
from ninja import Field, Query, Router, Schema
from pydantic import ConfigDict

from saehub.accounts.api_access import Needs, Problem, require_own
from saehub.accounts.api_pages import LIMIT, OFFSET, Page, like, page
from saehub.jobs.api import TAIL
from saehub.jobs.starting import starts
from saes.api_forms import laid_over, refuse
from saes.models import SAE
from training.models import Capture, Run, RunPoint
from training.run_document import DocumentError, form_of, from_yaml, of_run, said, to_yaml
from training.run_form import RunForm
from training.sweep_form import NumbersField

router = Router(tags=["Training"])
PEERS = {"TopKSae": "topk", "L1Sae": "standard"}  # class names of mi_crow
PEER_FIELDS = {"l1_lambda": "l1_coefficient", "clip_grad": "clip", "learning_rate": "lr", "n_latents": "d_sae"}
RUN: Any = {
    "id": 7, "name": "smollm2-135m-layer9-topk32-4608", "job_id": 41, "job_ids": [41], "status": "running",
    "progress": 0.613, "activations_id": 5, "model_id": 1, "layer": "blocks.9.hook_resid_post", "layer_out": "", "sae_class": "topk",
    "config": {"d_sae": 4608, "k": 32, "n_tokens": 1000000}, "sae_id": None, "sae_path": None, "metadata_path": None,
    "seconds": None, "tokens": None, "owner": "ada", "created_at": "2026-11-22T08:00:00Z", "error": "",
}  # fmt: skip
POINT: Any = {"step": 300, "tokens": 614400, "values": {"explained_variance": 0.81, "l0": 32.0, "loss": 0.19}}


class RunOut(Schema):
    """A training run. `layer` is the hook point; `sae_id` is there once it is done, with the addresses that go with it."""

    model_config = ConfigDict(json_schema_extra={"examples": [RUN]})

    id: int
    name: str
    job_id: int | None
    job_ids: list[int]
    status: str
    progress: float | None
    activations_id: int
    model_id: int
    layer: str
    layer_out: str = Field(description="What a transcoder predicts")
    sae_class: str
    config: dict[str, Any]
    sae_id: int | None
    sae_path: str | None
    metadata_path: str | None
    seconds: float | None
    tokens: int | None
    owner: str | None
    created_at: Any
    error: str


class PointOut(Schema):
    """A point of the curves."""

    model_config = ConfigDict(json_schema_extra={"examples": [POINT]})

    step: int
    tokens: int
    values: dict[str, Any]


class RunDetail(RunOut):
    """With the last lines of its log and its metrics so far."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [RUN | {"logs": ["Training"], "metrics": POINT["values"], "step": 300}]}
    )

    logs: list[str]
    metrics: dict[str, Any] = Field(description="Of the newest point")
    step: int | None


class TrainIn(Schema):
    """What to train on what. Everything that is left out is as on the page; /saes/classes lists the fields."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "activations_id": 5,
                    "layer": "blocks.9.hook_resid_post",
                    "sae_class": "topk",
                    "sae_kwargs": {"k": 32},
                    "n_latents": 4608,
                    "hyperparams": {"n_tokens": 1000000, "lr": 0.001},
                }
            ]
        },
    )

    activations_id: int | None = Field(None, description="Of a run without a document")
    layer: str = Field("", max_length=200, description="The first of the activations when left out")
    sae_class: str = Field("topk", max_length=40, description="One of /saes/classes, or TopKSae, L1Sae")
    sae_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Fields of the class, such as k; hook_name_out of a transcoder"
    )
    n_latents: int | list[int] | None = Field(None, description="Features (d_sae)")
    hyperparams: dict[str, Any] = Field(default_factory=dict, description="Fields of the trainer")
    training_config: dict[str, Any] = Field(default_factory=dict, description="Another name of hyperparams")
    run_id: str = Field("", max_length=120, description="A name for the run and its SAE")
    document: dict[str, Any] | str | None = Field(
        None, description="All of it as one document, as /train/{id}/document gives it: YAML, or its keys and values"
    )


class FieldOut(Schema):
    """A field of a training run."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"name": "k", "label": "k, features per token", "type": "integer", "default": 32, "minimum": 1,
                 "maximum": None, "help": ""}
            ]
        }
    )  # fmt: skip

    name: str
    label: str
    type: str
    default: Any
    minimum: float | None
    maximum: float | None
    help: str


class ClassOut(Schema):
    """An SAE class that can be trained, with the fields it is asked."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"name": "topk", "description": "TopK: the k largest features of each token", "aliases": ["TopKSae"],
                 "fields": [{"name": "k", "label": "k, features per token", "type": "integer", "default": 32,
                             "minimum": 1, "maximum": None, "help": ""}]}
            ]
        }
    )  # fmt: skip

    name: str
    description: str
    aliases: list[str]
    fields: list[FieldOut]


def run_out(row: Run) -> dict[str, Any]:
    """A training run in a list."""
    sae = row.sae_id
    return {name: getattr(row, name) for name in ("id", "name", "job_id", "config", "sae_id", "seconds", "tokens")} | {
        "job_ids": [row.job_id] if row.busy else [],
        "status": row.state if row.state == "paused" or not row.job else row.job.state,
        "progress": row.job.fraction if row.job else None,
        "activations_id": row.capture_id,
        "model_id": row.capture.model_id,
        "layer": row.hook_name,
        "layer_out": row.hook_name_out,
        "sae_class": row.architecture,
        "sae_path": f"/api/v1/saes/{sae}" if sae else None,
        "metadata_path": f"/api/v1/saes/{sae}/metadata" if sae else None,
        "owner": row.owner.get_username() if row.owner else None,
        "created_at": row.created_at,
        "error": row.job.error if row.job else "",
    }


def _runs() -> Any:
    return Run.objects.select_related("capture", "owner", "job")


def _detail(pk: Any) -> dict[str, Any]:
    row = get_object_or_404(_runs(), pk=pk)
    last: RunPoint | None = row.points.last()
    return run_out(row) | {
        "logs": [line.text for line in row.job.log_tail(TAIL)] if row.job else [],
        "metrics": last.values if last else {},
        "step": last.step if last else None,
    }


@router.get("/saes/classes", auth=Needs("training.view_run"), response=Page[ClassOut], summary="SAE classes to train")
def sae_classes(request: HttpRequest, limit: int = LIMIT, offset: int = OFFSET) -> Any:
    """Each with the fields that `sae_kwargs` and `hyperparams` of /train take."""
    form = RunForm(user=request.user)
    own = {name: values for name, (of, values) in form.only_with.items() if of == "architecture"}
    shared = [name for name in form.fields if name not in own and name not in ("source", "architecture", "name")]

    def shown(choice: tuple[str, str]) -> dict[str, Any]:
        name, words = choice
        fields = [*(one for one, values in own.items() if name in values), *shared]
        aliases = [alias for alias, of in PEERS.items() if of == name]
        told = {"name": name, "description": str(words), "aliases": aliases}
        return told | {"fields": [_field(form, one) for one in fields]}

    field: Any = form.fields["architecture"]
    return page(list(field.choices), limit, offset, shown)


def _field(form: RunForm, name: str) -> dict[str, Any]:
    field = form.fields[name]
    kinds = ((forms.BooleanField, "boolean"), (forms.IntegerField, "integer"), (forms.FloatField, "number"))
    # FloatField is an IntegerField to Django, so it is asked first
    kind = next(
        (word for of, word in sorted(kinds, key=lambda one: one[1] != "number") if isinstance(field, of)), "string"
    )
    if isinstance(field, NumbersField):
        kind = "integer" if field.kind is int else "number"
    default = form.get_initial_for_field(field, name)
    return {
        "name": name,
        "label": str(field.label),
        "type": kind,
        "default": default if isinstance(default, bool | int | float | str | None) else str(default),
        "minimum": getattr(field, "min_value", getattr(field, "least", None)),
        "maximum": getattr(field, "max_value", getattr(field, "most", None)),
        "help": str(field.help_text),
    }


@router.post(
    "/train", auth=Needs("training.add_run"), response={200: RunDetail, 202: RunDetail}, summary="Train an SAE"
)
@starts(_detail)
def train(request: HttpRequest, given: TrainIn) -> Any:
    """Queues a job. Its result carries sae_id, sae_path and metadata_path."""
    form = bound_form(request, given)
    if form.is_sweep:
        raise Problem(
            422, f"That are {len(form.points)} SAEs; ask for one at a time, or for all with POST /train/sweeps."
        )
    return form.make().pk


def bound_form(request: HttpRequest, given: TrainIn, more_hooks: str = "") -> RunForm:
    """The valid form of the page that says what is asked for. Raises Problem."""
    if given.document is not None:
        return _of_document(request, given)
    capture = Capture.objects.ready().filter(pk=given.activations_id or 0).first()
    if capture is None:
        raise Problem(422, f"activations_id: there are no finished activations {given.activations_id}.")
    hook = given.layer or capture.hook_names[0]
    row = capture.model.hook(hook)
    hook = row["name"] if row and row["name"] in capture.hook_names else hook
    fields = {PEER_FIELDS.get(name, name): _typed(value) for name, value in _all_of(given).items()}
    fixed = {"source": f"{capture.pk}:{hook}", "architecture": PEERS.get(given.sae_class, given.sae_class)}
    fields |= fixed | {"name": given.run_id}
    fields |= {"d_sae": _typed(given.n_latents)} if given.n_latents is not None else {}
    fields |= {"more_hooks": more_hooks} if more_hooks else {}
    form = RunForm(laid_over(RunForm(user=request.user), fields), user=request.user)
    names = {
        "source": "layer",
        "architecture": "sae_class",
        "d_sae": "n_latents",
        "name": "run_id",
        "more_hooks": "layers",
    }
    refuse(form, names)
    return form


def _of_document(request: HttpRequest, given: TrainIn) -> RunForm:
    if given.model_fields_set - {"document"}:
        raise Problem(422, "A document says everything; give nothing beside it.")
    text = given.document if isinstance(given.document, str) else to_yaml(given.document or {})
    try:
        form = form_of(from_yaml(text), request.user)
    except DocumentError as error:
        raise Problem(422, f"document: {error}", errors={"document": [str(error)]}) from None
    if not form.is_valid():
        sentences = said(form)
        raise Problem(422, f"document: {sentences[0]}", errors={"document": sentences})
    return form


def _typed(value: Any) -> Any:
    """Several values of a field, as a person would type them."""
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def _all_of(given: TrainIn) -> dict[str, Any]:
    """The fields of the three places they may stand in. Raises Problem where two of them disagree."""
    fields: dict[str, Any] = {}
    for part in (given.sae_kwargs, given.hyperparams, given.training_config):
        for name, value in part.items():
            if name in fields and fields[name] != value:
                raise Problem(422, f"{name} is given twice, as {fields[name]} and as {value}.")
            fields[name] = value
    return fields


@router.get("/train", auth=Needs("training.view_run"), response=Page[RunOut], summary="Training runs")
def train_list(
    request: HttpRequest,
    activations_id: int | None = Query(None, description="On these activations"),
    q: str = "",
    limit: int = LIMIT,
    offset: int = OFFSET,
) -> Any:
    rows = _runs().filter(name__icontains=q)
    return page(rows.filter(capture=activations_id) if activations_id is not None else rows, limit, offset, run_out)


@router.get("/train/{int:pk}", auth=Needs("training.view_run"), response=RunDetail, summary="How a run stands")
def train_status(request: HttpRequest, pk: int) -> Any:
    return _detail(pk)


@router.get("/train/{int:pk}/points", auth=Needs("training.view_run"), response=Page[PointOut], summary="Its curves")
def train_points(request: HttpRequest, pk: int, limit: int = LIMIT, offset: int = OFFSET) -> Any:
    points = get_object_or_404(Run, pk=pk).points.all()
    return page(points, limit, offset, lambda one: {"step": one.step, "tokens": one.tokens, "values": one.values})


@router.post("/train/{int:pk}/cancel", auth=Needs("jobs.cancel_job"), response=RunDetail, summary="Cancel a run")
def train_cancel(request: HttpRequest, pk: int) -> Any:
    """Ends it without an SAE. Its checkpoint stays, and /jobs/{id}/retry goes on from there."""
    row = get_object_or_404(_runs(), pk=pk)
    if row.job is None:
        raise Problem(409, "This run has no job.")
    require_own(request, "jobs.cancel_job", row.job)
    row.job.cancel()
    return _detail(pk)


def _own(request: HttpRequest, pk: int) -> Run:
    row: Run = get_object_or_404(_runs(), pk=pk)
    require_own(request, "training.add_run", row)
    return row


@router.post("/train/{int:pk}/stop", auth=Needs("training.add_run"), response=RunDetail, summary="Stop and keep")
def train_stop(request: HttpRequest, pk: int) -> Any:
    """Ends it at its next step; what it has trained becomes an SAE. One that is paused, failed or cancelled is kept as
    its checkpoint has it. 409 where there is nothing to keep."""
    row = _own(request, pk)
    if row.ready:
        raise Problem(409, "This run is finished already.")
    if not row.stop(request.user):
        raise Problem(409, "This run has no checkpoint yet, so there is nothing to keep.")
    return _detail(pk)


@router.post("/train/{int:pk}/pause", auth=Needs("training.add_run"), response=RunDetail, summary="Pause")
def train_pause(request: HttpRequest, pk: int) -> Any:
    """Ends it at its next step with a checkpoint, and its worker is free; one that is queued leaves the queue at once.
    `status` is `paused` then."""
    row = _own(request, pk)
    if not row.pause():
        raise Problem(409, "This run is not going on, so there is nothing to pause.")
    return _detail(pk)


@router.post(
    "/train/{int:pk}/resume",
    auth=Needs("training.add_run"),
    response={200: RunDetail, 202: RunDetail},
    summary="Go on from the checkpoint",
)
@starts(_detail)
def train_resume(request: HttpRequest, pk: int) -> Any:
    """Of a paused run. 409 for any other."""
    row = _own(request, pk)
    if row.state != "paused":
        raise Problem(409, f"Only a paused run can go on; this one is {row.state}.")
    row.resume(request.user)
    return pk


@router.get(
    "/train/{int:pk}/document",
    auth=Needs("training.view_run"),
    response=like({"capture": 5, "hook_name": "blocks.9.hook_resid_post", "architecture": "topk", "k": 32}),
    summary="The document that trains it again",
)
def train_document(request: HttpRequest, pk: int) -> Any:
    """For `document` of POST /train, here or on another instance that holds the capture."""
    return of_run(get_object_or_404(Run.objects.select_related("capture__corpus"), pk=pk))


# ------------------------------------------------------------------------------------------------------- an SAE's origin

METADATA: Any = {
    "sae_id": 12, "name": "smollm2-135m-layer9-topk32-4608", "sae_class": "topk", "sae_kwargs": {"k": 32},
    "n_latents": 4608, "hidden_dim": 576, "layer": "blocks.9.hook_resid_post", "model_id": 1, "model": "SmolLM2-135M",
    "run_id": 7, "activations_id": 5, "manifest": {"n_tokens": 1000000},
    "training": {"config": {"n_tokens": 1000000}, "history": [POINT], "duration_sec": 43.0},
    "metrics": {"explained_variance": {"value": 0.81, "definition": "explained_variance/1", "n": 4096}},
    "config": {"architecture": "topk", "d_in": 576, "d_sae": 4608}, "sae_path": "/api/v1/saes/12",
    "created_at": "2026-11-22T08:00:00Z",
}  # fmt: skip


class Metadata(Schema):
    """Where an SAE comes from: its config, and of one that was trained here the run, history, metrics and manifest."""

    model_config = ConfigDict(json_schema_extra={"examples": [METADATA]})

    sae_id: int
    name: str
    sae_class: str
    sae_kwargs: dict[str, Any]
    n_latents: int | None
    hidden_dim: int | None
    layer: str
    model_id: int | None
    model: str
    run_id: int | None
    activations_id: int | None
    manifest: dict[str, Any]
    training: dict[str, Any] | None
    metrics: dict[str, Any]
    config: dict[str, Any]
    sae_path: str
    created_at: Any


@router.get(
    "/saes/{int:pk}/metadata", auth=Needs("saes.view_sae"), response=Metadata, summary="Where an SAE comes from"
)
def sae_metadata(request: HttpRequest, pk: int) -> Any:
    sae = get_object_or_404(SAE.objects.select_related("model", "run__capture"), pk=pk)
    run: Run | None = getattr(sae, "run", None)
    points = [{"step": one.step, "tokens": one.tokens, "values": one.values} for one in run.points.all()] if run else []
    return {
        "sae_id": sae.pk,
        "name": sae.name,
        "sae_class": sae.architecture,
        "sae_kwargs": {"k": sae.k} if sae.k else {},
        "n_latents": sae.d_sae,
        "hidden_dim": sae.d_in,
        "layer": sae.hook_name,
        "model_id": sae.model_id,
        "model": sae.model_name,
        "run_id": run.pk if run else None,
        "activations_id": run.capture_id if run else None,
        "manifest": run.capture.manifest if run else {},
        "training": {"config": run.config, "history": points, "duration_sec": run.seconds} if run else None,
        "metrics": sae.metrics,
        "config": sae.config,
        "sae_path": f"/api/v1/saes/{sae.pk}",
        "created_at": sae.created_at,
    }
