"""The registry in /api/v1: what its pages can do, for scripts, under the same permissions."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from django.core.exceptions import PermissionDenied
from django.http import HttpRequest
from django.shortcuts import get_object_or_404
from ninja import Field, Query, Router, Schema
from pydantic import ConfigDict

from saehub.accounts.api_access import Needs, Problem, require_own
from saehub.accounts.api_pages import LIMIT, OFFSET, Page, page
from saes import api_bringing, api_cache, api_marks, api_models, api_sharing, gemma_scope
from saes.api_bringing import variants_of
from saes.api_rows import SAEDetail, SAEPage, brief, row_of, whole
from saes.compatibility import fits
from saes.dependents import dependents, users
from saes.models import SAE, Release
from saes.one_sae import curate
from saes.recommended import recommended
from saes.registry import rows_between
from saes.removal import InUse, may_remove, remove
from saes.repository import known_gemma_scope
from saes.resolve import resolve
from saes.tags import starred_by

router = Router(tags=["SAEs"])
RELEASE: Any = {
    "id": 3, "name": "gemma-scope-2b-pt-res", "repo_id": "google/gemma-scope-2b-pt-res", "model_name": "gemma-2-2b",
    "format": "gemma_scope_1", "links": {}, "directory": "sae-lens 6.22", "synced_at": "2026-11-22T08:00:00Z",
}  # fmt: skip


class Change(Schema):
    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"curation": "reviewed", "notes": "Checked."}]}
    )

    curation: SAE.Curation | None = None
    notes: str | None = Field(None, max_length=20_000)
    name: str | None = Field(None, min_length=1, max_length=200)
    licence: str | None = Field(None, max_length=60, description="As the Hub names it; empty: its repository's")
    pin: str | None = Field(None, max_length=200, description="Why it is recommended at its place; empty: no more")


class ReleaseOut(Schema):
    """SAEs that somebody published together."""

    model_config = ConfigDict(json_schema_extra={"examples": [RELEASE]})

    id: int
    name: str
    repo_id: str
    model_name: str
    format: str
    links: dict[str, Any]
    directory: str
    synced_at: Any


Variants = Annotated[dict[str, Any], Field(examples=[{"repositories": ["google/gemma-scope-2b-pt-res"]}])]
Config = Annotated[
    dict[str, Any], Field(examples=[{"architecture": "topk", "d_in": 768, "d_sae": 6144, "k": 32, "dtype": "float32"}])
]


RECOMMENDED: Any = {"model": "gemma-2-2b", "items": [{
    "site": "resid_post", "layer": 12, "of": 27, "pinned": False, "why": "16,384 features are nearest 16,384; …",
    "sae": {"id": 12, "name": "gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82", "d_sae": 16384, "l0": 82.0,
            "ready": True},
}]}  # fmt: skip
Recommendations = Annotated[dict[str, Any], Field(examples=[RECOMMENDED])]


class Resolved(Schema):
    """What a text names: one SAE, several, a place on the Hub, or what is nearest to it."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"said": "", "sae": None, "saes": [], "place": None, "nearest": [], "feature": None}]
        }
    )

    said: Any
    sae: dict[str, Any] | None
    saes: list[dict[str, Any]]
    place: dict[str, Any] | None
    nearest: list[dict[str, Any]]
    feature: Any


FIT: Any = {
    "model": 1, "name": "gemma-2-2b", "named": True, "level": "fits",
    "reasons": [{"level": "fits", "about": "model", "text": "It is of gemma-2-2b."}],
}  # fmt: skip


class FitOut(Schema):
    """How a language model that is here stands to an SAE. `named`: it is the one that the SAE says it is of."""

    model_config = ConfigDict(json_schema_extra={"examples": [FIT]})

    model: int
    name: str
    named: bool
    level: str
    reasons: list[dict[str, str]]


