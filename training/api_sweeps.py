"""Training sweeps in /api/v1: several SAEs on one stream of activations."""

from __future__ import annotations

from typing import Any

from django.db.models import Count, Q
from django.http import HttpRequest
from django.shortcuts import get_object_or_404
from ninja import Field, Query, Router, Schema
from pydantic import ConfigDict

from saehub.accounts.api_access import Needs, Problem, require_own
from saehub.accounts.api_pages import LIMIT, OFFSET, Page, like, page
from saehub.jobs.starting import starts
from training.api_train import TrainIn, bound_form
from training.curves import SweepRow, sweep_rows
from training.models import Sweep
from training.run_document import of_sweep

router = Router(tags=["Training"])
SWEEP: Any = {
    "id": 3, "name": "smollm2-135m topk sweep", "job_id": 43, "job_ids": [43], "status": "running", "progress": 0.4,
    "activations_id": 5, "grid": {"k": [16, 32], "d_sae": [4608]}, "n_runs": 2, "n_ready": 0, "seconds": None,
    "owner": "ada", "created_at": "2026-11-22T08:00:00Z", "error": "",
}  # fmt: skip
SWEPT: Any = {
    "run_id": 8, "values": {"k": 16}, "status": "running", "step": 300, "tokens": 614400, "loss": 0.21, "l0": 16.0,
    "explained_variance": 0.78, "dead_features": 12, "evaluated": False, "sae_id": None,
}  # fmt: skip


