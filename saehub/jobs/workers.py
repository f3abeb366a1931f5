"""Who serves the queues, on which machines, and how those stand: for the page, the API, probes and Prometheus.

Each `manage.py work` writes a row about itself every five seconds; what is not heard of for twenty counts as dead. The site's
own machine is measured when it is asked about.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import InterfaceError, OperationalError, connection
from django.db.models import Count, F, Min, Sum, Value
from django.db.models.functions import Coalesce
from django.utils import timezone

from saehub.figures import bytes_text
from saehub.jobs.models import LIVE, UNHEARD, Job, State, Worker
from saehub.machine import standing

BEAT_SECONDS = 5.0
REMEMBERED = timedelta(hours=1)  # a worker of another machine that is not heard of any more
DAYS = 30  # of which the use is told
DOES = {
    "io": "downloads, imports, exports, corpora",
    "gpu": "captures, training, evaluation, harvests",
    "live": "generations and readings, with models kept warm",
}


# -- what a worker says of itself --------------------------------------------------------------------------------------
def beat(name: str, queue: str, started_at: datetime) -> None:
    """Say that this worker is there, and forget those that are not: of this machine at once, of others after an hour."""
    host, now = socket.gethostname(), timezone.now()
    Worker.objects.update_or_create(
        name=name,
        defaults={
            "host": host[:100],
            "queue": queue,
            "processes": settings.QUEUES[queue],
            "started_at": started_at,
            "seen_at": now,
            "machine": standing(Path(settings.DATA_DIR)),
        },
    )
    Worker.objects.filter(host=host, seen_at__lt=now - UNHEARD).delete()
    Worker.objects.filter(seen_at__lt=now - REMEMBERED).delete()


def leave(name: str) -> None:
    """This worker ends in order."""
    Worker.objects.filter(name=name).delete()


# -- what is asked -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Queue:
    """A queue: who serves it, what runs and what waits."""

    name: str
    workers: list[Worker]
    running: int
    waiting: int
    oldest: datetime | None  # since when the first of those waits

    @property
    def does(self) -> str:
        return DOES[self.name]

    @property
    def processes(self) -> int:
        """Jobs that it can do at once."""
        return sum(worker.processes for worker in self.workers)


@dataclass(frozen=True)
class Machine:
    """A machine that serves queues, or this site."""

    host: str
    standing: dict[str, Any]
    seen_at: datetime
    silent: bool = False
    queues: list[str] = field(default_factory=list)
    measures_cpu: bool = True  # the site does not watch its processors

    @property
    def shares(self) -> dict[str, float]:
        """{"memory": share in use, "disk": share in use}."""
        return {name: 1 - self.standing[name]["free"] / self.standing[name]["total"] for name in ("memory", "disk")}

    @property
    def disk_is_low(self) -> bool:
        return bool(self.standing["disk"]["free"] < settings.DISK_RESERVE)


def queues() -> list[Queue]:
    """All queues, with the workers that were heard of lately."""
    heard = [worker for worker in Worker.objects.all() if not worker.silent]
    counts = {
        (queue, state): (n, oldest)
        for queue, state, n, oldest in Job.objects.filter(state__in=LIVE)
        .order_by()
        .values_list("queue", "state")
        .annotate(n=Count("pk"), oldest=Min(Coalesce("offered_at", "created_at")))
    }
    found = []
    for name in settings.QUEUES:
        running, waiting = (counts.get((name, state), (0, None)) for state in (State.RUNNING, State.QUEUED))
        mine = [worker for worker in heard if worker.queue == name]
        found.append(Queue(name, mine, running[0], waiting[0], waiting[1]))
    return found


def machines() -> list[Machine]:
    """Each machine by the newest word of its workers, this site's first."""
    here = socket.gethostname()
    by_host: dict[str, list[Worker]] = {}
    for worker in Worker.objects.all():
        by_host.setdefault(worker.host, []).append(worker)
    found = []
    for host, workers in by_host.items():
        newest = max(workers, key=lambda worker: worker.seen_at)
        served = [worker.queue for worker in workers if not worker.silent]
        found.append(Machine(host, newest.machine, newest.seen_at, newest.silent, served))
    if here not in by_host:
        found.append(Machine(here, standing(Path(settings.DATA_DIR)), timezone.now(), measures_cpu=False))
    return sorted(found, key=lambda machine: (machine.host != here, machine.host))


def running() -> list[Job]:
    """What runs now, the largest first."""
    return list(Job.objects.filter(state=State.RUNNING).select_related("owner").order_by("-memory")[:100])


