"""Which SAEs have the same weights, told from the Hub's own checksums before anything of them is fetched.

Of large files the Hub keeps the SHA-256, which is what `SAE.sha256` is made of (saes/checksums.py). Where it tells another
hash, as of small files, nothing is said: that two SAEs are the same is never guessed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from saes.checksums import is_weights, weights_digest
from saes.layouts import files_at
from saes.models import SAE

SHA256 = 64  # hexadecimal digits; git's hash has 40


def told(files: Iterable[Any]) -> str:
    """What `SAE.sha256` will be of these files of a listing (saes.hub.HubFile); "" where the Hub does not tell."""
    weights = {file.path: {"sha256": file.etag} for file in files if is_weights(file.path)}
    return weights_digest(weights) if all(len(entry["sha256"]) == SHA256 for entry in weights.values()) else ""


def here_as(listing: Any, found: Iterable[Any]) -> dict[str, SAE]:
    """{path: an SAE that is here and has the weights that lie there}, of places in a listing. One query."""
    digests = {one.path: told(files_at(one.format, one.path, listing.files)) for one in found}
    here = ready_with(digests.values())
    twins = {path: here[digest] for path, digest in digests.items() if digest in here}
    return {path: row for path, row in twins.items() if (row.repo_id, row.repo_path) != (listing.repo_id, path)}


def ready_with(digests: Iterable[str]) -> dict[str, SAE]:
    """{digest: the oldest SAE that is here and has these weights}. One query, however many are asked for."""
    rows = SAE.objects.ready().filter(sha256__in={digest for digest in digests if digest})
    return {
        row.sha256: row for row in rows.only("pk", "name", "sha256", "repo_id", "repo_path", "ready_at").order_by("-pk")
    }


def twins_of(sae: SAE) -> list[SAE]:
    """A few other SAEs with its weights, those that are here first."""
    if not sae.sha256:
        return []
    same = SAE.objects.filter(sha256=sae.sha256).exclude(pk=sae.pk).only("pk", "name", "ready_at", "job_id")
    return sorted(same.order_by("pk")[:5], key=lambda row: row.ready_at is None)
