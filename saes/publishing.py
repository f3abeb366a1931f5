"""Put an SAE on the Hub: its repository, its files in one commit, its model card; by plain uploads whose bytes are counted."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import CommitOperationAdd, HfApi, constants, errors

from saehub.accounts.access import OTHERS
from saehub.accounts.hub_tokens import hub_token
from saehub.accounts.models import HubToken
from saehub.causes import chain_of
from saehub.jobs.progress import Cancelled, JobError, LeaseLost, Progress
from saes import hub
from saes.exporting import work_folder, write_files
from saes.history import note
from saes.hub_client import HubError, explain
from saes.models import SAE

CARD = "README.md"


def upload(
    progress: Progress, row: SAE, *, form: str, repo_id: str, path: str, private: bool, licence: str
) -> dict[str, Any]:
    """Write the SAE in a format and commit it to `path` of a repository of the Hub, which is made when there is none.

    Nothing appears there until the one commit that has all of it. Run again it sends only what the Hub has not yet.
    Raises HubError with what the Hub refuses, JobError, and what `write_files` raises.
    """
    token = _token(progress)
    with work_folder(row, "upload") as folder:
        write_files(progress, row, form, folder / "sae", licence=licence, repo_id=repo_id, path=path)
        api = HfApi(endpoint=constants.ENDPOINT, token=token)
        try:
            progress.start(f"Asking the Hub for {repo_id}", unit="steps")
            api.create_repo(repo_id, private=private, exist_ok=True)
            names = {file.path for file in hub.list_repository(repo_id, token=token).files}
            commit = _commit(progress, api, repo_id, _files(folder / "sae", path, names), f"Add {row.name}"[:200])
        except (errors.HfHubHTTPError, httpx2.HTTPError, RuntimeError, ValueError, ConnectionError) as error:
            raise _said(error, repo_id) from None
    url = f"{constants.ENDPOINT}/{repo_id}/tree/{commit}/{path}".rstrip("/")
    note(progress.job.owner, row, f"Uploaded to {repo_id}{f':{path}' if path else ''} at {commit[:12]}")
    progress.log(f"It is at {url}")
    return {"sae": row.pk, "repo_id": repo_id, "path": path, "commit": commit, "url": url, "format": form}


def _token(progress: Progress) -> str:
    """A token that may write in the name of who asked. Raises JobError."""
    owner = progress.job.owner
    own = owner is not None and (HubToken.objects.filter(owner=owner).exists() or owner.has_perm(OTHERS))
    token = hub_token(owner) if own else None
    if not token:
        raise JobError(
            "Uploads need a Hub token, and there is none.",
            "Set one with write access in your account, then press Retry.",
        )
    return token


def _files(folder: Path, path: str, there: set[str]) -> dict[str, Path]:
    """{name in the repository: file}. The card goes beside the SAE, and to the top where the repository has none."""
    below = f"{path}/" if path else ""
    found = {
        f"{below}{file.relative_to(folder).as_posix()}": file for file in sorted(folder.rglob("*")) if file.is_file()
    }
    return found if CARD in there or not path else found | {CARD: folder / CARD}


class _Counted(io.BufferedReader):
    """A file that tells how much of it was read: once to be hashed, once to be sent."""

    def __init__(self, path: Path, tick: Any) -> None:
        super().__init__(io.FileIO(path))
        self._tick = tick

    def read(self, size: int | None = -1, /) -> bytes:
        found = super().read(size)
        self._tick(len(found))
        return found


def _commit(progress: Progress, api: HfApi, repo_id: str, files: dict[str, Path], message: str) -> str:
    total = 2 * sum(file.stat().st_size for file in files.values())
    progress.start(f"Hashing and uploading to {repo_id}", unit="bytes", total=total)
    done = 0

    def tick(n: int) -> None:
        nonlocal done
        done = min(done + n, total)
        progress(done, total)

    opened = {name: _Counted(file, tick) for name, file in files.items()}
    try:
        operations = [CommitOperationAdd(name, file) for name, file in opened.items()]
        for operation in operations:  # one by one: of several at once the library makes threads
            api.preupload_lfs_files(repo_id, [operation], free_memory=False)
        found = api.create_commit(repo_id, operations, commit_message=message)
    finally:
        for file in opened.values():
            file.close()
    return str(found.oid)


def _said(error: Exception, repo_id: str) -> Exception:
    """What stopped an upload, in words. What the library wrapped (a cancel, a lost lease, the Hub's answer) comes out again."""
    for cause in chain_of(error):
        if isinstance(cause, Cancelled | LeaseLost | JobError):
            return cause
    for cause in chain_of(error):
        if isinstance(cause, errors.HfHubHTTPError):
            return _refused(cause, repo_id)
        if isinstance(cause, httpx2.HTTPError):
            return explain(cause, repo_id)
    return HubError(f"The Hub did not take the files for {repo_id}: {' '.join(str(error).split())[:300]}")


def _refused(error: errors.HfHubHTTPError, repo_id: str) -> Exception:
    status = error.response.status_code
    if status in (401, 403):
        return HubError(
            f"The Hub does not let this token write to {repo_id}.",
            "Give your token write access there (its scopes are set on the Hub), or choose a repository of your own.",
        )
    if status in (409, 412):
        return HubError(f"{repo_id} was changed by somebody else at this moment.", "Press Retry.")
    if status == 400:
        said = str(getattr(error, "server_message", "") or "").strip()
        return HubError(
            f"The Hub refused the commit to {repo_id}. {said}".strip(), "Change what it names, and upload again."
        )
    return explain(error, repo_id)
