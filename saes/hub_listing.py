"""What a repository of the Hub holds at a commit: read page by page, checked, and kept in the Hub's cache."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import httpx2
from huggingface_hub import constants, file_download
from huggingface_hub._local_folder import _validate_relative_filename
from huggingface_hub._tree_cache import TreeCacheEntry, read_tree_cache, write_tree_cache
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils._http import fix_hf_endpoint_in_url

from saes.hub_client import HubError, address, ask, explain, get_json, hub_errors, is_hub

COMMIT = re.compile(r"[0-9a-f]{40}")
ETAG = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
LISTING_SECONDS = 120.0
MOST_PAGES = 500
MOST_FILES = 200_000


@dataclass(frozen=True)
class HubFile:
    """A file at a commit. `etag` is the hash of its content, and its name in the cache.

    64 hex digits are the SHA-256 of a large file; 40 are the SHA-1 git gives to a small one.
    """

    path: str
    size: int
    etag: str


@dataclass(frozen=True)
class Listing:
    """A repository at one commit. `offline`: the Hub was not asked; this is what the cache knows of it."""

    repo_id: str
    kind: str  # model | dataset
    commit: str
    files: tuple[HubFile, ...]
    revision: str = ""  # as it was asked for
    offline: bool = False

    @property
    def store(self) -> Path:
        """Its folder in the Hub's cache."""
        return _store(self.repo_id, self.kind)

    @property
    def snapshot(self) -> Path:
        """Where its files lie, once they are here."""
        return self.store / "snapshots" / self.commit

    def cached(self, files: Iterable[HubFile]) -> int:
        """Bytes of these files that are on this machine, finished or not."""
        blobs = self.store / "blobs"
        return sum(
            max(_held(blobs / file.etag, file), _held(self.snapshot / file.path, file), _part(blobs, file))
            for file in files
        )


def _store(repo_id: str, kind: str) -> Path:
    return Path(constants.HF_HUB_CACHE) / file_download.repo_folder_name(repo_id=repo_id, repo_type=kind)


def _held(path: Path, file: HubFile) -> int:
    try:
        return file.size if path.stat().st_size == file.size else 0
    except OSError:
        return 0


def _part(blobs: Path, file: HubFile) -> int:
    try:
        return min((blobs / f"{file.etag}.incomplete").stat().st_size, file.size)
    except OSError:
        return 0


# -- what there is
def list_repository(repo_id: str, revision: str = "", kind: str = "model", token: str | None = None) -> Listing:
    """What the Hub holds under this id at this revision (the default branch when empty), pinned to its commit.

    A commit never changes, so its listing is asked for once and kept in the Hub's cache. When the Hub cannot be reached
    the cache answers, if it can. Raises HubError.
    """
    until = time.monotonic() + LISTING_SECONDS
    with hub_errors(repo_id, kind=kind):
        validate_repo_id(repo_id)
        try:
            commit = revision if COMMIT.fullmatch(revision) else _commit(repo_id, revision, kind, token, until)
            if known := _kept(repo_id, kind, commit):
                return Listing(repo_id, kind, commit, known, revision)
            entries = _tree(repo_id, kind, commit, token, until)
        except (httpx2.TransportError, ConnectionError) as error:
            if here := _offline(repo_id, revision, kind):
                return here
            raise explain(error, repo_id, kind=kind) from None
    write_tree_cache(str(_store(repo_id, kind)), commit, entries)
    return Listing(repo_id, kind, commit, _files(entries), revision)


def _commit(repo_id: str, revision: str, kind: str, token: str | None, until: float) -> str:
    url = address(repo_id, kind, "revision", revision or constants.DEFAULT_REVISION)
    found, _ = ask(lambda: get_json(f"{url}?expand=sha", token, until))
    commit = str(found.get("sha", "")) if isinstance(found, dict) else ""
    if not COMMIT.fullmatch(commit):
        raise HubError(f"The Hub did not say which commit {repo_id} is at.", "Check HF_ENDPOINT and any proxy.")
    return commit


