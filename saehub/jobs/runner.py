"""run(job_id): the one way a job is executed. Claims it, runs its function, and always says how it ended."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from django.conf import settings
from django.db import connection

from saehub.causes import disk_is_full, memory_ran_out
from saehub.jobs.models import Job, State, ended_early, lease
from saehub.jobs.processes import name_process
from saehub.jobs.progress import Cancelled, LeaseLost, Progress
from saehub.jobs.server import LOST, JobProcess
from saehub.plain import plain

log = logging.getLogger(__name__)
DELETED = "job %s: was deleted while it ran, stopped"
CANCEL_GRACE = 2.0  # seconds a cancelled child has to tidy up before it is killed


def worker_name() -> str:
    """Which worker process group we belong to; `manage.py work` sets it for its cluster."""
    return os.environ.get("SAEHUB_WORKER", f"{socket.gethostname()}:{os.getpid()}")


def run(job_id: int) -> None:
    """Entry point of the queue's workers. A second delivery of the same id does nothing."""
    job = Job.objects.claim(job_id, worker_name())
    if job is None:
        return
    job.announce()
    name_process(f"for job {job.pk}")
    with heartbeat(job):
        if job.kind_row.in_child:
            supervise(job)
        else:
            execute(job)
    name_process("waits for a job")


def supervise(job: Job) -> None:
    """Run the job in a process of its own; end it on cancel, and notice when it dies without a word."""
    assert job.token is not None  # of the claim
    child = JobProcess(job.pk, job.token.bytes)
    asked: float | None = None
    while not child.wait(0.2):
        row = Job.objects.filter(job.holding()).values("cancel_at").first()
        if row is None or row["cancel_at"]:  # finished and about to exit, taken from us, deleted, or to be cancelled
            asked = asked or time.monotonic()
        if asked and time.monotonic() - asked > CANCEL_GRACE:
            child.kill()
    if row := Job.objects.filter(job.holding()).values("cancel_at").first():
        job.cancel_at = row["cancel_at"]
        job.give_up(_how_it_died(child.returncode or 0))
        job.announce()
    elif child.returncode and not Job.objects.filter(pk=job.pk).exists():  # a process that ends by itself has said it
        log.warning(DELETED, job.pk)


def _how_it_died(code: int) -> str:
    if code == LOST:
        return "The server of the job's process was ended."
    if code == -signal.SIGKILL:
        return "The job's process was killed, by a person or because memory ran out."
    if code < 0:
        return f"The job's process was ended by signal {-code}."
    return f"The job's process ended with code {code} without a result."


def execute(job: Job) -> None:
    """Call the kind's function here and write how it ended."""
    progress = Progress(job)
    try:
        result = job.kind_row.function()(progress, **job.params)
        job.finish(State.DONE, result=plain(result), done=_done(job, result), step="")
    except Cancelled:
        job.finish(State.CANCELLED)
    except LeaseLost:
        there = Job.objects.filter(pk=job.pk).exists()
        log.warning("job %s: lease lost, stopped" if there else DELETED, job.pk)
    except BaseException as error:
        said = {"error": sentence(error), "hint": hint(error), "traceback": traceback.format_exc()}
        job.finish(State.FAILED, **plain(said))
        if not isinstance(error, Exception):
            raise
    finally:
        job.announce()


def _done(job: Job, result: dict[str, Any]) -> int:
    """All of it, unless the job says that it ended before: then what it has reached."""
    total, done = Job.objects.filter(pk=job.pk).values_list("total", "done").first() or (0, 0)
    return done if ended_early(result) else total or done


@contextmanager
def heartbeat(job: Job) -> Iterator[None]:
    """Renew the job's lease for as long as this worker lives and works on it, whatever the function is busy with."""
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(settings.JOB_LEASE_SECONDS / 5):
            if not Job.objects.filter(job.holding()).update(lease_until=lease()):
                break  # over, or no longer ours
        connection.close()

    threading.Thread(target=beat, daemon=True, name=f"heartbeat-{job.pk}").start()
    try:
        yield
    finally:
        stop.set()


def sentence(error: BaseException) -> str:
    """One plain sentence for the card. Errors of ours carry one; the others are named by type."""
    if disk_is_full(error):
        return "The disk is full."
    if memory_ran_out(error):
        return "Memory ran out."
    text = str(error).strip().splitlines()[0] if str(error).strip() else ""
    if isinstance(error, ValueError | OSError) or hasattr(error, "hint"):
        return text or type(error).__name__
    return f"Unexpected {type(error).__name__}: {text}" if text else f"Unexpected {type(error).__name__}."


def hint(error: BaseException) -> str:
    if disk_is_full(error):
        return "Free some space under the data folder, then press Retry."
    if memory_ran_out(error):
        return "Choose a smaller batch, a smaller model or fewer features, then press Retry."
    return str(getattr(error, "hint", ""))


def sweep() -> int:
    """Take up what dead workers left, and offer again what the queue lost. Safe from any number of processes at once."""
    from saehub.jobs.queue import pushed

    found = 0
    for job in Job.objects.stale():
        found += job.give_up(f"Worker {job.worker} has not been heard of for {settings.JOB_LEASE_SECONDS} s.")
        job.announce()
    for queue in Job.objects.filter(state=State.QUEUED).values_list("queue", flat=True).distinct():
        names = pushed(queue)
        for job in Job.objects.filter(state=State.QUEUED, queue=queue):
            if f"job-{job.pk}" not in names and Job.objects.filter(pk=job.pk, state=State.QUEUED).exists():
                job.offer()
                found += 1
    return found


def release(worker: str, reason: str) -> None:
    """Give back the jobs of a worker that was stopped in order, and kill nothing: its processes are gone already."""
    for job in Job.objects.filter(worker=worker, state=State.RUNNING):
        job.give_up(reason, count=False)
        job.announce()


def summary(job: Job) -> dict[str, Any]:
    """The job as JSON, for the API and `--json`."""
    return {
        "id": job.pk, "kind": job.kind, "title": job.title, "state": job.state, "done": job.done, "total": job.total,
        "unit": job.unit, "step": job.step, "rate": job.rate, "attempt": job.attempt, "params": job.params,
        "result": job.result, "error": job.error, "hint": job.hint, "created_at": job.created_at,
        "started_at": job.started_at, "finished_at": job.finished_at,
    }  # fmt: skip
