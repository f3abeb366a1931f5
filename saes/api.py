"""The registry in /api/v1: what its pages can do, for scripts, under the same permissions."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from django.core.exceptions import PermissionDenied
from django.http import HttpRequest
from django.shortcuts import get_object_or_404
from django.utils.datastructures import MultiValueDict
from ninja import Body, Field, File, Form, Query, Router, Schema, Status
from ninja.files import UploadedFile
from pydantic import AliasChoices, ConfigDict

from saehub.accounts.api_access import Needs, Problem, require_own
from saehub.accounts.hub_tokens import HubTokenError, hub_token
from saehub.jobs.kinds import KINDS
from saehub.jobs.models import Job, enqueue
from saehub.jobs.progress import JobError
from saehub.jobs.runner import summary
from saes import gemma_scope
from saes.abilities import abilities
from saes.batch import BatchError, BatchSpec, plan
from saes.dependents import dependents
from saes.fetching import fetch, row_at
from saes.history import ADDITION, note
from saes.import_forms import FactsForm, ImportForm
from saes.models import SAE, Release
from saes.one_sae import curate, resume, start
from saes.registry import rows_between
from saes.removal import InUse, remove
from saes.repository import StillAsking, known_gemma_scope, variants
from saes.resolve import resolve

MOST = 200
router = Router(tags=["SAEs"])
LIST_EXAMPLE: Any = {
    "id": 12, "name": "gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82", "state": "ready", "source": "hub",
    "curation": "reviewed", "model": "gemma-2-2b", "hook_name": "blocks.12.hook_resid_post", "hook_name_out": "",
    "site": "resid_post", "layer": 12, "architecture": "jumprelu", "d_in": 2304, "d_sae": 16384, "k": None,
    "format": "saelens", "repo_id": "google/gemma-scope-2b-pt-res", "repo_path": "layer_12/width_16k/average_l0_82",
    "revision": "fd571b47c1c64851e9b1989792367b9babb4af63", "size_bytes": 302123456, "l0": None, "published_l0": 82.0,
    "explained_variance": None, "published_variance": None, "owner": None, "created_at": "2026-11-22T08:00:00Z",
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------- what goes over


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


class SAEPage(Schema):
    count: int
    limit: int
    offset: int
    items: list[SAEOut]
    facets: dict[str, dict[str, int]] | None = None


class Started(Schema):
    """What was queued. `sae` and `job` are those of a single SAE; several are in `saes`."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"sae": 12, "job": {"id": 40, "state": "queued"}, "saes": [{"sae": 12, "job": 40, "state": "queued"}]}]}
    )  # fmt: skip

    sae: int | None = None
    job: dict[str, Any] | None = None
    saes: list[dict[str, Any]] = Field(default_factory=list)


class GemmaPick(Schema):
    """One SAE of Gemma Scope: `l0` is the number that the SAE's L0 should be nearest to."""

    repo_id: str
    layer: int | None = None
    site: str = ""
    width: str = ""
    size: str = ""
    l0: float | None = None
    canonical: bool = False


class DownloadIn(Schema):
    """A place on the Hub, or one of the catalogue by release and id, or a pick of Gemma Scope, or a batch of wishes."""

    model_config = ConfigDict(
        populate_by_name=True,
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"repo_id": "google/gemma-scope-2b-pt-res", "path": "layer_12/width_16k/average_l0_82"},
                {"gemma_scope": {"repo_id": "google/gemma-scope-2b-pt-res", "layer": 12, "width": "16k", "l0": 100}},
                {"release": "gemma-scope-2b-pt-res-canonical", "sae_id": "layer_12/width_16k/canonical"},
                {"saes": [{"model": "gemma-2-2b", "layers": "0-25", "width": "16k", "l0": "nearest:100"}]},
            ]
        },
    )

    repo_id: str = Field("", max_length=200, validation_alias=AliasChoices("repo_id", "hf_repo_id"))
    path: str = Field("", max_length=300, validation_alias=AliasChoices("path", "filepath", "filename", "hf_filepath"))
    revision: str = Field("", max_length=80, validation_alias=AliasChoices("revision", "hf_revision"))
    name: str = Field("", max_length=200)
    description: str = Field("", max_length=2000)
    model_name: str = Field("", max_length=120)
    format: str = Field("", max_length=40)
    release: str = Field("", max_length=200)
    sae_id: str = Field("", max_length=200)
    gemma_scope: GemmaPick | None = None
    saes: list[dict[str, Any]] = Field(default_factory=list, max_length=1000)
    access_token: str | None = Field(
        None, description="Not taken: keep your token in your account, where it is encrypted"
    )


class Change(Schema):
    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"curation": "reviewed", "notes": "Checked."}]}
    )

    curation: SAE.Curation | None = None
    notes: str | None = Field(None, max_length=20_000)
    name: str | None = Field(None, min_length=1, max_length=200)


