"""Downloads when the network, the Hub or the cache misbehave: the real client over loopback, one fault at a time."""

from __future__ import annotations

import hashlib
import threading
from email.utils import format_datetime
from typing import Any

import httpx2
import pytest
from django.utils import timezone
from huggingface_hub import HfApi

from saehub.jobs.progress import Cancelled, JobError, Progress
from saes import hub as our
from saes import hub_client, hub_fetch
from saes.hub import HubError
from tests.conftest import wait_for
from tests.mini_hub import MiniHub
from tests.saes.hub_files import NAME, REPO, WEIGHTS, file_of, leave_part, no_parts_left, part_of, said

pytestmark = pytest.mark.django_db


# -- a bad connection
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_cut_connection_goes_on_where_it_ended(stocked: MiniHub, get: Any, progress: Progress, share: float) -> None:
    stocked.fault("lfs/models/lab/saes/layer_0/weights", "cut", share, times=2)
    get()
    ranges = [asked.range for asked in stocked.requests if asked.path.startswith("/lfs")]
    assert ranges[0] == "" and len(ranges) == 3
    if share:
        assert all(r.startswith("bytes=") and r != "bytes=0-" for r in ranges[1:])
        assert "the connection was cut" in said(progress)


def test_a_connection_that_always_drops_is_one_sentence_and_keeps_what_came(stocked: MiniHub, get: Any) -> None:
    stocked.fault(NAME, "cut", 0.25, times=1)
    stocked.fault(NAME, "cut", 0.0, times=None)
    with pytest.raises(HubError, match=r"cannot be reached"):
        get()
    assert part_of(our.list_repository(REPO)).stat().st_size == len(WEIGHTS) // 4
    stocked.faults.clear()
    get()
    assert stocked.gets(NAME)[-1].range == f"bytes={len(WEIGHTS) // 4}-"


def test_what_a_killed_worker_left_is_gone_on_with(stocked: MiniHub, get: Any) -> None:
    leave_part(WEIGHTS[:400_000])
    get()
    assert [asked.range for asked in stocked.gets(NAME)] == ["bytes=400000-"] * 2, "at the Hub, then where it redirects"


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504, 408])
def test_a_busy_hub_is_asked_again(stocked: MiniHub, get: Any, progress: Progress, status: int) -> None:
    stocked.fault("/resolve/", "status", status, times=3)
    stocked.fault("/api/models", "status", status, times=2)
    get()
    assert f"the Hub answered {status}" in said(progress)


@pytest.mark.parametrize("date", [False, True])
def test_retry_after_is_honoured(stocked: MiniHub, get: Any, monkeypatch: Any, date: bool) -> None:
    waits: list[float] = []
    real = hub_fetch.pause
    monkeypatch.setattr(hub_fetch, "pause", lambda *given: waits.append(real(*given)) or 0.01)
    told = format_datetime(timezone.now() + timezone.timedelta(seconds=40), usegmt=True) if date else "40"
    stocked.fault("weights", "status", 503, times=1, Retry_After=told)
    get()
    assert len(waits) == 1 and 37 < waits[0] <= 40


def test_a_wait_that_is_too_long_is_said_instead(stocked: MiniHub, get: Any) -> None:
    stocked.fault("weights", "status", 429, times=1, Retry_After="4000")
    with pytest.raises(HubError, match="limits how often we may ask") as error:
        get()
    assert "67 minutes" in error.value.hint


def test_waits_grow_and_differ() -> None:
    error = httpx2.ReadError("cut")
    waits = [[hub_client.pause(error, attempt) for _ in range(20)] for attempt in (1, 2, 3, 9)]
    first = hub_client.FIRST_WAIT
    for row, most in zip(waits, (first, 2 * first, 4 * first, hub_client.LONGEST_WAIT), strict=True):
        assert most / 2 <= min(row) < max(row) <= most


def test_a_hub_with_a_lasting_fault_is_one_sentence(stocked: MiniHub, get: Any) -> None:
    stocked.fault("weights", "status", 503, times=None)
    with pytest.raises(HubError, match=r"fault of its own \(503\).*weights"):
        get()


