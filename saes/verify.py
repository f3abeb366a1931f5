"""Are an SAE's files still what they were, and are they what the Hub has?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from django.utils import timezone

from saehub.accounts.hub_tokens import hub_token
from saehub.jobs.progress import JobError, Progress
from saes import hub
from saes.checksums import digest, git_digest, published
from saes.models import SAE


def verify_files(progress: Progress, row: SAE) -> dict[str, Any]:
    """Hash the SAE's files and compare: with what was noted when they came, then with the Hub's listing of the commit.

    Sets `verified_at` when all agree, and takes it away when they do not. Raises JobError, naming what differs.
    """
    if not row.ready:
        raise JobError(f"{row.name} has no files on this machine.", "Download it first.")
    anchor = row.files if row.files.is_dir() else row.files.parent
    known = row.checksums or {"sae_weights.safetensors": {"sha256": row.sha256}}
    total = sum(entry.get("bytes", 0) for entry in known.values())
    progress.start("Hashing its files", unit="bytes", total=total or None)
    done = 0

    def tick(n: int) -> None:
        nonlocal done
        done += n
        progress(done, total or None)

    faults = [fault for name, entry in known.items() if (fault := _fault(anchor / name, name, entry, tick))]
    asked, differs = _on_the_hub(progress, row)
    faults += differs
    row.verified_at = None if faults else timezone.now()
    row.save(update_fields=["verified_at"])
    if faults:
        raise JobError(" ".join(faults), "Remove its files on its delete page, then download or import it again.")
    progress.log(f"{len(known)} files are what they were{', and what the Hub has' if asked else ''}")
    return {"sae": row.pk, "files": len(known), "hub": asked}


def _fault(path: Path, name: str, entry: dict[str, Any], tick: Any) -> str:
    if not path.is_file():
        return f"{name} is missing."
    size = path.stat().st_size
    if "bytes" in entry and size != entry["bytes"]:
        return f"{name} has {size:,} bytes; it had {entry['bytes']:,}."
    return "" if digest(path, tick) == entry["sha256"] else f"{name} is not what it was: its SHA-256 has changed."


def _found(sha256: str, path: Path | None, etag: str) -> str | None:
    """What is here under a name, as the Hub names its contents; None where that cannot be said, or the file is gone."""
    if len(etag) == len(sha256):
        return sha256
    return git_digest(path) if path is not None and path.is_file() else None


def _on_the_hub(progress: Progress, row: SAE) -> tuple[int, list[str]]:
    """(files that the Hub could be asked about, what differs from it). What cannot be asked is said in the log."""
    if not row.repo_id:
        return 0, []
    try:
        listing = hub.list_repository(row.repo_id, row.revision, token=hub_token(progress.job.owner))
    except JobError as error:  # gated, gone, too slow: the files here are judged without it
        progress.log(f"The Hub was not asked: {error}")
        return 0, []
    if listing.offline:
        progress.log("The Hub was not asked: it is out of reach.")
        return 0, []
    there = {file.path: file.etag for file in listing.files}
    asked, faults = 0, []
    for name, (sha256, path) in published(row).items():
        etag = there.get(name)
        found = _found(sha256, path, etag) if etag else None
        if found is not None:
            asked += 1
            if found != etag:
                faults.append(f"{name} is not what {row.repo_id} has at {listing.commit[:12]}.")
    return asked, faults
