"""Jobs as rows: claim, lease, cancel, retry, failure, sweep."""

from __future__ import annotations

import errno
import os
from datetime import timedelta
from typing import Any

import pytest
from django.utils import timezone

from saehub.jobs import kinds, probe
from saehub.jobs.models import Job, State, enqueue
from saehub.jobs.progress import Cancelled, LeaseLost, Progress
from saehub.jobs.runner import hint, release, sentence, sweep

pytestmark = pytest.mark.django_db


def make(**changes: Any) -> Job:
    return enqueue("probe", None, title="count", **({"steps": 3, "seconds": 0.0} | changes))


def test_a_job_runs_once_however_often_it_is_delivered(run_job: Any) -> None:
    job = make()
    first, second = Job.objects.claim(job.pk, "one"), Job.objects.claim(job.pk, "two")
    assert first is not None and second is None
    job.refresh_from_db()
    assert (job.state, job.worker, job.attempt) == (State.RUNNING, "one", 1)


def test_a_finished_job_keeps_its_result(run_job: Any) -> None:
    job = run_job(make())
    assert (job.state, job.result, job.done, job.fraction) == (State.DONE, {"steps": 3}, 3, 1.0)
    assert job.finished_at and job.token is None and job.lease_until is None
    assert Job.objects.claim(job.pk, "again") is None


def test_a_failure_has_a_sentence_a_hint_and_the_traceback(run_job: Any) -> None:
    job = run_job(make(steps=0))
    assert job.state == State.FAILED
    assert job.error == "A probe counts between 1 and 3000 steps, not 0."
    assert job.hint == "Choose another number of steps."
    assert "JobError" in job.traceback


def test_an_unexpected_error_names_its_type(run_job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(progress: Progress, **ids: Any) -> dict[str, Any]:
        return {"x": 1 / 0}

    monkeypatch.setattr(probe, "probe", broken)
    job = run_job(make())
    assert job.error == "Unexpected ZeroDivisionError: division by zero"


def test_what_a_hostile_file_says_does_not_keep_a_job_from_ending(
    run_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(progress: Progress, **ids: Any) -> dict[str, Any]:
        progress.start("reading a\0b \ud800")
        raise ValueError("It is named a\0b \ud800.")

    monkeypatch.setattr(probe, "probe", told)
    job = run_job(make())
    assert (job.state, job.error, job.step) == (State.FAILED, "It is named ab ?.", "reading ab ?")
    assert [line.text for line in job.lines.all()] == ["reading ab ?"] and "It is named ab ?." in job.traceback


def test_a_number_that_json_has_not_does_not_lose_a_result(run_job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "probe", lambda progress, **ids: {"loss": float("nan"), "steps": 3, "names": ["a\0"]})
    job = run_job(make())
    assert (job.state, job.result) == (State.DONE, {"loss": None, "steps": 3, "names": ["a"]})


def test_a_full_disk_is_said_in_plain_words() -> None:
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        assert sentence(OSError(number, os.strerror(number))) == "The disk is full."
    assert sentence(RuntimeError("Error while serializing: I/O error (os error 28)")) == "The disk is full."


def test_torch_without_memory_is_said_in_plain_words() -> None:
    said = (
        "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
    )
    assert sentence(RuntimeError(said)) == "Memory ran out." and "smaller" in hint(RuntimeError(said))


def test_cancelling_a_queued_job_ends_it_at_once() -> None:
    job = make()
    job.cancel()
    job.refresh_from_db()
    assert job.state == State.CANCELLED
    assert Job.objects.claim(job.pk, "late") is None


def test_cancel_reaches_the_function_through_progress() -> None:
    job = Job.objects.claim(make().pk, "w")
    assert job
    progress = Progress(job)
    progress.start("counting", total=10)
    job.cancel()
    with pytest.raises(Cancelled):
        progress.flush()


def test_a_worker_that_lost_its_lease_is_told_so_and_writes_nothing() -> None:
    job = Job.objects.claim(make().pk, "old")
    assert job
    Job.objects.filter(pk=job.pk).update(lease_until=timezone.now() - timedelta(seconds=1))
    assert sweep() >= 1
    fresh = Job.objects.claim(job.pk, "new")
    assert fresh and fresh.attempt == 2
    with pytest.raises(LeaseLost):
        Progress(job).beat(step="from the grave")
    assert not job.finish(State.DONE, result={"by": "the dead"})
    fresh.refresh_from_db()
    assert (fresh.state, fresh.worker, fresh.step) == (State.RUNNING, "new", "")


def test_a_job_whose_workers_keep_dying_fails_after_its_attempts() -> None:
    job = make()
    for _ in range(kinds.KINDS["probe"].attempts):
        assert Job.objects.claim(job.pk, "w")
        Job.objects.filter(pk=job.pk).update(lease_until=timezone.now() - timedelta(seconds=1))
        sweep()
    job.refresh_from_db()
    assert job.state == State.FAILED
    assert "attempt 3 of 3" in job.error and "memory" in job.hint


def test_an_orderly_stop_is_not_held_against_the_job() -> None:
    job = make()
    Job.objects.claim(job.pk, "w")
    release("w", "Its worker was stopped.")
    job.refresh_from_db()
    assert (job.state, job.attempt) == (State.QUEUED, 0)


def test_retry_queues_a_failed_job_again(run_job: Any) -> None:
    job = run_job(make(steps=0))
    assert job.retry()
    job.refresh_from_db()
    assert (job.state, job.error, job.attempt) == (State.QUEUED, "", 0)
    assert not job.retry(), "a queued job is not queued twice"