def test_a_slow_answer_is_not_waited_for_for_ever(stocked: MiniHub, get: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(hub_client, "READ_SECONDS", 0.2)
    stocked.fault("/api/models", "delay", 1.0, times=None)
    with pytest.raises(HubError, match="did not answer in time"):
        get()


def test_the_library_itself_does_not_wait_for_ever(stocked: MiniHub, monkeypatch: Any) -> None:
    """`model_info` of huggingface_hub has no timeout of its own; through our client it has."""
    monkeypatch.setattr(hub_client, "READ_SECONDS", 0.2)
    stocked.fault("/api/models", "delay", 1.0, times=None)
    with pytest.raises(httpx2.ReadTimeout):
        HfApi().model_info(REPO)


# -- wrong bytes
def test_corrupted_bytes_of_the_right_length_are_fetched_again(stocked: MiniHub, get: Any, progress: Progress) -> None:
    stocked.fault("lfs/models/lab/saes/layer_0/weights", "corrupt", times=1)
    get()
    assert "checksum" in said(progress)


def test_a_small_file_is_checked_too(stocked: MiniHub, get: Any, progress: Progress) -> None:
    stocked.fault("layer_0/cfg.json", "corrupt", times=1)
    get()
    assert "layer_0/cfg.json: its content does not have the checksum" in said(progress)


def test_a_file_that_always_arrives_damaged_is_refused_and_nothing_is_kept(stocked: MiniHub, get: Any) -> None:
    stocked.fault("weights", "corrupt", times=None)
    with pytest.raises(HubError, match=r"weights.safetensors of lab/saes arrives damaged"):
        get()
    assert len([asked for asked in stocked.requests if asked.path.startswith("/lfs")]) == 2
    listing = our.list_repository(REPO)
    assert no_parts_left() and not (listing.store / "blobs" / file_of(listing).etag).exists()
    assert not (listing.snapshot / NAME).exists()


@pytest.mark.parametrize("fault", ["wrong_range", "wrong_header", "whole", "no_range"])
def test_a_resumed_range_that_answers_wrongly_is_noticed(stocked: MiniHub, get: Any, fault: str) -> None:
    leave_part(WEIGHTS[:250_000])
    stocked.fault("/lfs/", fault, times=1)
    get()
    assert no_parts_left()


@pytest.mark.parametrize("left", [b"\0" * 250_000, WEIGHTS + b"more", b"\0" * len(WEIGHTS)])
def test_a_wrong_beginning_is_noticed(stocked: MiniHub, get: Any, progress: Progress, left: bytes) -> None:
    leave_part(left)
    get()
    assert "it is fetched again from the beginning" in said(progress)


def test_too_little_under_right_headers_is_noticed(stocked: MiniHub, get: Any) -> None:
    stocked.fault("/lfs/", "short", times=1)
    get()


def test_a_damaged_file_of_the_cache_is_replaced(stocked: MiniHub, get: Any, progress: Progress) -> None:
    blob = (get() / NAME).resolve()
    blob.write_bytes(b"\0" * len(WEIGHTS))
    get()
    assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name
    assert "was in the cache with other content" in said(progress)


# -- room, and cancel
def test_what_does_not_fit_is_refused_before_it_starts(stocked: MiniHub, get: Any, settings: Any) -> None:
    settings.DISK_RESERVE = 10**18
    with pytest.raises(JobError, match="and the disk of"):
        get()
    assert not stocked.gets(NAME)


def test_a_cancel_stops_within_a_moment_and_keeps_what_came(
    stocked: MiniHub, progress: Progress, monkeypatch: Any
) -> None:
    stocked.fault("/lfs/", "rate", 200_000, times=1)
    listing = our.list_repository(REPO)

    class Pressed(Progress):
        def __call__(self, done: int, total: int | None = None, step: str = "") -> None:
            super().__call__(done, total, step)
            if done > 50_000:
                self.job.cancel()
                self.flush()

    with pytest.raises(Cancelled):
        our.download(Pressed(progress.job), listing, [file_of(listing)])
    assert 0 < part_of(listing).stat().st_size < len(WEIGHTS)
    stocked.faults.clear()


def test_two_downloads_of_one_file_fetch_it_once(stocked: MiniHub) -> None:
    """Another process, or another job of this one, holds the lock of the file."""

    class Noted:
        def __init__(self) -> None:
            self.lines: list[str] = []

        def start(self, step: str, **_: Any) -> None: ...
        def log(self, text: str) -> None:
            self.lines.append(text)

        def __call__(self, *_: Any) -> None: ...

    rate = stocked.fault("/lfs/", "rate", 2_000, times=1)  # until the second of them was seen to wait
    listing = our.list_repository(REPO)
    notes: list[Any] = [Noted(), Noted()]
    threads = [threading.Thread(target=our.download, args=(one, listing, [file_of(listing)])) for one in notes]
    for thread in threads:
        thread.start()
    wait_for(
        lambda: any("by another job" in line for one in notes for line in one.lines), 120, "one to wait for the other"
    )
    rate.value = 50_000_000
    for thread in threads:
        thread.join()
    assert (listing.snapshot / NAME).read_bytes() == WEIGHTS and no_parts_left()
    assert len([asked for asked in stocked.requests if asked.path.startswith("/lfs")]) == 1


def test_a_page_does_not_wait_as_long_as_a_download(stocked: MiniHub, monkeypatch: Any) -> None:
    stocked.fault("/api/models", "status", 429, times=1, Retry_After="200")
    with pytest.raises(HubError, match="limits how often") as error:
        our.list_repository(REPO)
    assert "4 minutes" in error.value.hint
