"""SAEs as the API shows them."""

from __future__ import annotations

from typing import Any

from django.http import Http404
from ninja import Field, Schema
from pydantic import ConfigDict

from saehub.accounts.api_access import Problem
from saehub.accounts.api_pages import Page
from saehub.jobs.models import Job
from saehub.jobs.runner import summary
from saes.abilities import abilities
from saes.models import SAE
from saes.one_sae import refusal_of
from saes.sharing import licence_of
from saes.tags import starred_by

LIST_EXAMPLE: Any = {
    "id": 12, "name": "gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82", "state": "ready", "source": "hub",
    "curation": "reviewed", "model": "gemma-2-2b", "hook_name": "blocks.12.hook_resid_post", "hook_name_out": "",
    "site": "resid_post", "layer": 12, "architecture": "jumprelu", "d_in": 2304, "d_sae": 16384, "k": None,
    "format": "saelens", "repo_id": "google/gemma-scope-2b-pt-res", "repo_path": "layer_12/width_16k/average_l0_82",
    "revision": "fd571b47c1c64851e9b1989792367b9babb4af63", "size_bytes": 302123456, "l0": None, "published_l0": 82.0,
    "explained_variance": None, "published_variance": None, "tags": ["paper"], "owner": None,
    "created_at": "2026-11-22T08:00:00Z",
}  # fmt: skip


class SAEOut(Schema):
    """An SAE of the list. What is null is not known."""

    model_config = ConfigDict(json_schema_extra={"examples": [LIST_EXAMPLE]})

    id: int
    name: str
    state: str
    source: str
    curation: str
    model: str
    hook_name: str
    hook_name_out: str
    site: str
    layer: int | None
    architecture: str
    d_in: int | None
    d_sae: int | None
    k: int | None
    format: str
    repo_id: str
    repo_path: str
    revision: str
    size_bytes: int | None
    l0: float | None
    published_l0: float | None
    explained_variance: float | None
    published_variance: float | None
    tags: list[str]
    owner: str | None
    created_at: Any


class SAEDetail(SAEOut):
    """One SAE with everything that is known of it."""

    release: str | None
    sae_id: str
    aliases: list[Any]
    neuronpedia_id: str
    sha256: str
    checksums: dict[str, Any]
    files: str | None
    facts: dict[str, Any]
    asked: list[str]
    proof: dict[str, Any]
    metrics: dict[str, Any]
    notes: str
    read_at: Any
    verified_at: Any
    ready_at: Any
    job: dict[str, Any] | None
    cannot: dict[str, str]
    licence: str
    pin: str
    starred: bool


class SAEPage(Page[SAEOut]):
    """SAEs of the list, and the counts of every filter's values where they were asked for."""

    facets: dict[str, dict[str, int]] | None = None


STARTED: Any = {
    "sae": 12, "job": {"id": 40, "state": "queued"}, "job_ids": [40], "saes": [{"sae": 12, "job": 40, "state": "queued"}],
}  # fmt: skip


class Started(Schema):
    """What was queued. `sae` and `job` are those of a single SAE; several are in `saes`. `job_ids`: what is still on."""

    model_config = ConfigDict(json_schema_extra={"examples": [STARTED]})

    sae: int | None = None
    job: dict[str, Any] | None = None
    job_ids: list[int]
    saes: list[dict[str, Any]] = Field(default_factory=list)


def row_of(pk: int) -> SAE:
    """Raises Http404, or Problem 404 with the fault where its import was refused."""
    row = SAE.objects.select_related("owner", "job", "model", "release").filter(pk=pk).first()
    if row is None and (job := refusal_of(pk)):
        what = "import" if job.kind == "adopt" else "download"
        raise Problem(404, f"The {what} of SAE {pk} was refused. {job.error}".strip(), job=job.pk)
    if row is None:
        raise Http404
    return row


def brief(row: SAE) -> dict[str, Any]:
    """An SAE in a list."""
    names = (
        "name", "state", "source", "curation", "hook_name", "hook_name_out", "site", "layer", "architecture", "d_in",
        "d_sae", "k", "format", "repo_id", "repo_path", "revision", "l0", "published_l0", "explained_variance",
        "published_variance", "tags", "created_at",
    )  # fmt: skip
    return {name: getattr(row, name) for name in names} | {
        "id": row.pk,
        "model": row.model_name,
        "size_bytes": row.size_bytes or None,
        "owner": row.owner.get_username() if row.owner else None,
    }


def whole(row: SAE, user: Any) -> dict[str, Any]:
    """An SAE with all that is known of it, and whether this person starred it."""
    names = (
        "sae_id", "aliases", "neuronpedia_id", "sha256", "checksums", "facts", "asked", "proof", "metrics", "notes",
        "read_at", "verified_at", "ready_at", "pin",
    )  # fmt: skip
    return brief(row) | {name: getattr(row, name) for name in names} | {
        "release": row.release.name if row.release else None,
        "files": str(row.files) if row.ready else None,
        "job": summary(row.job) if row.job else None,
        "licence": licence_of(row),
        "starred": row.pk in starred_by(user),
        "cannot": {action: why for action, why in abilities(row).items() if why},
    }  # fmt: skip


Pair = tuple[int | None, int | None]  # the numbers of an SAE and of its job


def pairs(rows: list[SAE]) -> list[Pair]:
    return [(row.pk, row.job_id) for row in rows]


def pairs_of(body: dict[str, Any]) -> list[Pair]:
    """What `started` was given, read off its answer."""
    return [(one["sae"], one["job"]) for one in body["saes"]]


def started(found: list[Pair]) -> dict[str, Any]:
    """Answer of what brings SAEs, as they and their jobs stand now. A refused import has a job and no state."""
    rows = SAE.objects.select_related("job").in_bulk([sae for sae, _ in found if sae])
    jobs = Job.objects.in_bulk([job for _, job in found if job])
    one = found[0] if len(found) == 1 else (None, None)
    return {
        "sae": one[0],
        "job": summary(jobs[one[1]]) if one[1] in jobs else None,
        "job_ids": [job.pk for job in jobs.values() if job.is_live],
        "saes": [{"sae": sae, "job": job, "state": rows[sae].state if sae in rows else None} for sae, job in found],
    }
