"""The Hugging Face Hub: what a repository holds at a commit, parts of its files, and its files on this machine.

Files go into the Hub's standard cache, where every other program finds them. Nothing here needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, file_download, get_hf_file_metadata, hf_hub_url
from huggingface_hub.utils import get_session, hf_raise_for_status

from saehub.causes import disk_is_full
from saehub.disk import free_bytes
from saehub.figures import bytes_text
from saehub.jobs.progress import JobError, Progress
from saes.hub_client import HubError, ask, explain, headers, hub_errors
from saes.hub_fetch import Transfer
from saes.hub_listing import COMMIT, HubFile, Listing, list_repository, matching

__all__ = [
    "FileHead",
    "HubError",
    "HubFile",
    "Listing",
    "download",
    "file_head",
    "hub_errors",
    "list_repository",
    "matching",
    "read_range",
]

LARGEST_RANGE = 64 * 1024 * 1024


# -- parts of a file
@dataclass(frozen=True)
class FileHead:
    size: int | None  # None: not said
    etag: str
    commit: str


def file_head(
    repo_id: str, path: str, revision: str = "", token: str | None = None, kind: str = "model"
) -> FileHead:  # fmt: skip
    """Size, content hash and commit of one file, without its content. Raises HubError."""
    with hub_errors(repo_id, path, kind):
        url = _url(repo_id, path, revision, kind)
        found = ask(lambda: get_hf_file_metadata(url, headers=headers(token), token=False))
    return FileHead(found.size, found.etag or "", found.commit_hash or "")


def read_range(
    repo_id: str, path: str, revision: str, start: int, end: int, token: str | None = None, kind: str = "model"
) -> bytes:
    """Bytes [start, end) of a file on the Hub; fewer when the file ends before. At most 64 MB. Raises HubError.

    They cannot be checked against the file's hash: use them to look, not to compute with.
    """
    if not 0 <= start < end or end - start > LARGEST_RANGE:
        raise ValueError(f"Bytes {start} to {end} are not a range that can be read.")
    if here := _here(repo_id, path, revision, kind):
        with here.open("rb") as handle:
            handle.seek(start)
            return handle.read(end - start)
    with hub_errors(repo_id, path, kind):
        url = _url(repo_id, path, revision, kind)
        return ask(lambda: _range(url, path, start, end, token))


def _here(repo_id: str, path: str, revision: str, kind: str) -> Path | None:
    """The file in the cache, when the revision is a commit and it is there."""
    if not COMMIT.fullmatch(revision):
        return None
    found = file_download.try_to_load_from_cache(repo_id, path, revision=revision, repo_type=kind)
    return Path(found) if isinstance(found, str) else None


def _url(repo_id: str, path: str, revision: str, kind: str) -> str:
    return hf_hub_url(repo_id, path, repo_type=kind, revision=revision or None)


def _range(url: str, path: str, start: int, end: int, token: str | None) -> bytes:
    asked = headers(token) | {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=asked) as response:
        if response.status_code == 416:  # it ends before `start`
            return b""
        hf_raise_for_status(response)
        skip = start if response.status_code == 200 else 0  # it does not know ranges: what comes before is thrown away
        said = response.headers.get("content-range", "")
        if (response.status_code == 206 and not said.startswith(f"bytes {start}-")) or skip > LARGEST_RANGE:
            raise HubError(f"The Hub answered another part of {path} than the one asked for.", "Press Retry later.")
        body = bytearray()
        for chunk in response.iter_bytes():
            body += chunk
            if len(body) >= skip + end - start:
                break
    return bytes(body[skip : skip + end - start])


# -- whole files
def download(progress: Progress, listing: Listing, files: list[HubFile], token: str | None = None) -> Path:
    """Bring files of a repository into the Hub's own cache and return the folder of that commit.

    Each is checked against the hash the listing gives, also one that was here already. What is here is not fetched
    again, and a file that was cut off goes on where it ended. Raises HubError, JobError for a full disk, and Cancelled.
    """
    total = sum(file.size for file in files)
    here = listing.cached(files)
    if listing.offline and here < total:
        raise explain(ConnectionError(), listing.repo_id)
    _require_space(total - here)
    progress.start(f"Downloading {listing.repo_id}", unit="bytes", total=total)
    if here:
        progress.log(f"{here / 1e6:,.1f} of {total / 1e6:,.1f} MB are in the Hub's cache already")
    try:
        with hub_errors(listing.repo_id, kind=listing.kind):
            Transfer(listing, files, token).run(progress)
    except OSError as error:
        if not disk_is_full(error):
            raise
        raise JobError(
            f"The disk of {constants.HF_HUB_CACHE} became full while {listing.repo_id} was downloaded.",
            "Free some space there, or set HF_HOME to a larger disk, then press Retry; what was brought stays.",
        ) from error
    return listing.snapshot


def free_for_downloads() -> int:
    """Bytes that downloads may still take of the disk of the Hub's cache."""
    folder = Path(constants.HF_HUB_CACHE)
    folder.mkdir(parents=True, exist_ok=True)
    return free_bytes(folder)


def _require_space(need: int) -> None:
    free = free_for_downloads()
    if need > free:
        raise JobError(
            f"This needs {bytes_text(need)} and the disk of {constants.HF_HUB_CACHE} has {bytes_text(free)} to spare.",
            "Free some space there, or set HF_HOME to a larger disk, then press Retry.",
        )
