"""Bring an SAE's files from the Hub and make its row ready: list, choose its files, fetch, adopt, pin to the commit."""

from __future__ import annotations

import difflib
import posixpath
from typing import Any

from saehub.accounts.hub_tokens import hub_token
from saehub.jobs.progress import JobError, Progress
from saes import hub
from saes.checksums import WEIGHTS
from saes.dependents import dependents
from saes.history import DELETION, note
from saes.hub import HubFile, Listing
from saes.hub_access import remember_once
from saes.layouts import files_at
from saes.models import SAE
from saes.same_weights import told


class NothingThere(JobError):
    """The repository has no SAE at that place, whatever is tried again."""


def bring(progress: Progress, row: SAE) -> dict[str, Any]:
    """Make `row` ready with the files at its place on the Hub. Run again, it goes on with what is here.

    The row is pinned to the commit before its files are fetched, so that a second attempt asks for the same ones.
    Raises HubError for what the Hub refuses, JobError for what is not there, and what `adopt_files` raises.
    """
    from saes.adopt import adopt_files

    if row.all_here:
        progress.log(f"{row.name} is here already")
        return {"sae": row.pk, "format": row.format, "sha256": row.sha256}
    if not row.repo_id:
        raise JobError(f"{row.name} has no repository to download it from.", "Import its files instead.")
    token = hub_token(progress.job.owner)
    progress.start(f"Asking the Hub for {row.repo_id}", unit="steps")
    listing = hub.list_repository(row.repo_id, row.revision, token=token)
    try:
        files = files_of(row, listing)
    except NothingThere:
        _forget(progress, row)
        raise
    if row.revision != listing.commit:
        row.revision = listing.commit
        row.save(update_fields=["revision"])
    if digest := told(files):
        _name_twin(progress, row, digest)
    folder = hub.download(progress, listing, files, token)
    if not listing.offline:
        remember_once(row.repo_id, token)
    made = adopt_files(progress, row, folder / row.repo_path, {})
    return made | {"commit": listing.commit, "bytes": sum(file.size for file in files)}


def _name_twin(progress: Progress, row: SAE, digest: str) -> None:
    """Say before the first byte is fetched that the weights are here already: Cancel saves it."""
    twin = SAE.objects.ready().filter(sha256=digest).exclude(pk=row.pk).only("pk", "name").first()
    if twin is not None:
        progress.log(
            f"The same weights are here already, as {twin.name} (SAE {twin.pk}); what is fetched is a second copy"
        )


def _forget(progress: Progress, row: SAE) -> None:
    """A row that was made for this download alone goes with its mistake: the job says what was asked for, and why not."""
    only_asked_for = row.release_id is None and row.read_at is None and not row.ready
    if only_asked_for and not row.notes and row.curation == SAE.Curation.DRAFT and not dependents(row):
        note(progress.job.owner, row, "Nothing is there: not registered", DELETION)
        row.delete()


def files_of(row: SAE, listing: Listing) -> list[HubFile]:
    """The files of the repository that belong to this SAE. Raises NothingThere when there are none with weights."""
    entry = row.repo_path.strip("/")
    files = files_at(row.format, entry, listing.files)
    if not any(file.path.endswith(WEIGHTS) for file in files):
        if listing.offline:
            raise JobError(
                f"{row.repo_id} is only in part on this machine, and the Hub cannot be reached.", "Press Retry later."
            )
        raise _nothing_there(row, entry, [file.path for file in listing.files])
    return files


def _nothing_there(row: SAE, entry: str, names: list[str]) -> NothingThere:
    places = {posixpath.dirname(name) for name in names if name.endswith(WEIGHTS)} | set(names)
    near = difflib.get_close_matches(entry, sorted(places - {""}), n=3, cutoff=0.5)
    hint = f"The nearest are: {', '.join(near)}." if near else "Look at its files on the Hub and name a folder or file."
    where = f"at {entry}" if entry else "at its top"
    return NothingThere(f"{row.repo_id} has no SAE weights {where}.", hint)