class Deleted(Schema):
    """What went, and what depended on it."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"id": 12, "deleted": True, "message": "one is deleted.", "dependents": []}]}
    )

    id: int
    deleted: bool
    message: str
    dependents: list[dict[str, Any]]


@router.get("/saes", auth=Needs("saes.view_sae"), response=SAEPage, summary="List, search and narrow the registry")
def sae_list(
    request: HttpRequest,
    q: str = Query("", description="Words of names, ids, paths and notes"),
    state: list[str] = Query([], description="here, coming, failed, none"),
    model: list[str] = Query([], description="As in the list; – is not known"),
    layer: list[str] = Query([]),
    site: list[str] = Query([]),
    architecture: list[str] = Query([]),
    width: list[str] = Query([], description="Number of features"),
    source: list[str] = Query([], description="trained, hub, file"),
    curation: list[str] = Query([], description="draft, reviewed, published, deprecated"),
    tag: list[str] = Query([], description="One of these; – is without any"),
    starred: bool = Query(False, description="Only what the token's owner starred"),
    l0_min: float | None = None,
    l0_max: float | None = None,
    sort: str = Query("", description="name, model, architecture, features, l0, ev, size; - before it turns it round"),
    facets: bool = Query(False, description="With the counts of every filter's values under the others"),
    limit: int = LIMIT,
    offset: int = OFFSET,
    search: str = Query("", description="Another name of q"),
    model_name: str = Query("", description="Another name of model"),
    skip: int = Query(0, ge=0, le=10_000_000, description="Another name of offset"),
) -> dict[str, Any]:
    """Everything that is known: trained here, imported, and of the catalogue. The filters are those of the page."""
    offset = offset or skip
    query = request.GET.copy()
    query["q"], query["starred"] = q or search, "1" if starred else ""
    if model_name:
        query.appendlist("model", model_name)
    stars = starred_by(request.user) if starred else frozenset()
    rows, count, found = rows_between(query, offset, offset + limit, stars)
    counts = {facet.key: {option.value: option.n for option in facet.options} for facet in found} if facets else None
    return {"count": count, "limit": limit, "offset": offset, "items": [brief(row) for row in rows], "facets": counts}


@router.get(
    "/saes/gemma-scope/variants",
    auth=Needs("saes.view_sae"),
    response=Variants,
    summary="Variants of a Gemma Scope repository",
)
def gemma_scope_variants(
    request: HttpRequest,
    repo_id: str = Query("", description="Empty: which repositories the catalogue knows"),
    layer: str = "",
    site: str = "",
    width: str = Query("", description="16k, 65k, 1m"),
    size: str = Query("", description="small, medium, big, of Gemma Scope 2"),
    l0: float | None = Query(None, description="Of each layer, site and width, the one with the L0 nearest to this"),
    canonical: bool = False,
    live: bool = Query(False, description="Ask the Hub, even where the catalogue knows the repository"),
) -> dict[str, Any]:
    """Read off the repository's tree: layer, width, L0, site, and the hook point that each reads."""
    if not repo_id:
        return {"repositories": known_gemma_scope()}
    every, origin = variants_of(request, repo_id, live)
    chosen = {"layer": layer, "site": site, "width": width, "size": size}
    shown = [one for one in gemma_scope.narrowed(every, chosen) if one.canonical or not canonical]
    if l0 is not None:
        shown = gemma_scope.nearest_each(shown, l0)
    return {
        "repo_id": repo_id,
        "origin": origin,
        "count": len(shown),
        "facets": {key: dict(values) for key, values in gemma_scope.counts(every, chosen).items()},
        "items": [asdict(one) for one in shown],
    }


@router.get(
    "/saes/recommended",
    auth=Needs("saes.view_sae"),
    response=Recommendations,
    summary="Of each place of a model, the SAE to begin with",
)
def sae_recommended(
    request: HttpRequest, model: str = Query(..., max_length=120), site: str = "", layer: int | None = Query(None, ge=0)
) -> dict[str, Any]:
    """What a curator pinned, else of the width nearest 16,384 the L0 nearest 100; `why` says which, `of` how many there are."""
    items = [
        {"site": one.site, "layer": one.layer, "of": one.of, "pinned": one.pinned, "why": one.why,
         "sae": {"id": one.sae.pk, "name": one.sae.name, "d_sae": one.sae.d_sae, "l0": one.l0, "ready": one.sae.ready}}
        for one in recommended(model, site, layer)
    ]  # fmt: skip
    return {"model": model, "items": items}


