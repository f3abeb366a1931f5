"""Downloads when the network, the Hub or the cache misbehave: the real client over loopback, one fault at a time."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpx2
import pytest
from django.utils import timezone
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download

from saehub.jobs.models import enqueue
from saehub.jobs.progress import Cancelled, JobError, Progress
from saes import hub as our
from saes import hub_client, hub_fetch
from saes.hub import HubError, HubFile, Listing
from tests.mini_hub import COMMIT, MiniHub

pytestmark = pytest.mark.django_db
REPO = "lab/saes"
NAME = "layer_0/weights.safetensors"
WEIGHTS = os.urandom(600_000)
CONFIG = b'{"d_in": 3}'


@pytest.fixture
def stocked(hub: MiniHub) -> MiniHub:
    hub.repos[f"models/{REPO}"] = {NAME: WEIGHTS, "layer_0/cfg.json": CONFIG, "layer_1/cfg.json": b"{}"}
    return hub


@pytest.fixture
def storage() -> Iterator[MiniHub]:
    """Another host."""
    made = MiniHub()
    yield made
    made.close()


@pytest.fixture
def progress() -> Progress:
    job = enqueue("probe", None, title="download")
    from saehub.jobs.models import Job

    claimed = Job.objects.claim(job.pk, "test")
    assert claimed is not None
    return Progress(claimed)


@pytest.fixture
def get(progress: Progress) -> Callable[..., Path]:
    """Download the SAE of layer 0 and return its folder; every byte of it has been compared."""

    def call(token: str | None = None) -> Path:
        listing = our.list_repository(REPO, token=token)
        files = [file for file in listing.files if file.path.startswith("layer_0/")]
        folder = our.download(progress, listing, files, token)
        assert (folder / NAME).read_bytes() == WEIGHTS and (folder / "layer_0/cfg.json").read_bytes() == CONFIG
        return folder

    return call


def said(progress: Progress) -> str:
    return "\n".join(progress.job.lines.values_list("text", flat=True))


def part_of(listing: Listing, name: str = NAME) -> Path:
    return listing.store / "blobs" / f"{file_of(listing, name).etag}.incomplete"


def file_of(listing: Listing, name: str = NAME) -> HubFile:
    return next(file for file in listing.files if file.path == name)


def leave_part(data: bytes) -> None:
    """What a killed worker leaves."""
    part = part_of(our.list_repository(REPO))
    part.parent.mkdir(parents=True)
    part.write_bytes(data)


def no_parts_left() -> bool:
    return not list(Path(constants.HF_HUB_CACHE).rglob("*.incomplete"))


# -- the ordinary way
def test_the_hub_for_tests_speaks_to_the_library_as_the_real_one(stocked: MiniHub) -> None:
    stocked.tokens["hf_mine"] = "me"
    stocked.page_size = 2
    api = HfApi(token="hf_mine")
    assert api.whoami()["name"] == "me"
    assert [branch.target_commit for branch in api.list_repo_refs(REPO).branches] == [COMMIT]
    tree = {entry.path: entry for entry in api.list_repo_tree(REPO, recursive=True)}
    assert tree[NAME].lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest() and tree["layer_1/cfg.json"].lfs is None
    info = api.model_info(REPO, files_metadata=True)
    assert info.sha == COMMIT and {file.rfilename: file.size for file in info.siblings}[NAME] == len(WEIGHTS)
    assert Path(hf_hub_download(REPO, NAME, token="hf_mine")).resolve().name == tree[NAME].lfs.sha256
    assert Path(hf_hub_download(REPO, "layer_0/cfg.json")).resolve().name == tree["layer_0/cfg.json"].blob_id


def test_files_lie_in_the_standard_cache_and_other_programs_find_them(
    stocked: MiniHub, get: Any, monkeypatch: Any
) -> None:
    folder = get()
    assert folder == Path(constants.HF_HUB_CACHE) / "models--lab--saes" / "snapshots" / COMMIT
    stocked.close()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert Path(hf_hub_download(REPO, NAME)).read_bytes() == WEIGHTS, "by the name of its branch"
    assert not (folder / "layer_1").exists(), "only what was asked for"
    assert no_parts_left()


def test_what_another_program_brought_is_adopted(stocked: MiniHub, get: Any) -> None:
    snapshot_download(REPO)
    stocked.requests.clear()
    get()
    assert not [asked for asked in stocked.requests if "resolve" in asked.path or "lfs" in asked.path]


def test_a_second_download_of_a_pinned_commit_asks_the_hub_nothing(stocked: MiniHub, get: Any, progress: Any) -> None:
    get()
    stocked.requests.clear()
    listing = our.list_repository(REPO, COMMIT)
    our.download(progress, listing, list(listing.files)[:2])
    assert not stocked.requests


def test_bytes_are_reported_to_the_end(stocked: MiniHub, get: Any, progress: Progress) -> None:
    get()
    progress.job.refresh_from_db()
    assert progress.job.done == progress.job.total == len(WEIGHTS) + len(CONFIG)
    assert progress.job.unit == "bytes" and REPO in progress.job.step


def test_a_cached_repository_is_usable_offline(
    stocked: MiniHub, get: Any, progress: Progress, monkeypatch: Any
) -> None:
    get()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    get()
    listing = our.list_repository(REPO)
    assert listing.offline and listing.commit == COMMIT
    with pytest.raises(HubError, match=r"HF_HUB_OFFLINE is set"):
        our.download(progress, listing, [file_of(listing, "layer_1/cfg.json")])


def test_a_cache_without_a_listing_is_usable_when_the_hub_is_down(stocked: MiniHub, get: Any) -> None:
    """As other programs leave it: blobs, snapshots and refs only."""
    hf_hub_download(REPO, NAME)
    hf_hub_download(REPO, "layer_0/cfg.json")
    stocked.close()
    get()


def test_a_large_file_on_another_host_gets_no_token(stocked: MiniHub, storage: MiniHub, get: Any) -> None:
    stocked.storage, storage.repos = storage, stocked.repos
    stocked.tokens["hf_mine"] = "me"
    get("hf_mine")
    assert [asked.authorization for asked in stocked.gets(NAME)] == ["Bearer hf_mine"]
    assert [asked.authorization for asked in storage.gets(NAME)] == [""]


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


# -- listings
def test_a_listing_of_many_pages_is_read_to_its_end(stocked: MiniHub) -> None:
    stocked.repos[f"models/{REPO}"] |= {f"layer_{n}/cfg.json": b"{}" for n in range(2, 25)}
    stocked.page_size = 4
    assert len(our.list_repository(REPO).files) == 26


def test_an_endless_listing_ends_with_a_sentence(stocked: MiniHub) -> None:
    stocked.endless = True
    with pytest.raises(HubError, match=r"The listing of lab/saes does not end: \d+ pages"):
        our.list_repository(REPO)
    assert len(stocked.requests) < 600


def test_a_next_page_on_another_host_is_not_followed(stocked: MiniHub, storage: MiniHub) -> None:
    stocked.page_size, stocked.next_page_at = 1, storage.url
    storage.repos = stocked.repos
    stocked.tokens["hf_mine"] = "me"
    with pytest.raises(HubError, match="goes on at another address"):
        our.list_repository(REPO, token="hf_mine")
    assert not storage.requests
    list(HfApi(token="hf_mine").list_repo_tree(REPO, recursive=True))  # the library follows it ...
    assert {asked.authorization for asked in storage.requests} == {""}  # ... but through our client without the token


@pytest.mark.parametrize(
    "row",
    [
        {"type": "file", "path": "../../evil", "size": 1, "oid": "a" * 40},
        {"type": "file", "path": "/etc/evil", "size": 1, "oid": "a" * 40},
        {"type": "file", "path": "weights", "size": 1, "oid": "../../../evil"},
        {"type": "file", "path": "weights", "size": -1, "oid": "a" * 40},
        {"type": "file", "path": "weights", "size": 1, "oid": "a" * 40, "lfs": {"oid": "../x", "size": 1}},
        {"type": "file", "path": "", "size": 1, "oid": "a" * 40},
        {"path": "weights"},
        "weights",
    ],
)
def test_what_would_leave_the_cache_is_refused(stocked: MiniHub, monkeypatch: Any, row: Any) -> None:
    from tests import mini_hub

    monkeypatch.setattr(mini_hub, "_entry", lambda name, data: row)
    stocked.repos[f"models/{REPO}"] = {"x": b""}
    stocked.page_size = 10
    stocked.faults.clear()
    with pytest.raises(HubError, match="an entry that cannot be right"):
        our.list_repository(REPO, COMMIT)


# -- who may
def refusal(get: Any, token: str | None = None) -> HubError:
    with pytest.raises(HubError) as error:
        get(token)
    return error.value


def test_each_refusal_is_its_own_sentence(stocked: MiniHub, get: Any, monkeypatch: Any) -> None:
    stocked.tokens |= {"hf_mine": "me", "hf_friend": "friend"}
    stocked.gated.add(f"models/{REPO}")
    stocked.granted.add("hf_friend")
    heard = [refusal(get), refusal(get, "hf_mine"), refusal(get, "hf_revoked")]
    assert "accept its terms on" in str(heard[0]) and f"{stocked.url}/{REPO}" in str(heard[0])
    assert "has not been granted access" in str(heard[1]) and f"{stocked.url}/{REPO}" in heard[1].hint
    assert "does not accept this Hub token" in str(heard[2])
    for revision, path in (("main", "layer_9/x"), ("nonesuch", NAME)):
        with pytest.raises(HubError) as error:
            our.read_range(REPO, path, revision, 0, 8, token="hf_friend")
        heard.append(error.value)
    with pytest.raises(HubError) as error:
        our.list_repository("lab/none", token="hf_friend")
    heard.append(error.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError) as error:
        our.list_repository("lab/other")
    heard.append(error.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    stocked.close()
    with pytest.raises(HubError) as error:
        our.list_repository("lab/other")
    heard.append(error.value)
    assert len({str(one) for one in heard}) == len(heard) == 8
    assert all(one.hint for one in heard)


def test_who_was_granted_access_gets_the_files(stocked: MiniHub, get: Any) -> None:
    stocked.tokens["hf_friend"] = "friend"
    stocked.gated.add(f"models/{REPO}")
    stocked.granted.add("hf_friend")
    get("hf_friend")


def test_hf_token_is_what_is_sent_when_none_is_given(stocked: MiniHub, get: Any, monkeypatch: Any) -> None:
    stocked.tokens["hf_servers"] = "server"
    stocked.private.add(f"models/{REPO}")
    assert "it is private" in str(refusal(get))
    monkeypatch.setenv("HF_TOKEN", "hf_servers")
    get()


def test_a_token_that_cannot_be_sent_is_not_shown(stocked: MiniHub, get: Any) -> None:
    error = refusal(get, "hf_seс\u200bret\n42")
    assert "42" not in f"{error}{error.hint}" and "no token has" in str(error)


@pytest.mark.parametrize("repo", ["a b", "x/y/z", "-x/..", "../..", ""])
def test_what_is_not_an_id_is_said_and_not_asked_for(hub: MiniHub, repo: str) -> None:
    for call in (our.list_repository, lambda repo: our.file_head(repo, "x")):
        with pytest.raises(HubError, match="is not the id of a repository"):
            call(repo)
    assert not [asked for asked in hub.requests if "models" in asked.path or "resolve" in asked.path]


def test_an_address_that_is_not_a_hubs_is_said(stocked: MiniHub, monkeypatch: Any) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "ftp://somewhere")
    with pytest.raises(HubError, match="is not an address of a Hub"):
        our.list_repository(REPO)


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

    stocked.fault("/lfs/", "rate", 400_000, times=1)
    listing = our.list_repository(REPO)
    notes: list[Any] = [Noted(), Noted()]
    threads = [threading.Thread(target=our.download, args=(one, listing, [file_of(listing)])) for one in notes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (listing.snapshot / NAME).read_bytes() == WEIGHTS and no_parts_left()
    assert len([asked for asked in stocked.requests if asked.path.startswith("/lfs")]) == 1
    assert any("by another job" in line for one in notes for line in one.lines)


def test_a_page_does_not_wait_as_long_as_a_download(stocked: MiniHub, monkeypatch: Any) -> None:
    stocked.fault("/api/models", "status", 429, times=1, Retry_After="200")
    with pytest.raises(HubError, match="limits how often") as error:
        our.list_repository(REPO)
    assert "4 minutes" in error.value.hint


# -- parts of a file
@pytest.mark.parametrize("start, end", [(0, 8), (8, 5_000), (599_990, 600_100), (700_000, 700_010)])
def test_a_range_is_those_bytes(stocked: MiniHub, start: int, end: int) -> None:
    assert our.read_range(REPO, NAME, "", start, end) == WEIGHTS[start:end]


def test_a_range_of_a_hub_without_ranges_is_cut_out(stocked: MiniHub) -> None:
    stocked.fault("/lfs/", "whole", times=1)
    assert our.read_range(REPO, NAME, "", 1000, 1010) == WEIGHTS[1000:1010]


def test_a_range_that_answers_wrongly_is_refused(stocked: MiniHub) -> None:
    stocked.fault("/lfs/", "wrong_header", times=None)
    with pytest.raises(HubError, match="another part of"):
        our.read_range(REPO, NAME, "", 1000, 1010)


def test_a_cached_file_answers_its_ranges(stocked: MiniHub, get: Any) -> None:
    get()
    stocked.requests.clear()
    assert our.read_range(REPO, NAME, COMMIT, 10, 20) == WEIGHTS[10:20]
    assert not stocked.requests


def test_the_head_of_a_file(stocked: MiniHub) -> None:
    head = our.file_head(REPO, NAME)
    assert (head.size, head.etag, head.commit) == (len(WEIGHTS), hashlib.sha256(WEIGHTS).hexdigest(), COMMIT)
    assert our.file_head(REPO, "layer_0/cfg.json").size == len(CONFIG)
    with pytest.raises(HubError, match=r"has no file layer_0/none at this revision"):
        our.file_head(REPO, "layer_0/none")
