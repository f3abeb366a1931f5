"""Take an SAE out of the registry, or only its files off this machine. Pages and API call the same function."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from django.core.exceptions import PermissionDenied

from saehub.accounts.access import OTHERS, allowed
from saes.checksums import published
from saes.dependents import live_jobs, live_jobs_of_rows, users
from saes.history import DELETION, note
from saes.models import SAE


class InUse(Exception):
    """Somebody is using it; `users` says who, a sentence each."""

    def __init__(self, sentences: list[str]) -> None:
        super().__init__(" ".join(sentences))
        self.users = sentences


@dataclass(frozen=True)
class Cached:
    """An SAE's files in the Hub's cache: those that nothing else needs, and how many stay because something does."""

    files: list[Path]  # links of snapshots
    blobs: list[Path]
    bytes: int
    shared: int


def may_remove(user: Any, sae: SAE, *, force: bool = False) -> bool:
    """Owners may remove their own; what belongs to nobody, or is in use, only who may act for others."""
    if not allowed(user, "saes.delete_sae", sae):
        return False
    return bool(user.has_perm(OTHERS)) if force or sae.owner_id is None else True


def remove(sae: SAE, user: Any, *, keep_row: bool = False, from_cache: bool = True, force: bool = False) -> str:
    """Delete the SAE with its files, or with `keep_row` only the files; a sentence says what was done.

    Raises PermissionDenied, or InUse while jobs, runs or generations need it and `force` is not given; with it they
    are cancelled.
    """
    if not may_remove(user, sae, force=force):
        raise PermissionDenied
    if keep_row and not sae.repo_id:
        raise ValueError(
            "Only an SAE of the Hub can be kept in the list without its files: nothing could bring it back."
        )
    busy = users(sae)
    if busy and not force:
        raise InUse(busy)
    for job in [*live_jobs(sae), *live_jobs_of_rows(sae)]:
        job.cancel()
    cached = in_cache(sae) if from_cache else None
    if keep_row:
        _forget_files(sae)
        note(user, sae, "Files removed from this machine")
        said = f"The files of {sae.name} were removed; it stays in the list."
    else:
        note(user, sae, "Deleted", DELETION)
        sae.delete()
        said = f"{sae.name} was deleted."
    return f"{said} {_clear(cached)}".strip() if cached else said


def _forget_files(sae: SAE) -> None:
    """Back to a row of the catalogue: what is known of the SAE stays, what was said of its files here goes."""
    folders = sae.own_files()
    source = sae.proof.get("source", {})
    sae.format = sae.proof.get("source_format", sae.format)
    sae.size_bytes = sum(entry["bytes"] for entry in source.values()) or sae.size_bytes
    sae.path, sae.checksums, sae.proof = "", {}, {}
    sae.ready_at = sae.verified_at = sae.job = None
    changed = ["format", "size_bytes", "path", "checksums", "proof", "ready_at", "verified_at", "job"]
    sae.save(update_fields=changed)  # whatever else somebody says of it meanwhile stays
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def in_cache(sae: SAE) -> Cached | None:
    """Its files in the Hub's cache, or None when there are none. Files another ready row came from count as shared."""
    names = set(published(sae)) if sae.repo_id and sae.ready else set()
    if not names:
        return None
    others = {
        name
        for row in SAE.objects.ready().filter(repo_id=sae.repo_id).exclude(pk=sae.pk)
        if row.revision == sae.revision
        for name in published(row)
    }
    mine = {path: blob for name, path, blob in _links(sae, names) if name not in others}
    shared = len(names & others)
    if not mine:
        return Cached([], [], 0, shared) if shared else None
    elsewhere = {blob for _, path, blob in _links(sae) if path not in mine}
    blobs = sorted({blob for blob in mine.values() if blob not in elsewhere})
    return Cached(sorted(mine), blobs, sum(blob.stat().st_size for blob in blobs), shared)


def _links(sae: SAE, names: set[str] | None = None) -> Iterator[tuple[str, Path, Path]]:
    """(name, path in the snapshot, blob) of the repository's cached files; with `names` only those, of its commit."""
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        cache = scan_cache_dir(constants.HF_HUB_CACHE)
    except CacheNotFound:
        return
    for repo in cache.repos:
        if repo.repo_id != sae.repo_id or repo.repo_type != "model":
            continue
        for revision in repo.revisions:
            if names is not None and sae.revision and revision.commit_hash != sae.revision:
                continue
            for file in revision.files:
                name = str(file.file_path.relative_to(revision.snapshot_path))
                if names is None or name in names:
                    yield name, file.file_path, file.blob_path


def _clear(cached: Cached) -> str:
    for path in [*cached.files, *cached.blobs]:
        path.unlink(missing_ok=True)
    stay = f" {cached.shared} of its files stay in the Hub's cache: other SAEs use them." if cached.shared else ""
    return f"{cached.bytes / 1e6:,.1f} MB of the Hub's cache were freed.{stay}"