@router.get(
    "/catalogue/resolve",
    auth=Needs("saes.view_sae"),
    response=Resolved,
    summary="What a text names, as the omnibox reads it",
)
def catalogue_resolve(
    request: HttpRequest, q: str = Query(..., description="release/id, Hub URL, repo:path, Neuronpedia id or URL")
) -> dict[str, Any]:
    found = resolve(q)
    return {
        "said": found.said,
        "sae": brief(found.sae) if found.sae else None,
        "saes": [brief(row) for row in found.saes],
        "place": asdict(found.place) if found.place else None,
        "nearest": [brief(row) for row in found.nearest],
        "feature": found.feature,
    }


@router.get(
    "/catalogue/releases", auth=Needs("saes.view_sae"), response=Page[ReleaseOut], summary="Releases in the catalogue"
)
def catalogue_releases(request: HttpRequest, q: str = "", limit: int = LIMIT, offset: int = OFFSET) -> Any:
    rows = Release.objects.filter(name__icontains=q) if q else Release.objects.all()
    return page(rows.values(*RELEASE), limit, offset, dict)


@router.get("/saes/{int:pk}", auth=Needs("saes.view_sae"), response=SAEDetail, summary="One SAE")
def sae_detail(request: HttpRequest, pk: int) -> dict[str, Any]:
    return whole(row_of(pk), request.user)


@router.get("/saes/{int:pk}/config", auth=Needs("saes.view_sae"), response=Config, summary="Its config")
def sae_config(request: HttpRequest, pk: int) -> dict[str, Any]:
    config: dict[str, Any] = get_object_or_404(SAE.objects.only("config"), pk=pk).config
    return config


@router.get(
    "/saes/{int:pk}/compatibility",
    auth=Needs("saes.view_sae"),
    response=list[FitOut],
    summary="Which language models here it fits, and why",
)
def sae_compatibility(request: HttpRequest, pk: int) -> list[dict[str, Any]]:
    """Each model that is here: `fits`, `care` (something is not known, or was different in training) or `no`."""
    return [
        {"model": fit.model.pk, "name": fit.model.name, "named": fit.named, "level": fit.level,
         "reasons": [asdict(reason) for reason in fit.reasons]}
        for fit in fits(row_of(pk))
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------- changing


@router.patch("/saes/{int:pk}", auth=Needs("saes.change_sae"), response=SAEDetail, summary="Curate it")
def sae_change(request: HttpRequest, pk: int, change: Change) -> dict[str, Any]:
    row = row_of(pk)
    require_own(request, "saes.change_sae", row)
    said = change.dict() | {"curation": change.curation or "", "name": change.name or ""}
    curate(row, request.user, **said)
    return whole(row, request.user)


@router.delete("/saes/{int:pk}", auth=Needs("saes.delete_sae"), response=Deleted, summary="Delete it")
def sae_delete(
    request: HttpRequest,
    pk: int,
    force: bool = Query(False, description="Delete what depends on it as well, and cancel what is using it"),
    keep_row: bool = Query(False, description="Only the files: it stays in the catalogue"),
    from_cache: bool = Query(True, description="Also from the Hub's cache, what nothing else here uses"),
) -> dict[str, Any]:
    """Its files and its row. 409 while jobs, runs or generations use it, or results would go with it, unless forced."""
    row = row_of(pk)
    groups = dependents(row)
    hanging = [{"what": group.label, "count": group.count, "goes": group.goes} for group in groups]
    using = users(row)
    going = "" if keep_row else ", ".join(f"{group.count} {group.label}" for group in groups if group.goes)
    try:
        if going and not force and not using and may_remove(request.user, row):
            raise Problem(
                409, f"{row.name} has {going}, deleted with it: add force=true if they may go.", users=[],
                dependents=hanging,
            )  # fmt: skip
        said = remove(row, request.user, keep_row=keep_row, from_cache=from_cache, force=force and bool(using))
    except InUse as error:
        raise Problem(409, str(error), users=error.users, dependents=hanging) from None
    except PermissionDenied:
        raise Problem(403, "You may delete your own SAEs; this one needs a curator.") from None
    except ValueError as error:
        raise Problem(422, str(error)) from None
    return {"id": pk, "deleted": not keep_row, "message": said, "dependents": hanging}


router.add_router("", api_bringing.router)
router.add_router("", api_cache.router)
router.add_router("", api_marks.router)
router.add_router("", api_models.router)
router.add_router("", api_sharing.router)
