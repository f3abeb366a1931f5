"""Measure a batch and bring it here: every SAE is a job like any other, and the pages show it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from django.db import IntegrityError, connections, transaction

from saehub.accounts.hub_tokens import hub_token
from saehub.jobs.models import Job, State
from saehub.jobs.progress import JobError
from saehub.jobs.runner import execute, heartbeat, hint, sentence, sweep, worker_name
from saes import hub
from saes.downloads import files_of
from saes.hub import HubError, HubFile, Listing
from saes.models import SAE
from saes.same_weights import ready_with, told

POLL_SECONDS = 0.3
SWEEP_SECONDS = 5.0
STOP_SECONDS = 10.0


@dataclass
class Part:
    """One SAE of a batch: how much of it is to come, and how it went."""

    row: SAE
    size: int | None = None  # bytes of its files; None: not known
    cached: int = 0
    job: Job | None = None
    error: str = ""
    hint: str = ""
    files: list[HubFile] = field(default_factory=list)  # of its files, as `listing` names them
    listing: Listing | None = None
    here: bool = False  # it was ready before
    joined: bool = False  # its job is somebody else's
    twin: SAE | None = None  # with the same weights: an SAE that is here, else an earlier one of the batch

    @property
    def state(self) -> str:
        if self.here:
            return "here"
        if self.job is not None:
            return str(self.job.state)
        return "failed" if self.error else "waiting"

    def on_the_way(self) -> dict[str, tuple[int, int]]:
        """{path: (bytes here, bytes in all)} of those of its files that are here in part."""
        if self.listing is None:
            return {}
        found = {file.path: (self.listing.cached([file]), file.size) for file in self.files}
        return {path: (have, size) for path, (have, size) in found.items() if 0 < have < size}

    @property
    def seconds(self) -> float | None:
        return self.job.seconds if self.job and not self.here else None

    def as_json(self) -> dict[str, Any]:
        return {
            "sae": self.row.pk, "name": self.row.name, "repo": self.row.repo_id, "path": self.row.repo_path,
            "revision": self.row.revision, "state": self.state, "bytes": self.size, "cached": self.cached,
            "seconds": self.seconds, "job": self.job.pk if self.job else None, "error": self.error, "hint": self.hint,
            "same_weights": {"sae": self.twin.pk, "name": self.twin.name} if self.twin else None,
        }  # fmt: skip


# -- before it starts --------------------------------------------------------------------------------------------------
def measure(rows: list[SAE], user: Any, say: Callable[[int], None] = lambda n: None) -> list[Part]:
    """Sizes, what is here already, and what comes twice. Each repository is asked once; what it refuses
    stands in its parts' `error`."""
    token = hub_token(user)
    listings: dict[tuple[str, str], Listing | HubError] = {}
    parts = []
    for row in rows:
        part = Part(row, here=row.all_here)
        parts.append(part)
        if part.here:
            part.size = part.cached = row.size_bytes
        else:
            _measure(part, listings, token)
        say(len(parts))
    digests = [told(part.files) if part.files else "" for part in parts]
    here = ready_with(digests)
    for part, digest in zip(parts, digests, strict=True):
        part.twin = here.get(digest)
        if digest:
            here.setdefault(digest, part.row)
    return parts


def _measure(part: Part, listings: dict[tuple[str, str], Listing | HubError], token: str | None) -> None:
    row = part.row
    place = (row.repo_id, row.revision)
    if place not in listings:
        try:
            listings[place] = hub.list_repository(*place, token=token)
        except HubError as error:
            listings[place] = error
    listing = listings[place]
    try:
        if isinstance(listing, HubError):
            raise listing
        files = files_of(row, listing)
        part.listing, part.files = listing, files
        part.size, part.cached = sum(file.size for file in files), listing.cached(files)
    except JobError as error:
        part.error, part.hint = str(error), error.hint