class ImportIn(Schema):
    """Form fields of an import; all facts may stay empty, and what is missing is asked for afterwards (`asked`)."""

    path: str = Field("", description="A path on the server instead of files")
    paths: str = Field("", description="Place of each file in its folder, one a line, in the files' order")
    name: str = ""
    entry: str = Field("", description="One SAE of several, by its folder or file; all of them without it")
    repo_id: str = ""
    repo_path: str = ""
    model_name: str = ""
    hook_name: str = ""
    hook_name_out: str = ""
    layer: str = ""
    k: str = ""
    architecture: str = ""
    normalize_activations: str = ""
    norm_scaling_factor: str = ""
    apply_b_dec_to_input: str = Field("", description="yes or no")
    second_copy: str = Field("", description="on: even when the same weights are here already")


# ------------------------------------------------------------------------------------------------------- reading


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
    l0_min: float | None = None,
    l0_max: float | None = None,
    sort: str = Query("", description="name, model, architecture, features, l0, ev, size; - before it turns it round"),
    facets: bool = Query(False, description="With the counts of every filter's values under the others"),
    limit: int = Query(50, description=f"At most {MOST}"),
    offset: int = 0,
    search: str = Query("", description="Another name of q"),
    model_name: str = Query("", description="Another name of model"),
    skip: int = Query(0, description="Another name of offset"),
) -> dict[str, Any]:
    """Everything that is known: trained here, imported, and of the catalogue. The filters are those of the page."""
    limit, offset = min(max(limit, 1), MOST), min(max(offset or skip, 0), 10_000_000)
    query = request.GET.copy()
    query["q"] = q or search
    if model_name:
        query.appendlist("model", model_name)
    rows, count, found = rows_between(query, offset, offset + limit)
    counts = {facet.key: {option.value: option.n for option in facet.options} for facet in found} if facets else None
    return {"count": count, "limit": limit, "offset": offset, "items": [brief(row) for row in rows], "facets": counts}


@router.get("/saes/gemma-scope/variants", auth=Needs("saes.view_sae"), summary="Variants of a Gemma Scope repository")
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
    every, origin = _variants(request, repo_id, live)
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


def _variants(request: HttpRequest, repo_id: str, live: bool) -> tuple[list[gemma_scope.Variant], str]:
    if not gemma_scope.is_gemma_scope(repo_id):
        raise Problem(422, f"{repo_id} is not a Gemma Scope repository.", repositories=known_gemma_scope())
    try:
        return variants(repo_id, "", hub_token(request.user), live=live)
    except StillAsking as error:
        raise Problem(503, f"{error} Ask again in a moment.") from None
    except (JobError, HubTokenError) as error:
        raise Problem(502, str(error), hint=error.hint) from None


@router.get("/catalogue/resolve", auth=Needs("saes.view_sae"), summary="What a text names, as the omnibox reads it")
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


@router.get("/catalogue/releases", auth=Needs("saes.view_sae"), summary="Releases that the catalogue knows")
def catalogue_releases(request: HttpRequest, q: str = "", limit: int = 50, offset: int = 0) -> dict[str, Any]:
    rows = Release.objects.filter(name__icontains=q.replace("\0", "")) if q else Release.objects.all()
    limit, offset = min(max(limit, 1), MOST), max(offset, 0)
    fields = ("id", "name", "repo_id", "model_name", "format", "links", "directory", "synced_at")
    return {"count": rows.count(), "items": list(rows.values(*fields)[offset : offset + limit])}


@router.post("/catalogue/sync", auth=Needs("saes.change_sae"), response={202: Started}, summary="Sync the catalogue")
def catalogue_sync(request: HttpRequest) -> Any:
    return Status(202, {"job": summary(enqueue("sync", request.user, title="Sync the catalogue"))})


@router.get("/saes/{int:pk}", auth=Needs("saes.view_sae"), response=SAEDetail, summary="One SAE")
def sae_detail(request: HttpRequest, pk: int) -> dict[str, Any]:
    return whole(_row(pk))


@router.get("/saes/{int:pk}/config", auth=Needs("saes.view_sae"), summary="Its config")
def sae_config(request: HttpRequest, pk: int) -> dict[str, Any]:
    config: dict[str, Any] = get_object_or_404(SAE.objects.only("config"), pk=pk).config
    return config


# ------------------------------------------------------------------------------------------------------- bringing


