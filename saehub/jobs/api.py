"""Jobs in /api/v1: everything long is one; how it stands, what it said, how it ended, and its end."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from django.http import HttpRequest
from django.shortcuts import get_object_or_404
from django.urls import reverse
from ninja import Field, Query, Router, Schema
from pydantic import ConfigDict

from saehub.accounts.access import allowed
from saehub.accounts.api_access import Needs, Problem, require_own
from saehub.accounts.api_pages import LIMIT, OFFSET, Page, page
from saehub.accounts.idempotency import keyed
from saehub.jobs.kinds import KINDS
from saehub.jobs.models import Job, State
from saehub.jobs.runner import summary
from saehub.jobs.starting import LONGEST_WAIT, over

router = Router(tags=["Jobs"])
TAIL = 20
EXAMPLE: Any = {
    "id": 41, "job_id": 41, "kind": "train", "title": "Train an SAE: gpt2-layer4-topk32-6144", "state": "running",
    "status": "running", "queue": "gpu", "queue_position": None, "done": 300, "total": 489, "unit": "steps", "step": "",
    "progress": 0.613, "rate": 11.2, "seconds": 27.1, "seconds_left": 16.9, "attempt": 1, "owner": "ada",
    "params": {"run": 7}, "result": {}, "error": "", "hint": "", "sae_id": None, "sae_path": None,
    "metadata_path": None, "created_at": "2026-11-22T08:00:00Z", "started_at": "2026-11-22T08:00:01Z",
    "finished_at": None,
}  # fmt: skip
LINE: Any = {"at": "2026-11-22T08:00:01Z", "text": "Training on cpu"}


class JobOut(Schema):
    """How a job stands. `status`, `job_id` and `progress` are other words for `state`, `id` and done / total."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})

    id: int
    job_id: int
    kind: str
    title: str
    state: str
    status: str
    queue: str
    queue_position: int | None = None
    done: int
    total: int | None
    unit: str
    step: str
    progress: float | None
    rate: float | None
    seconds: float | None
    seconds_left: float | None
    attempt: int
    owner: str | None
    params: dict[str, Any]
    result: dict[str, Any] = Field(description="What it made, once it is done: ids, and the paths of files")
    error: str
    hint: str
    sae_id: int | None = Field(description="The SAE it works on, or made")
    sae_path: str | None = Field(description="Address of that SAE in this API")
    metadata_path: str | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class LineOut(Schema):
    """A line of a job's log."""

    model_config = ConfigDict(json_schema_extra={"examples": [LINE]})

    at: datetime
    text: str


class JobDetail(JobOut):
    """A job with the last lines of its log, and the trace of its failure."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [EXAMPLE | {"logs": ["Training on cpu"], "traceback": ""}]}
    )

    logs: list[str]
    traceback: str


def job_out(job: Job) -> dict[str, Any]:
    """A job as JSON."""
    sae = job.result.get("sae_id") or job.params.get("sae")
    return summary(job) | {
        "job_id": job.pk,
        "status": job.state,
        "queue": job.queue,
        "queue_position": job.queue_position,
        "progress": job.fraction,
        "seconds": job.seconds,
        "seconds_left": job.seconds_left,
        "owner": job.owner.get_username() if job.owner else None,
        "sae_id": sae,
        "sae_path": reverse("api:sae_detail", args=[sae]) if sae else None,
        "metadata_path": reverse("api:sae_metadata", args=[sae]) if sae else None,
    }


def job_detail_out(job: Job) -> dict[str, Any]:
    return job_out(job) | {"logs": [line.text for line in job.log_tail(TAIL)], "traceback": job.traceback}


def _job(pk: int) -> Job:
    return get_object_or_404(Job.objects.select_related("owner"), pk=pk)


@router.get("/jobs", auth=Needs("jobs.view_job"), response=Page[JobOut], summary="List jobs, newest first")
def job_list(
    request: HttpRequest,
    state: State | None = Query(None, description="queued, running, done, cancelled, failed"),
    kind: str = Query("", description=f"One of {', '.join(KINDS)}"),
    sae_id: int | None = Query(None, description="Jobs on this SAE"),
    mine: bool = Query(False, description="Only one's own"),
    limit: int = LIMIT,
    offset: int = OFFSET,
) -> Any:
    wanted: dict[str, Any] = {
        "state": state,
        "kind": kind,
        "params__sae": sae_id,
        "owner": request.user if mine else None,
    }
    jobs = (
        Job.objects.placed().select_related("owner").filter(**{name: value for name, value in wanted.items() if value})
    )
    return page(jobs, limit, offset, job_out)


@router.get("/jobs/{int:pk}", auth=Needs("jobs.view_job"), response=JobDetail, summary="How a job stands")
def job_detail(
    request: HttpRequest,
    pk: int,
    wait: float = Query(0, ge=0, le=LONGEST_WAIT, description="Seconds to wait for its end"),
) -> Any:
    if wait:
        over([pk], wait)
    return job_detail_out(_job(pk))


@router.get("/jobs/{int:pk}/lines", auth=Needs("jobs.view_job"), response=Page[LineOut], summary="Its log")
def job_lines(request: HttpRequest, pk: int, limit: int = LIMIT, offset: int = OFFSET) -> Any:
    return page(_job(pk).lines.all(), limit, offset, lambda line: {"at": line.at, "text": line.text})


@router.post("/jobs/{int:pk}/cancel", auth=Needs("jobs.cancel_job"), response=JobDetail, summary="End it")
def job_cancel(request: HttpRequest, pk: int) -> Any:
    """A queued job ends at once, a running one within seconds; one that is over stays as it is."""
    job = _job(pk)
    require_own(request, "jobs.cancel_job", job)
    job.cancel()
    return job_detail_out(_job(pk))


@router.post("/jobs/{int:pk}/retry", auth=Needs("jobs.cancel_job"), response=JobDetail, summary="Try it again")
@keyed
def job_retry(request: HttpRequest, pk: int) -> Any:
    """Queues a failed or cancelled job again; what it had finished is not done twice. 409 for any other."""
    job = _job(pk)
    require_own(request, "jobs.cancel_job", job)
    if not allowed(request.user, job.kind_row.permission):
        raise Problem(403, f"Trying this again needs {job.kind_row.permission}.")
    if not job.retry():
        gone = " and what it worked on is not here any more" if job.state in (State.FAILED, State.CANCELLED) else ""
        raise Problem(409, f"Only a failed or cancelled job can be tried again; this one is {job.state}{gone}.")
    return job_detail_out(_job(pk))