def missing(parts: list[Part]) -> int:
    return sum((part.size or 0) - part.cached for part in parts)


# -- bringing it -------------------------------------------------------------------------------------------------------
class Batch:
    """`start` queues the parts a few at a time and does their jobs with threads of this process.

    A worker that is faster may take a job; it is then only watched. `stop` cancels what runs: what was brought stays, and
    the same batch goes on from there.
    """

    def __init__(self, parts: list[Part], user: Any, at_once: int) -> None:
        self.parts, self.user = parts, user
        self.over = threading.Event()
        self.waiting: queue.SimpleQueue[Part] = queue.SimpleQueue()
        for part in parts:
            if not (part.here or part.error):
                self.waiting.put(part)
        count = min(at_once, self.waiting.qsize())
        self.threads = [threading.Thread(target=self._work, daemon=True, name=f"batch-{n}") for n in range(count)]
        self._swept = time.monotonic()

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    def running(self) -> bool:
        """Whether there is more to come; also takes up what dead workers left, as the workers themselves do."""
        if time.monotonic() - self._swept > SWEEP_SECONDS:
            self._swept = time.monotonic()
            sweep()
        return any(thread.is_alive() for thread in self.threads)

    def stop(self) -> None:
        """Cancel what runs and wait a moment for it."""
        self.over.set()
        for part in self.parts:
            if part.job is not None and not part.joined:
                part.job.refresh_from_db()
                if part.job.is_live:
                    part.job.cancel()
        until = time.monotonic() + STOP_SECONDS
        for thread in self.threads:
            thread.join(max(until - time.monotonic(), 0))
        for part in self.parts:
            if part.job is not None:
                part.job.refresh_from_db()

    def _work(self) -> None:
        try:
            while not self.over.is_set():
                self._bring(self.waiting.get_nowait())
        except queue.Empty:
            return
        finally:
            connections.close_all()

    def _bring(self, part: Part) -> None:
        try:
            part.job, part.joined = _job_of(part, self.user)
            self._see_through(part.job)
            part.error, part.hint = part.job.error, part.job.hint
            if SAE.objects.filter(pk=part.row.pk).exists():  # a place that holds nothing leaves no row
                part.row.refresh_from_db()
        except Exception as error:  # one that fails, for whatever reason, does not hold up the others
            part.error, part.hint = sentence(error), hint(error)

    def _see_through(self, job: Job) -> None:
        """Do the job, or watch whoever has it, until it is over."""
        while True:
            claimed = Job.objects.claim(job.pk, worker_name())
            if claimed is not None:
                with heartbeat(claimed):
                    execute(claimed)
            job.refresh_from_db()
            if not job.is_live:
                return
            time.sleep(POLL_SECONDS)


def _job_of(part: Part, user: Any) -> tuple[Job, bool]:
    """The job that brings the part, and whether it was on already."""
    with transaction.atomic():
        row = part.row
        if row.pk is None:
            row.owner = user
            try:
                with transaction.atomic():
                    row.save()
            except IntegrityError:  # somebody added the same place meanwhile
                part.row = row = SAE.objects.get(repo_id=row.repo_id, repo_path=row.repo_path)
        known: SAE = SAE.objects.select_for_update(of=("self",)).select_related("job").get(pk=row.pk)
        if known.busy and known.job is not None:
            return known.job, True
        if row.revision and row.revision != known.revision and not known.ready:
            known.revision = row.revision
            known.save(update_fields=["revision"])
        return known.start(user), False


def summary(parts: list[Part], seconds: float) -> dict[str, Any]:
    """Of a finished or stopped batch."""
    good = [part for part in parts if part.state in ("here", State.DONE)]
    return {
        "saes": [part.as_json() for part in parts],
        "done": len(good),
        "failed": len(parts) - len(good),
        "bytes": sum((part.size or 0) - part.cached for part in good),
        "seconds": round(seconds, 3),
    }
