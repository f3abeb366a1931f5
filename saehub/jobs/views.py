"""Pages of jobs: all of them, one card, and what can be done with a job."""

from __future__ import annotations

from typing import Any

from django.contrib import messages
from django.core.paginator import Paginator
from django.db.models import Count
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.utils.functional import SimpleLazyObject
from django.views.decorators.http import require_POST

from saehub.accounts.access import check, needs
from saehub.figures import fig
from saehub.fragments import part
from saehub.jobs.models import LOG_TAIL, Job, State, enqueue
from saehub.jobs.workers import DAYS, machines, queues, running, usage
from saehub.streaming import attachment


def running_jobs(request: HttpRequest) -> dict[str, Any]:
    """Context of every page: how many jobs are on. Asked of the database only by a page that shows it."""
    return {"running_jobs": SimpleLazyObject(lambda: Job.objects.live().count())}


@needs("jobs.view_job")
def job_list(request: HttpRequest) -> HttpResponse:
    counts = dict(Job.objects.order_by().values_list("state").annotate(Count("pk")))
    state = request.GET.get("state", "")
    jobs = Job.objects.select_related("owner")
    if state in State.values:
        jobs = jobs.filter(state=state)
    page = Paginator(jobs, 25).get_page(request.GET.get("page"))
    context = {
        "section": "jobs",
        "page": page,
        "state": state,
        "states": [(value, label, counts.get(value, 0)) for value, label in State.choices],
        "live": any(job.is_live for job in page),
    }
    return render(request, "jobs/job_list.html" + part(request, "rows"), context)


@needs("jobs.view_job")
def job_detail(request: HttpRequest, pk: int) -> HttpResponse:
    """The page of a job; for htmx only its card, the same fragment that the socket sends."""
    job = get_object_or_404(Job.objects.select_related("owner"), pk=pk)
    context: dict[str, Any] = {"section": "jobs", "job": job}
    if part(request, "card"):
        return render(request, "jobs/job_detail.html#card", context)
    lines = list(job.lines.all()[:2000])
    context |= {"lines": lines, "tail": LOG_TAIL, "given": _told(job.params), "gave": _told(job.result)}
    return render(request, "jobs/job_detail.html", context)


@needs("jobs.view_job")
def job_log(request: HttpRequest, pk: int) -> StreamingHttpResponse:
    """The whole log as a text file."""
    job = get_object_or_404(Job, pk=pk)
    lines = (f"{line.at:%Y-%m-%d %H:%M:%S}  {line.text}\n" for line in job.lines.iterator(chunk_size=2000))
    return attachment(request, lines, name=f"job-{job.pk}.log", kind="text/plain")


def _told(values: dict[str, Any]) -> list[tuple[str, Any]]:
    """Parameters and results as a person reads them; their names are those of the code."""
    return [
        (name.replace("_", " "), fig(value) if isinstance(value, float) else value) for name, value in values.items()
    ]


@needs("jobs.view_job")
def worker_list(request: HttpRequest) -> HttpResponse:
    """Who serves the queues, how their machines stand, and what runs there now."""
    context: dict[str, Any] = {"section": "jobs", "queues": queues(), "machines": machines(), "jobs": running()}
    context |= {"used": usage(DAYS), "days": DAYS}
    return render(request, "jobs/worker_list.html" + part(request, "now"), context)


@require_POST
@needs("jobs.view_job", post="jobs.cancel_job")
def job_cancel(request: HttpRequest, pk: int) -> HttpResponse:
    job = get_object_or_404(Job, pk=pk)
    check(request.user, "jobs.cancel_job", job)
    job.cancel()
    return _card(request, job)


@require_POST
@needs("jobs.view_job", post="jobs.cancel_job")
def job_retry(request: HttpRequest, pk: int) -> HttpResponse:
    job = get_object_or_404(Job, pk=pk)
    check(request.user, "jobs.cancel_job", job)
    check(request.user, job.kind_row.permission)
    if not job.retry():
        messages.warning(request, "Only a failed or cancelled job whose subject is still here can be tried again.")
    elif part(request, "card") and _is_on_screen(request, job):
        return HttpResponse(status=204, headers={"HX-Refresh": "true"})  # the rest of it says "failed" still
    return _card(request, job)


def _is_on_screen(request: HttpRequest, job: Job) -> bool:
    """Whether the page that asks is that of what the job works on, which waits for the job only once it is on."""
    shown = str(request.htmx.current_url_abs_path or "").partition("?")[0]  # type: ignore[attr-defined]
    return bool(job.subject_id) and shown == job.subject_url()


def _card(request: HttpRequest, job: Job) -> HttpResponse:
    job.refresh_from_db()
    if part(request, "card"):
        return render(request, "jobs/job_detail.html#card", {"job": job})
    return redirect(job.subject_url())


@needs("jobs.view_job")
def job_running(request: HttpRequest) -> HttpResponse:
    """The count of live jobs in the top bar."""
    return render(request, "base.html#running")


@require_POST
@needs("jobs.add_job")
def job_probe(request: HttpRequest) -> HttpResponse:
    """Queue a job that only counts, to see that the workers answer."""
    return redirect(enqueue("probe", request.user, title="Check the workers", steps=50).get_absolute_url())
