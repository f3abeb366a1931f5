"""The Hub's files when all goes well: the standard cache, listings, who may have what, and parts of a file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download

from saehub.jobs.progress import Progress
from saes import hub as our
from saes.hub import HubError
from tests.mini_hub import COMMIT, MiniHub
from tests.saes.hub_files import CONFIG, NAME, REPO, WEIGHTS, file_of, no_parts_left

pytestmark = pytest.mark.django_db


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