@dataclass(frozen=True)
class Used:
    """What a person's jobs took of the workers' time, in seconds by queue, and how many they were."""

    name: str
    seconds: dict[str, float]
    jobs: int

    @property
    def by_queue(self) -> list[float]:
        return [self.seconds.get(queue, 0.0) for queue in settings.QUEUES]


def usage(days: int) -> list[Used]:
    """Of the last days, whoever used most of the gpu queue first. Of each job counts its last attempt, also while it runs."""
    now = timezone.now()
    took = Coalesce("finished_at", Value(now)) - F("started_at")
    rows = (
        Job.objects.filter(started_at__gte=now - timedelta(days=days))
        .exclude(state=State.QUEUED)
        .order_by()
        .values_list("owner__username", "queue")
        .annotate(took=Sum(took), n=Count("pk"))
    )
    seconds: dict[str, dict[str, float]] = {}
    jobs: dict[str, int] = {}
    for name, queue, took_then, n in rows:
        name = name or "nobody"
        seconds.setdefault(name, {})[queue] = took_then.total_seconds()
        jobs[name] = jobs.get(name, 0) + n
    found = [Used(name, by_queue, jobs[name]) for name, by_queue in seconds.items()]
    return sorted(found, key=lambda used: (-used.seconds.get("gpu", 0.0), -sum(used.seconds.values()), used.name))


# -- probes ------------------------------------------------------------------------------------------------------------
def troubles() -> list[str]:
    """Why work cannot be done now, one sentence each; none where the site and all of its queues are ready."""
    try:
        connection.ensure_connection()
        found = [f"No worker serves the {queue.name} queue." for queue in queues() if not queue.workers]
    except (InterfaceError, OperationalError):
        return ["The database does not answer."]
    free = shutil.disk_usage(settings.DATA_DIR).free
    if free < settings.DISK_RESERVE:
        found.append(f"The disk of the data folder has only {bytes_text(free)} left.")
    return found


# -- Prometheus --------------------------------------------------------------------------------------------------------
Sample = tuple[dict[str, str], float]


def metrics() -> str:
    """The same as text in Prometheus' exposition format, version 0.0.4."""
    return "\n".join(line for name, says, samples in _families() for line in _family(name, says, samples)) + "\n"


def _families() -> Iterator[tuple[str, str, list[Sample]]]:
    now = timezone.now()
    found = queues()
    for name, says, value in (
        ("workers", "Worker processes of a queue that were heard of.", lambda queue: queue.processes),
        ("jobs_running", "Jobs that run.", lambda queue: queue.running),
        ("jobs_waiting", "Jobs that wait for a worker.", lambda queue: queue.waiting),
        ("oldest_wait_seconds", "How long the first job of a queue has waited.",
         lambda queue: (now - queue.oldest).total_seconds() if queue.oldest else 0),
    ):  # fmt: skip
        yield name, says, [({"queue": queue.name}, value(queue)) for queue in found]
    states = Job.objects.order_by().values_list("kind", "state").annotate(n=Count("pk")).order_by("kind", "state")
    yield "jobs", "Jobs by kind and state.", [({"kind": kind, "state": state}, n) for kind, state, n in states]
    heard = [machine for machine in machines() if not machine.silent]
    cpu = [({"host": one.host}, one.standing["cpu"]) for one in heard if one.measures_cpu]
    yield "cpu_ratio", "Share of a machine's processors that is busy.", cpu
    for what in ("memory", "disk"):
        for part in ("total", "free"):
            samples = [({"host": one.host}, one.standing[what][part]) for one in heard]
            yield f"{what}_{part}_bytes", f"Of a machine's {what}.", samples
    cards = [
        ({"host": one.host, "gpu": str(number), "name": gpu["name"]}, gpu)
        for one in heard
        for number, gpu in enumerate(one.standing["gpus"])
    ]
    for part in ("total", "free"):
        yield f"gpu_memory_{part}_bytes", "Of a GPU's memory.", [(labels, gpu[part]) for labels, gpu in cards]
    busy = [(labels, gpu["busy"]) for labels, gpu in cards if gpu["busy"] is not None]
    yield "gpu_busy_ratio", "Share of the last moment in which a GPU computed.", busy


def _family(name: str, says: str, samples: Iterable[Sample]) -> Iterator[str]:
    yield f"# HELP saehub_{name} {says}"
    yield f"# TYPE saehub_{name} gauge"
    for labels, value in samples:
        said = ",".join(f'{label}="{_quoted(text)}"' for label, text in labels.items())
        yield f"saehub_{name}{{{said}}} {float(value):.17g}"


def _quoted(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
