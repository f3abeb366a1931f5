"""The Hub's cache on this machine: what lies in it, what of that is needed here, and what can go."""

from __future__ import annotations

import shutil
import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from huggingface_hub import CacheNotFound, constants, scan_cache_dir

from saehub.jobs.models import LIVE
from saes.models import SAE, LanguageModel

STALE_SECONDS = 24 * 3600.0  # an unfinished file that nobody has written to for so long


@dataclass(frozen=True)
class Revision:
    """A repository at a commit, as the cache has it. `users`: rows of this instance that need these files."""

    repo_id: str
    kind: str  # model | dataset | space
    commit: str
    size: int  # bytes that would be free without it; what it shares with another revision counts for both
    files: int
    used_at: datetime
    users: tuple[Any, ...]
    busy: bool  # something of its repository is being brought here

    @property
    def free(self) -> bool:
        """Whether it may go."""
        return not (self.users or self.busy)

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.repo_id}@{self.commit}"


@dataclass(frozen=True)
class Unfinished:
    """Rests of downloads that ended long ago; a download that is tried again would go on from them."""

    files: list[Path]
    size: int


@dataclass(frozen=True)
class Cache:
    folder: str
    size: int
    free_disk: int
    revisions: list[Revision]
    unfinished: Unfinished

    @property
    def prunable(self) -> int:
        """Bytes of what nothing here needs."""
        return sum(one.size for one in self.revisions if one.free)


@dataclass(frozen=True)
class Pruned:
    """What goes, or went: revisions, rests, and the bytes that are free then."""

    revisions: list[Revision]
    unfinished: int
    size: int
    kept: list[str]  # asked for, and not free


def look() -> Cache:
    """What is in the cache now."""
    folder = Path(constants.HF_HUB_CACHE)
    anchor = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(anchor).free
    try:
        found = scan_cache_dir(folder)
    except CacheNotFound:
        return Cache(str(folder), 0, free, [], Unfinished([], 0))
    needed, busy = _needed(folder), _busy()
    revisions = [
        Revision(
            repo.repo_id,
            repo.repo_type,
            one.commit_hash,
            one.size_on_disk,
            one.nb_files,
            datetime.fromtimestamp(
                max((file.blob_last_accessed for file in one.files), default=one.last_modified), UTC
            ),
            tuple(needed[repo.repo_type, repo.repo_id, one.commit_hash] + needed[repo.repo_type, repo.repo_id, ""]),
            repo.repo_id in busy,
        )
        for repo in found.repos
        for one in repo.revisions
    ]
    revisions.sort(key=lambda one: (one.free, one.size), reverse=True)
    return Cache(str(folder), found.size_on_disk, free, revisions, _unfinished(folder, busy))


def _needed(folder: Path) -> dict[tuple[str, str, str], list[Any]]:
    """Rows by (kind, repository, commit) that they need; commit "" is any. SAEs that were converted lie elsewhere."""
    found: dict[tuple[str, str, str], list[Any]] = defaultdict(list)
    here = SAE.objects.ready().exclude(repo_id="").only("pk", "name", "repo_id", "revision", "path")
    for sae in here:
        if sae.files.is_relative_to(folder):
            found["model", sae.repo_id, sae.revision].append(sae)
    for model in LanguageModel.objects.filter(source=LanguageModel.Source.HUB).ready():
        found["model", model.location, model.revision].append(model)
    return found


def _busy() -> set[str]:
    """Repositories of which something is waiting or on its way."""
    saes = SAE.objects.filter(job__state__in=LIVE, ready_at=None).values_list("repo_id", flat=True)
    models = LanguageModel.objects.filter(job__state__in=LIVE, ready_at=None).values_list("location", flat=True)
    return {*saes, *models}


def _unfinished(folder: Path, busy: set[str]) -> Unfinished:
    old = time.time() - STALE_SECONDS
    found, size = [], 0
    for path in folder.glob("*--*/blobs/*.incomplete"):
        with suppress(FileNotFoundError):  # finished, or removed, meanwhile
            repo_id, facts = "/".join(path.parents[1].name.split("--")[1:]), path.stat()
            if repo_id not in busy and facts.st_mtime < old:
                found.append(path)
                size += facts.st_size
    return Unfinished(found, size)


def prune(keys: Iterable[str], *, unfinished: bool = False, dry_run: bool = True) -> Pruned:
    """Take revisions, named by their keys, out of the cache; with `dry_run` only say what would go.

    What something here needs stays, whoever asked for it.
    """
    cache, wanted = look(), set(keys)
    going = [one for one in cache.revisions if one.key in wanted and one.free]
    rests = cache.unfinished if unfinished else Unfinished([], 0)
    gone = {one.key for one in going}
    folder = Path(cache.folder)
    plan = scan_cache_dir(folder).delete_revisions(*(one.commit for one in going)) if going else None
    if plan is not None and {one.commit for one in cache.revisions if one.key not in gone} & {
        one.commit for one in going
    }:
        raise ValueError("Two repositories have a commit of the same name, so neither of them is touched.")
    size = (plan.expected_freed_size if plan else 0) + rests.size
    if not dry_run:
        if plan is not None:
            plan.execute()
        for path in rests.files:
            path.unlink(missing_ok=True)
    return Pruned(going, len(rests.files), size, sorted(wanted - gone))