@router.post("/saes/download-hf", auth=Needs("saes.add_sae"), response={202: Started}, summary="Download from the Hub")
def download_hf(request: HttpRequest, wanted: DownloadIn) -> Any:
    """Queue downloads. What is here already is not brought again."""
    if wanted.access_token:
        raise Problem(
            422, "A token in a request would be seen by others; keep it in your account, where it is encrypted."
        )
    rows = _wanted(request, wanted)
    for row in rows:
        require_own(request, "saes.add_sae", row)
    if len(rows) == 1:
        _say(rows[0], wanted)
    found = fetch(request.user, rows)
    if found.refused and not (found.started or found.busy or found.here):
        raise Problem(403, found.sentence())
    return Status(202, _started([*found.started, *found.busy, *found.here]))


def _wanted(request: HttpRequest, wanted: DownloadIn) -> list[SAE]:
    """The rows that are meant, saved. Raises Problem."""
    ways = [bool(wanted.repo_id), bool(wanted.release), wanted.gemma_scope is not None, bool(wanted.saes)]
    if sum(ways) != 1:
        raise Problem(422, "Say one of repo_id, release, gemma_scope and saes.")
    if wanted.gemma_scope is not None:
        return [_picked(request, wanted.gemma_scope, wanted.revision)]
    if wanted.repo_id:
        if wanted.repo_id.count("/") != 1 or ".." in wanted.path.split("/"):
            raise Problem(422, f"{wanted.repo_id} is not a repository id; they look like google/gemma-scope-2b-pt-res.")
        place = wanted.path.strip("/")
        return [row_at(request.user, wanted.repo_id, place, revision=wanted.revision, format=wanted.format)]
    wishes = wanted.saes or [{"release": wanted.release, "id": wanted.sae_id}]
    try:
        specs = [BatchSpec.from_flags(wish) for wish in wishes]
        rows = plan(BatchSpec(tuple(wish for spec in specs for wish in spec.wishes)))
    except BatchError as error:
        raise Problem(422, str(error), hint=error.hint) from None
    return [
        row if row.pk else row_at(request.user, row.repo_id, row.repo_path, revision=row.revision, format=row.format)
        for row in rows
    ]


def _picked(request: HttpRequest, pick: GemmaPick, revision: str) -> SAE:
    every, _ = _variants(request, pick.repo_id, bool(revision))
    layer = "" if pick.layer is None else str(pick.layer)
    chosen = {"layer": layer, "site": pick.site, "width": pick.width, "size": pick.size}
    left = [one for one in gemma_scope.narrowed(every, chosen) if one.canonical or not pick.canonical]
    if pick.l0 is not None:
        left = gemma_scope.nearest_each(left, pick.l0)
    if len(left) != 1:
        said = "No variant" if not left else f"{len(left)} variants"
        facets = {key: dict(values) for key, values in gemma_scope.counts(every, chosen).items()}
        raise Problem(422, f"{said} of {pick.repo_id} fit this; exactly one has to.", facets=facets)
    return row_at(request.user, pick.repo_id, left[0].path, revision=revision, format=left[0].format)


def _say(row: SAE, wanted: DownloadIn) -> None:
    """A name or description of one's own, on a row that has none of somebody's yet."""
    if row.ready or row.release_id:
        return
    row.name = wanted.name or row.name
    row.notes = row.notes or wanted.description
    row.model_name = row.model_name or wanted.model_name
    row.save(update_fields=["name", "notes", "model_name"])


@router.post("/saes/import", auth=Needs("saes.add_sae"), response={202: Started}, summary="Import files")
def sae_import(request: HttpRequest, files: list[UploadedFile] = File([]), form: ImportIn = Form(...)) -> Any:
    """Files (a zip, a single file, several), or a `path` of the server. What they do not say is asked for in `asked`."""
    where = "path" if form.path else "folder" if form.paths else "upload"
    data = form.dict() | {"where": where}
    sent = MultiValueDict({"tree" if where == "folder" else "files": request.FILES.getlist("files")})
    checked = ImportForm({name: value for name, value in data.items() if value}, sent, user=request.user)
    if not checked.is_valid():
        errors = {name: [str(error) for error in found] for name, found in checked.errors.items()}
        raise Problem(422, next(iter(errors.values()))[0], errors=errors)
    row = checked.make()
    note(request.user, row, "Imported by the API", ADDITION)
    return Status(202, _started([row]))


@router.post("/saes/{int:pk}/facts", auth=Needs("saes.add_sae"), response={202: Started}, summary="Say what is asked")
def sae_facts(request: HttpRequest, pk: int, facts: dict[str, Any] = Body(...)) -> Any:
    """Facts named in `asked`, as {name: value}; the import goes on."""
    row = _row(pk)
    require_own(request, "saes.add_sae", row)
    if row.ready or row.busy or not row.asked:
        raise Problem(409, "Nothing is asked of this SAE.")
    form = FactsForm(row.asked, {name: _as_typed(value) for name, value in facts.items()})
    if not form.is_valid():
        errors = {name: [str(error) for error in found] for name, found in form.errors.items()}
        raise Problem(422, f"Asked for are: {', '.join(row.asked)}.", errors=errors)
    resume(row, form.facts(), request.user)
    return Status(202, _started([row]))