def _tree(repo_id: str, kind: str, commit: str, token: str | None, until: float) -> dict[str, TreeCacheEntry]:
    """Every file at a commit, page by page, as long as the pages come from the Hub and come to an end."""
    entries: dict[str, TreeCacheEntry] = {}
    url, asked = f"{address(repo_id, kind, 'tree', commit)}?recursive=true&expand=false", set[str]()
    while url:
        if url in asked or len(asked) >= MOST_PAGES or len(entries) > MOST_FILES or time.monotonic() > until:
            raise HubError(
                f"The listing of {repo_id} does not end: {len(asked)} pages with {len(entries)} files were read.",
                "If the repository is that large, download it with the hf program and import the folder.",
            )
        asked.add(url)
        page, response = ask(lambda: get_json(url, token, until))  # noqa: B023 - called at once
        entries |= _entries(repo_id, page)
        url = _next(repo_id, response)
    return entries


def _next(repo_id: str, response: httpx2.Response) -> str:
    link = response.links.get("next", {}).get("url", "")
    if not link:
        return ""
    url = fix_hf_endpoint_in_url(urljoin(str(response.url), link), constants.ENDPOINT)  # of a mirror
    if not is_hub(url):
        host = httpx2.URL(url).host
        raise HubError(
            f"The listing of {repo_id} goes on at another address ({host}), which is not followed.",
            f"Check HF_ENDPOINT ({constants.ENDPOINT}) and any proxy.",
        )
    return url


def _entries(repo_id: str, page: Any) -> dict[str, TreeCacheEntry]:
    """Files of a page. What is used as a path or a name on this machine is checked here, once."""
    found = {}
    rows: list[Any] = page if isinstance(page, list) else [None]
    for row in rows:
        try:
            if row["type"] != "file":
                continue
            lfs = row.get("lfs") or {}
            path, size, sha256 = str(row["path"]), int(lfs.get("size", row["size"])), lfs.get("oid")
            _validate_relative_filename(path)
            if not ETAG.fullmatch(sha256 or row["oid"]) or size < 0 or "\0" in path or not path.strip("/. "):
                raise ValueError(path)
            xet = row.get("xetHash")
            found[path] = TreeCacheEntry(size, str(row["oid"]), sha256, size if sha256 else None, xet)
        except (KeyError, TypeError, ValueError, AttributeError):
            name = str(row.get("path", "") if isinstance(row, dict) else row)[:80]
            raise HubError(
                f"The listing of {repo_id} has an entry that cannot be right: {name!r}.", "Nothing was downloaded."
            ) from None
    return found


def _files(entries: dict[str, TreeCacheEntry]) -> tuple[HubFile, ...]:
    return tuple(HubFile(path, entry.size, entry.lfs_sha256 or entry.blob_id) for path, entry in entries.items())


def _kept(repo_id: str, kind: str, commit: str) -> tuple[HubFile, ...]:
    """Files of a commit whose listing the cache has. It may be another program's, so it is checked as the Hub's is."""
    entries = read_tree_cache(str(_store(repo_id, kind)), commit)
    if not entries:
        return ()
    rows = [
        {"type": "file", "path": path, "size": entry.size, "oid": entry.blob_id, "xetHash": entry.xet_hash}
        | ({"lfs": {"oid": entry.lfs_sha256, "size": entry.lfs_size}} if entry.lfs_sha256 else {})
        for path, entry in entries.items()
    ]
    return _files(_entries(repo_id, rows))


def _offline(repo_id: str, revision: str, kind: str) -> Listing | None:
    """What the cache holds of this revision: its kept listing, else the files of its snapshot."""
    store = _store(repo_id, kind)
    commit = revision
    if not COMMIT.fullmatch(revision):
        try:
            _validate_relative_filename(revision)
            commit = (store / "refs" / (revision or constants.DEFAULT_REVISION)).read_text().strip()
        except (OSError, ValueError):
            return None
    if not COMMIT.fullmatch(commit):
        return None
    snapshot = store / "snapshots" / commit
    files = _kept(repo_id, kind, commit) or tuple(
        HubFile(path.relative_to(snapshot).as_posix(), path.stat().st_size, path.resolve().name)
        for path in sorted(snapshot.rglob("*"))
        if path.is_file() and ETAG.fullmatch(path.resolve().name)
    )
    return Listing(repo_id, kind, commit, files, revision, offline=True) if files else None


def matching(files: tuple[HubFile, ...], *patterns: str) -> list[HubFile]:
    """Files at the top of the repository whose names match one of the patterns."""
    return [file for file in files if "/" not in file.path and any(fnmatch(file.path, pattern) for pattern in patterns)]
