"""What the live workers hold in memory: each writes it down, the pages show it. No torch."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
from django.db import transaction
from django.utils import timezone

from inference.models import Resident
from saehub.jobs.models import Job, State


def publish(held: Sequence[tuple[str, str, int]], budget: int) -> None:
    """Write what this process holds, (kind, name, bytes) least recently used first, and forget processes that are gone."""
    host, pid, now = socket.gethostname(), os.getpid(), timezone.now()
    started = psutil.Process().create_time()
    with transaction.atomic():
        gone = [row.pk for row in Resident.objects.filter(host=host) if row.pid == pid or not _alive(row)]
        Resident.objects.filter(pk__in=gone).delete()
        Resident.objects.bulk_create(
            Resident(
                host=host, pid=pid, started=started, kind=kind, name=name[:200], n_bytes=n_bytes, budget=budget, used_at=now
            )
            for kind, name, n_bytes in held
        )  # fmt: skip


@dataclass(frozen=True)
class Worker:
    """One live worker: what it holds, the most recently used first, and what it may hold."""

    name: str
    held: list[Resident]

    @property
    def budget(self) -> int:
        return self.held[0].budget

    @property
    def taken(self) -> int:
        return sum(row.n_bytes for row in self.held)


@dataclass(frozen=True)
class Residency:
    workers: list[Worker]
    waiting: int  # jobs in the live queue
    running: int


def residency() -> Residency:
    """What is warm now. A process of this machine that is gone holds nothing; others are as they last said."""
    host = socket.gethostname()
    by_process: dict[tuple[str, int], list[Resident]] = {}
    for row in Resident.objects.order_by("host", "pid", "-pk"):
        if row.host != host or _alive(row):
            by_process.setdefault((row.host, row.pid), []).append(row)
    states = list(Job.objects.live().filter(queue="live").values_list("state", flat=True))
    return Residency(
        [Worker(f"{host}:{pid}", held) for (host, pid), held in by_process.items()],
        states.count(State.QUEUED),
        states.count(State.RUNNING),
    )


def _alive(row: Resident) -> bool:
    """The process that wrote the row is still there, and not another one under its id."""
    try:
        return abs(psutil.Process(row.pid).create_time() - row.started) < 1
    except psutil.Error:
        return False
