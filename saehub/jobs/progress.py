"""What a job function is handed: it says how far the work is, and is told here when to stop."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import psutil
from django.utils import timezone

from saehub.jobs.models import Job, lease
from saehub.plain import plain

FLUSH_SECONDS = 0.5


class Cancelled(Exception):
    """Somebody pressed Cancel. Raised from `progress()`; a job function lets it pass, after tidying up."""


class LeaseLost(Exception):
    """The job is no longer ours (its lease ran out and another worker has it): stop at once and write nothing."""


class JobError(Exception):
    """A failure a person can act on: one plain sentence, and a hint what to do."""

    def __init__(self, sentence: str, hint: str = "") -> None:
        super().__init__(sentence)
        self.hint = hint


class Progress:
    """`progress(done, total, step)`: writes the row about twice a second, renews the lease, raises Cancelled or LeaseLost.

    The rate is that of the last ten seconds, so that the time left follows the present speed.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self._process = psutil.Process()
        self._written = 0.0
        self._marks: deque[tuple[float, int]] = deque(maxlen=64)
        self._last: dict[str, Any] = {}

    def __call__(self, done: int, total: int | None = None, step: str = "") -> None:
        self._last = {"done": done, "total": total} | ({"step": plain(step[:200])} if step else {})
        if time.monotonic() - self._written >= FLUSH_SECONDS or (total and done >= total):
            self.flush()

    def start(self, step: str, *, unit: str = "", total: int | None = None) -> None:
        """Begin a new part of the work: the count and the rate start again from nothing."""
        self._marks.clear()
        self._last = {"done": 0, "total": total, "step": plain(step[:200]), "rate": None} | (
            {"unit": unit} if unit else {}
        )
        self.flush()
        self.log(step)

    def log(self, text: str) -> None:
        self.job.write(text)
        self.job.announce()

    def flush(self) -> None:
        now = time.monotonic()
        self._written = now
        fields = self._last | {"changed_at": timezone.now(), "memory": self._process.memory_info().rss}
        if "rate" not in fields:
            fields["rate"] = self._rate(now, fields.get("done", 0))
        self._last.pop("rate", None)
        self.beat(**fields)
        self.job.announce()

    def _rate(self, now: float, done: int) -> float | None:
        self._marks.append((now, done))
        while self._marks[0][0] < now - 10 and len(self._marks) > 2:
            self._marks.popleft()
        then, before = self._marks[0]
        return (done - before) / (now - then) if now > then and done > before else None

    def beat(self, **fields: Any) -> None:
        """Renew the lease and look for a cancel, writing `fields` along."""
        held = Job.objects.filter(self.job.holding())
        if not held.update(lease_until=lease(), **fields):
            raise LeaseLost(f"Job {self.job.pk} is no longer ours.")
        if held.filter(cancel_at__isnull=False).exists():
            raise Cancelled
