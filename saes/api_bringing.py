"""Bringing SAEs by /api/v1: from the Hub, from files, and saying what their files lack."""

from __future__ import annotations

from typing import Any

from django.http import HttpRequest
from django.utils.datastructures import MultiValueDict
from ninja import Body, Field, File, Form, Router, Schema
from ninja.files import UploadedFile
from pydantic import AliasChoices, ConfigDict

from saehub.accounts.api_access import Needs, Problem, require_own
from saehub.accounts.hub_tokens import HubTokenError, hub_token
from saehub.jobs.kinds import KINDS
from saehub.jobs.models import enqueue
from saehub.jobs.progress import JobError
from saehub.jobs.starting import starts
from saes import gemma_scope
from saes.api_rows import Pair, Started, pairs, pairs_of, row_of, started
from saes.batch import BatchError, BatchSpec, plan
from saes.fetching import fetch, row_at
from saes.history import ADDITION, note
from saes.import_forms import FactsForm, ImportForm
from saes.models import SAE
from saes.one_sae import resume, start
from saes.repository import StillAsking, known_gemma_scope, variants

router = Router(tags=["SAEs"])
brings = starts(started, pairs_of)  # 202, the key and `?wait=`; its views return pairs of SAE and job
STARTED = {200: Started, 202: Started}


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
    tensors: str = Field("", description="Which tensor of a file of one's own is which: W_enc = encoder.weight.T, …")
    second_copy: str = Field("", description="on: even when the same weights are here already")


@router.post("/catalogue/sync", auth=Needs("saes.change_sae"), response=STARTED, summary="Sync the catalogue")
@brings
def catalogue_sync(request: HttpRequest) -> list[Pair]:
    return [(None, enqueue("sync", request.user, title="Sync the catalogue").pk)]


@router.post("/saes/download-hf", auth=Needs("saes.add_sae"), response=STARTED, summary="Download from the Hub")
@brings
def download_hf(request: HttpRequest, wanted: DownloadIn) -> list[Pair]:
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
    return pairs([*found.started, *found.busy, *found.here])


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


def variants_of(request: HttpRequest, repo_id: str, live: bool) -> tuple[list[gemma_scope.Variant], str]:
    if not gemma_scope.is_gemma_scope(repo_id):
        raise Problem(422, f"{repo_id} is not a Gemma Scope repository.", repositories=known_gemma_scope())
    try:
        return variants(repo_id, "", hub_token(request.user), live=live)
    except StillAsking as error:
        raise Problem(503, f"{error} Ask again in a moment.") from None
    except (JobError, HubTokenError) as error:
        raise Problem(502, str(error), hint=error.hint) from None


def _picked(request: HttpRequest, pick: GemmaPick, revision: str) -> SAE:
    every, _ = variants_of(request, pick.repo_id, bool(revision))
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


@router.post("/saes/import", auth=Needs("saes.add_sae"), response=STARTED, summary="Import files")
@brings
def sae_import(request: HttpRequest, files: list[UploadedFile] = File([]), form: ImportIn = Form(...)) -> list[Pair]:
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
    return pairs([row])


@router.post("/saes/{int:pk}/facts", auth=Needs("saes.add_sae"), response=STARTED, summary="Say what is asked")
@brings
def sae_facts(
    request: HttpRequest, pk: int, facts: dict[str, Any] = Body(..., examples=[{"layer": 3, "k": 32}])
) -> list[Pair]:
    """Facts named in `asked`, as {name: value}; the import goes on."""
    row = row_of(pk)
    require_own(request, "saes.add_sae", row)
    if row.ready or row.busy or not row.asked:
        raise Problem(409, "Nothing is asked of this SAE.")
    form = FactsForm(row.asked, {name: _as_typed(value) for name, value in facts.items()})
    if not form.is_valid():
        errors = {name: [str(error) for error in found] for name, found in form.errors.items()}
        raise Problem(422, f"Asked for are: {', '.join(row.asked)}.", errors=errors)
    if not resume(row, form.facts(), request.user):
        raise Problem(409, "Nothing is asked of this SAE.")
    return pairs([row_of(pk)])


def _as_typed(value: Any) -> Any:
    return ("yes" if value else "no") if isinstance(value, bool) else value


@router.post("/saes/{int:pk}/download", auth=Needs("saes.add_sae"), response=STARTED, summary="Download it")
@brings
def sae_download(request: HttpRequest, pk: int) -> list[Pair]:
    return _start(request, pk, "download")


@router.post("/saes/{int:pk}/inspect", auth=Needs("saes.add_sae"), response=STARTED, summary="Read its config")
@brings
def sae_inspect(request: HttpRequest, pk: int) -> list[Pair]:
    """Config and shapes by range requests, without its weights."""
    return _start(request, pk, "inspect")


@router.post("/saes/{int:pk}/verify", auth=Needs("saes.change_sae"), response=STARTED, summary="Verify its files")
@brings
def sae_verify(request: HttpRequest, pk: int) -> list[Pair]:
    return _start(request, pk, "verify")


def _start(request: HttpRequest, pk: int, kind: str) -> list[Pair]:
    row = row_of(pk)
    if kind == "download":
        require_own(request, KINDS[kind].permission, row)
    try:
        job = start(row, kind, request.user)
    except ValueError as error:
        raise Problem(409, str(error)) from None
    return [(row.pk, job.pk)]
