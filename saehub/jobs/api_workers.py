"""Workers and their machines in /api/v1, and the same figures for Prometheus."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from django.http import HttpRequest, HttpResponse
from ninja import Field, Query, Router, Schema
from pydantic import ConfigDict

from saehub.accounts.api_access import Needs
from saehub.accounts.api_pages import LIMIT, OFFSET, Page, page
from saehub.jobs.models import Worker
from saehub.jobs.workers import DAYS, metrics, usage

router = Router(tags=["Jobs"])
EXAMPLE: Any = {
    "name": "gpu-01:4711:gpu", "host": "gpu-01", "queue": "gpu", "processes": 1, "silent": False,
    "started_at": "2026-11-22T08:00:00Z", "seen_at": "2026-11-22T09:30:02Z",
    "machine": {
        "cores": 16, "cpu": 0.31, "memory": {"total": 67108864000, "free": 40000000000},
        "disk": {"total": 2000000000000, "free": 900000000000},
        "gpus": [{"name": "NVIDIA A10", "total": 25769803776, "free": 20971520000, "busy": 0.87}],
    },
}  # fmt: skip
SAMPLE = '# HELP saehub_workers Worker processes of a queue that were heard of.\n# TYPE saehub_workers gauge\nsaehub_workers{queue="gpu"} 1\n'


class WorkerOut(Schema):
    """A `manage.py work` as it last said itself, every five seconds, with how its machine stood then. Sizes in bytes."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})

    name: str
    host: str
    queue: str
    processes: int = Field(description="Jobs that it may do at once")
    silent: bool = Field(description="Not heard of for 20 s: dead, or cut off")
    started_at: datetime
    seen_at: datetime
    machine: dict[str, Any]


@router.get("/workers", auth=Needs("jobs.view_job"), response=Page[WorkerOut], summary="Workers and their machines")
def worker_list(request: HttpRequest, limit: int = LIMIT, offset: int = OFFSET) -> Any:
    return page(Worker.objects.all(), limit, offset, _out)


def _out(worker: Worker) -> dict[str, Any]:
    return {name: getattr(worker, name) for name in EXAMPLE}


USED: Any = {"name": "ada", "seconds": {"gpu": 5400.0, "io": 12.5}, "jobs": 7}


class UsedOut(Schema):
    """What a person's jobs took of the workers' time: the last attempt of each, in seconds by queue."""

    model_config = ConfigDict(json_schema_extra={"examples": [USED]})

    name: str
    seconds: dict[str, float]
    jobs: int


@router.get("/workers/usage", auth=Needs("jobs.view_job"), response=list[UsedOut], summary="Who used the workers")
def worker_usage(
    request: HttpRequest, days: int = Query(DAYS, ge=1, le=3650, description="Of how many days until now")
) -> Any:
    return usage(days)


@router.get(
    "/metrics",
    auth=Needs("jobs.view_job"),
    summary="Workers, jobs and machines for Prometheus",
    openapi_extra={"responses": {200: {"content": {"text/plain": {"schema": {"type": "string"}, "example": SAMPLE}}}}},
)
def metrics_text(request: HttpRequest) -> HttpResponse:
    """Prometheus' text format; its `authorization` takes a token that may only look (`read`)."""
    return HttpResponse(metrics(), content_type="text/plain; version=0.0.4; charset=utf-8")
