"""The Hub's cache of this machine by /api/v1."""

from __future__ import annotations

from typing import Any

from django.http import HttpRequest
from ninja import Router, Schema
from pydantic import ConfigDict, Field

from saehub.accounts.api_access import Needs, Problem
from saehub.accounts.api_pages import like
from saes.cache import Revision, look, prune
from saes.cache_views import MOST, surroundings

router = Router(tags=["Hub cache"])
KEY = "model/google/gemma-scope-2b-pt-res@fd571b47c1c64851e9b1989792367b9babb4af63"
ROW: Any = {"key": KEY, "repo_id": "google/gemma-scope-2b-pt-res", "kind": "model", "commit": KEY[-40:], "files": 2,
            "size": 302123456, "used_at": "2026-11-22T08:00:00Z", "users": [12], "free": False}  # fmt: skip
CACHE: Any = {"folder": "/root/.cache/huggingface/hub", "size": 302123456, "free_disk": 41000000000, "prunable": 0,
              "unfinished": {"files": 0, "bytes": 0}, "revisions": [ROW],
              "surroundings": {"HF_ENDPOINT": "https://huggingface.co"}}  # fmt: skip
PRUNED: Any = {"dry_run": True, "bytes": 302123456, "revisions": [ROW], "unfinished": 0, "kept": []}


class PruneIn(Schema):
    """What to take out, by the keys of the listing; nothing is deleted unless `dry_run` is false."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"revisions": [KEY], "dry_run": True}]})

    revisions: list[str] = Field(default_factory=list, max_length=MOST)
    unfinished: bool = False
    dry_run: bool = True


@router.get("/cache", auth=Needs("saes.view_sae"), response=like(CACHE), summary="What is in the Hub's cache")
def cache_detail(request: HttpRequest) -> dict[str, Any]:
    """Each repository at each commit, with who needs it; and the variables that say how the Hub is reached."""
    found = look()
    rests = {"files": len(found.unfinished.files), "bytes": found.unfinished.size}
    return {
        "folder": found.folder, "size": found.size, "free_disk": found.free_disk, "prunable": found.prunable,
        "unfinished": rests, "revisions": [_row(one) for one in found.revisions], "surroundings": surroundings(),
    }  # fmt: skip


@router.post("/cache/prune", auth=Needs("saes.change_sae"), response=like(PRUNED), summary="Clear what nothing needs")
def cache_prune(request: HttpRequest, wanted: PruneIn) -> dict[str, Any]:
    """What would go, or with `dry_run` false what went. What something here needs stays and is in `kept`."""
    try:
        found = prune(wanted.revisions, unfinished=wanted.unfinished, dry_run=wanted.dry_run)
    except (OSError, ValueError) as error:
        raise Problem(409, f"Not all could be cleared. {error}") from None
    return {
        "dry_run": wanted.dry_run, "bytes": found.size, "revisions": [_row(one) for one in found.revisions],
        "unfinished": found.unfinished, "kept": found.kept,
    }  # fmt: skip


def _row(one: Revision) -> dict[str, Any]:
    names = ("key", "repo_id", "kind", "commit", "files", "size", "used_at", "free")
    return {name: getattr(one, name) for name in names} | {"users": [row.pk for row in one.users]}
