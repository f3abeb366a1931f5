"""The Hugging Face Hub, for jobs: what a repository holds at a commit, and its files on this machine."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import Future, TimeoutError
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import httpx2
from django.conf import settings
from huggingface_hub import HfApi, constants, file_download, snapshot_download

from saehub.jobs.progress import JobError, Progress
from saes.numerics.lm import plain_errors


@dataclass(frozen=True)
class HubFile:
    path: str
    size: int
    etag: str  # its content's hash, and its name in the cache


@dataclass(frozen=True)
class Listing:
    """A repository at one commit."""

    repo_id: str
    kind: str  # model | dataset
    commit: str
    files: tuple[HubFile, ...]


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """What the network and the Hub answer becomes one plain sentence (LMError): offline, gated, missing, disk full."""
    try:
        yield
    except httpx2.TransportError as error:  # name not resolved, refused, timed out
        with plain_errors(repo_id):
            raise ConnectionError(str(error)) from error
    except OSError as error:  # the Hub's own errors are of this kind too
        with plain_errors(repo_id):
            raise error


def list_repository(repo_id: str, revision: str = "", kind: str = "model") -> Listing:
    """What the Hub holds under this id at this revision (the default branch when empty), pinned to its commit."""
    with hub_errors(repo_id):
        info: Any = HfApi().repo_info(repo_id, repo_type=kind, revision=revision or None, files_metadata=True)
    files = (_file(sibling) for sibling in info.siblings or ())
    return Listing(repo_id, kind, info.sha or revision, tuple(files))


def _file(sibling: Any) -> HubFile:
    return HubFile(
        sibling.rfilename,
        sibling.size or 0,
        sibling.lfs.sha256 if sibling.lfs else sibling.blob_id or "",
    )


def download(progress: Progress, listing: Listing, files: list[HubFile]) -> Path:
    """Bring files of a repository into the Hub's own cache and return the folder of that commit.

    The library downloads in a thread of its own and resumes what it had; progress is read off the bytes on disk. A
    cancelled job ends its process, and the thread with it.
    """
    total = sum(file.size for file in files)
    name = file_download.repo_folder_name(repo_id=listing.repo_id, repo_type=listing.kind)
    blobs = Path(constants.HF_HUB_CACHE) / name / "blobs"
    _require_space(total - _on_disk(blobs, files))
    progress.start(f"Downloading {listing.repo_id}", unit="bytes", total=total)
    with hub_errors(listing.repo_id):
        future = _in_thread(
            lambda: snapshot_download(
                listing.repo_id,
                repo_type=listing.kind,
                revision=listing.commit,
                allow_patterns=[file.path for file in files],
            )
        )
        while True:
            try:
                return Path(future.result(timeout=0.5))
            except TimeoutError:
                progress(min(_on_disk(blobs, files), total), total)


def _in_thread(call: Any) -> Future[str]:
    future: Future[str] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="hub").start()
    return future


def _on_disk(blobs: Path, files: list[HubFile]) -> int:
    """Bytes of these files that are here, finished or not."""
    return sum(min(_bytes(blobs, file.etag), file.size) for file in files)


def _bytes(blobs: Path, etag: str) -> int:
    sizes = []
    for path in blobs.glob(f"{etag}*") if etag else ():
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:  # just renamed by the download
            continue
    return max(sizes, default=0)


def _require_space(need: int) -> None:
    folder = Path(constants.HF_HUB_CACHE)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free - settings.DISK_RESERVE
    if need > free:
        raise JobError(
            f"This needs {need / 1e9:.2f} GB and the disk of {folder} has {max(free, 0) / 1e9:.2f} GB to spare.",
            "Free some space there, or set HF_HOME to a larger disk, then press Retry.",
        )


def matching(files: tuple[HubFile, ...], *patterns: str) -> list[HubFile]:
    """Files at the top of the repository whose names match one of the patterns."""
    return [file for file in files if "/" not in file.path and any(fnmatch(file.path, pattern) for pattern in patterns)]