def _as_typed(value: Any) -> Any:
    return ("yes" if value else "no") if isinstance(value, bool) else value


@router.post("/saes/{int:pk}/download", auth=Needs("saes.add_sae"), response={202: Started}, summary="Download it")
def sae_download(request: HttpRequest, pk: int) -> Any:
    return _start(request, pk, "download")


@router.post("/saes/{int:pk}/inspect", auth=Needs("saes.add_sae"), response={202: Started}, summary="Read its config")
def sae_inspect(request: HttpRequest, pk: int) -> Any:
    """Config and shapes by range requests, without its weights."""
    return _start(request, pk, "inspect")


@router.post(
    "/saes/{int:pk}/verify", auth=Needs("saes.change_sae"), response={202: Started}, summary="Verify its files"
)
def sae_verify(request: HttpRequest, pk: int) -> Any:
    return _start(request, pk, "verify")


def _start(request: HttpRequest, pk: int, kind: str) -> Any:
    row = _row(pk)
    if kind == "download":
        require_own(request, KINDS[kind].permission, row)
    try:
        job = start(row, kind, request.user)
    except ValueError as error:
        raise Problem(409, str(error)) from None
    return Status(
        202, {"sae": row.pk, "job": summary(job), "saes": [{"sae": row.pk, "job": job.pk, "state": row.state}]}
    )


# ------------------------------------------------------------------------------------------------------- changing


@router.patch("/saes/{int:pk}", auth=Needs("saes.change_sae"), response=SAEDetail, summary="Curate it")
def sae_change(request: HttpRequest, pk: int, change: Change) -> dict[str, Any]:
    row = _row(pk)
    require_own(request, "saes.change_sae", row)
    curate(row, request.user, curation=change.curation or "", notes=change.notes, name=change.name or "")
    return whole(row)


@router.delete("/saes/{int:pk}", auth=Needs("saes.delete_sae"), summary="Delete it")
def sae_delete(
    request: HttpRequest,
    pk: int,
    force: bool = Query(False, description="Cancel what is using it"),
    keep_row: bool = Query(False, description="Only the files: it stays in the catalogue"),
    from_cache: bool = Query(True, description="Also from the Hub's cache, what nothing else here uses"),
) -> dict[str, Any]:
    """Its files and everything that depends on it. 409 while jobs, runs or generations use it, unless forced."""
    row = _row(pk)
    hanging = [{"what": group.label, "count": group.count, "goes": group.goes} for group in dependents(row)]
    try:
        said = remove(row, request.user, keep_row=keep_row, from_cache=from_cache, force=force)
    except InUse as error:
        raise Problem(409, str(error), users=error.users, dependents=hanging) from None
    except PermissionDenied:
        raise Problem(403, "You may delete your own SAEs; this one needs a curator.") from None
    except ValueError as error:
        raise Problem(422, str(error)) from None
    return {"id": pk, "deleted": not keep_row, "message": said, "dependents": hanging}


# ------------------------------------------------------------------------------------------------------- rows as JSON


def _row(pk: int) -> SAE:
    return get_object_or_404(SAE.objects.select_related("owner", "job", "model", "release"), pk=pk)


def brief(row: SAE) -> dict[str, Any]:
    names = (
        "name", "state", "source", "curation", "hook_name", "hook_name_out", "site", "layer", "architecture", "d_in",
        "d_sae", "k", "format", "repo_id", "repo_path", "revision", "l0", "published_l0", "explained_variance",
        "published_variance", "created_at",
    )  # fmt: skip
    return {name: getattr(row, name) for name in names} | {
        "id": row.pk,
        "model": row.model_name,
        "size_bytes": row.size_bytes or None,
        "owner": row.owner.get_username() if row.owner else None,
    }


def whole(row: SAE) -> dict[str, Any]:
    names = (
        "sae_id", "aliases", "neuronpedia_id", "sha256", "checksums", "facts", "asked", "proof", "metrics", "notes",
        "read_at", "verified_at", "ready_at",
    )  # fmt: skip
    return brief(row) | {name: getattr(row, name) for name in names} | {
        "release": row.release.name if row.release else None,
        "files": str(row.files) if row.ready else None,
        "job": summary(row.job) if row.job else None,
        "cannot": {action: why for action, why in abilities(row).items() if why},
    }  # fmt: skip


def _started(rows: list[SAE]) -> dict[str, Any]:
    one: SAE | None = rows[0] if len(rows) == 1 else None
    job: Job | None = one.job if one else None
    return {
        "sae": one.pk if one else None,
        "job": summary(job) if job else None,
        "saes": [{"sae": row.pk, "job": row.job_id, "state": row.state} for row in rows],
    }