class TrainSweepIn(TrainIn):
    """As for one run; a field with several values, or several layers, makes a run for each of their combinations."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"activations_id": 5, "sae_kwargs": {"k": [16, 32]}, "hyperparams": {"n_tokens": 1000000}}]
        },
    )

    layers: list[str] = Field(default_factory=list, max_length=100, description="More hook points, or `all`")


class TrainSweepOut(Schema):
    """A sweep. `grid` holds the values its runs differ in."""

    model_config = ConfigDict(json_schema_extra={"examples": [SWEEP]})

    id: int
    name: str
    job_id: int | None
    job_ids: list[int]
    status: str
    progress: float | None
    activations_id: int
    grid: dict[str, Any]
    n_runs: int
    n_ready: int
    seconds: float | None
    owner: str | None
    created_at: Any
    error: str


class TrainSweepDetail(TrainSweepOut):
    """With each of its runs: its own values, and its figures as they stand."""

    model_config = ConfigDict(json_schema_extra={"examples": [SWEEP | {"runs": [SWEPT]}]})

    runs: list[dict[str, Any]]


def _sweeps() -> Any:
    counts = {"n_runs": Count("runs"), "n_ready": Count("runs", filter=Q(runs__ready_at__isnull=False))}
    return Sweep.objects.select_related("job", "owner").annotate(**counts)


def sweep_out(row: Any) -> dict[str, Any]:
    names = ("id", "name", "job_id", "grid", "n_runs", "n_ready", "seconds", "created_at")
    return {name: getattr(row, name) for name in names} | {
        "job_ids": [row.job_id] if row.busy else [],
        "status": row.job.state if row.job else row.state,
        "progress": row.job.fraction if row.job else None,
        "activations_id": row.capture_id,
        "owner": row.owner.get_username() if row.owner else None,
        "error": row.job.error if row.job else "",
    }


def _detail(pk: Any) -> dict[str, Any]:
    row = get_object_or_404(_sweeps(), pk=pk)
    return sweep_out(row) | {"runs": [_swept(row, one) for one in sweep_rows(row)]}


def _swept(sweep: Sweep, row: SweepRow) -> dict[str, Any]:
    names = ("step", "tokens", "loss", "l0", "explained_variance", "evaluated")
    given = row.run.config | {"hook_name": row.run.hook_name}
    return {name: getattr(row, name) for name in names} | {
        "run_id": row.run.pk,
        "values": {name: given.get(name) for name in sweep.grid},
        "status": row.run.state,
        "dead_features": row.dead,
        "sae_id": row.run.sae_id,
    }


@router.post(
    "/train/sweeps",
    auth=Needs("training.add_run"),
    response={200: TrainSweepDetail, 202: TrainSweepDetail},
    summary="Train several SAEs side by side",
)
@starts(_detail)
def sweep_create(request: HttpRequest, given: TrainSweepIn) -> Any:
    """One job reads the activations once for all of them. 422 where only one run is meant."""
    layers = [*([given.layer] if given.layer else []), *given.layers] if given.layers else []
    if given.layers and not given.layer and given.layers != ["all"]:
        given.layer = layers[0]
    form = bound_form(request, given, more_hooks=", ".join(layers))
    if not form.is_sweep:
        raise Problem(422, "That is one SAE; give several values, or ask for it with POST /train.")
    return form.make().pk


@router.get("/train/sweeps", auth=Needs("training.view_sweep"), response=Page[TrainSweepOut], summary="Training sweeps")
def sweep_list(
    request: HttpRequest,
    activations_id: int | None = Query(None, description="On these activations"),
    q: str = "",
    limit: int = LIMIT,
    offset: int = OFFSET,
) -> Any:
    rows = _sweeps().filter(name__icontains=q)
    return page(rows.filter(capture=activations_id) if activations_id is not None else rows, limit, offset, sweep_out)


@router.get(
    "/train/sweeps/{int:pk}", auth=Needs("training.view_sweep"), response=TrainSweepDetail, summary="How a sweep stands"
)
def sweep_status(request: HttpRequest, pk: int) -> Any:
    return _detail(pk)


@router.post(
    "/train/sweeps/{int:pk}/stop", auth=Needs("training.add_sweep"), response=TrainSweepDetail, summary="Stop and keep"
)
def sweep_stop(request: HttpRequest, pk: int) -> Any:
    """Every run that goes on ends at its next step, and what it has trained becomes an SAE. 409 where nothing is trained
    yet."""
    if not _own(request, pk).stop(request.user):
        raise Problem(409, "None of its runs has trained anything yet, so there is nothing to keep.")
    return _detail(pk)


@router.post(
    "/train/sweeps/{int:pk}/pause", auth=Needs("training.add_sweep"), response=TrainSweepDetail, summary="Pause"
)
def sweep_pause(request: HttpRequest, pk: int) -> Any:
    """Every run that goes on ends at its next step with a checkpoint; those that are queued leave the queue at once."""
    _own(request, pk).pause()
    return _detail(pk)


@router.post(
    "/train/sweeps/{int:pk}/resume",
    auth=Needs("training.add_sweep"),
    response={200: TrainSweepDetail, 202: TrainSweepDetail},
    summary="Go on from the checkpoints",
)
@starts(_detail)
def sweep_resume(request: HttpRequest, pk: int) -> Any:
    """Its paused runs, side by side again. 409 where none is paused."""
    if not _own(request, pk).resume(request.user):
        raise Problem(409, "None of its runs is paused.")
    return pk


def _own(request: HttpRequest, pk: int) -> Sweep:
    row: Sweep = get_object_or_404(Sweep.objects.select_related("job"), pk=pk)
    require_own(request, "training.add_sweep", row)
    return row


@router.get(
    "/train/sweeps/{int:pk}/document",
    auth=Needs("training.view_sweep"),
    response=like({"capture": 5, "hook_name": "blocks.9.hook_resid_post", "architecture": "topk", "k": [16, 32]}),
    summary="The document that trains it again",
)
def sweep_document(request: HttpRequest, pk: int) -> Any:
    """For `document` of POST /train/sweeps."""
    row = get_object_or_404(Sweep, pk=pk)
    if not row.runs.exists():
        raise Problem(404, "This sweep has no runs any more.")
    return of_sweep(row)
