"""Activations in /api/v1: saved from a model on a corpus, listed with their manifests, deleted."""

from __future__ import annotations

import json
from typing import Any, Literal

from django.db import DEFAULT_DB_ALIAS, transaction
from django.db.models import Count, ProtectedError
from django.db.models.deletion import Collector
from django.http import HttpRequest
from django.shortcuts import get_object_or_404
from ninja import Field, Query, Router, Schema
from pydantic import ConfigDict

from saehub.accounts.api_access import Needs, Problem, require_own
from saehub.accounts.api_pages import LIMIT, OFFSET, Page, like, page
from saehub.jobs.kinds import KINDS
from saehub.jobs.models import LIVE, Job, enqueue
from saehub.jobs.starting import starts
from saes.api_forms import laid_over, refuse
from training.capture_document import DocumentError, form_of, from_yaml, of_capture, said
from training.capture_form import CaptureForm
from training.models import Capture, Corpus
from training.views import capture_fault
from training.yaml_document import to_yaml

router = Router(tags=["Activations"])
CAPTURE: Any = {
    "id": 5, "run_id": 5, "name": "wikitext · SmolLM2-135M", "status": "ready", "model_id": 1, "model": "SmolLM2-135M",
    "layers": ["blocks.9.hook_resid_post"], "hidden_dims": {"blocks.9.hook_resid_post": 576},
    "dataset": {"corpus_id": 2, "name": "wikitext", "source": "hub", "location": "Salesforce/wikitext"},
    "samples": 7813, "tokens": 1000000, "context_length": 128, "prepend_bos": True, "store_special": False,
    "roles": [], "dtype": "float32", "size_bytes": 2304000000, "seconds": 212.4, "n_runs": 1, "owner": "ada",
    "created_at": "2026-11-22T08:00:00Z", "job_id": 40, "job_ids": [], "error": "",
    "manifest_path": "/api/v1/activations/5",
}  # fmt: skip
MANIFEST: Any = {
    "manifest": {"n_tokens": 1000000, "norms": {"blocks.9.hook_resid_post": 61.4}},
    "batches": [{"batch_index": 0, "size": 781, "token_counts": 99968, "store_key": "shard-00000.safetensors"}],
    "runs": [7],
}


class CaptureOut(Schema):
    """Saved activations. `run_id` is another name of `id`, `samples` counts contexts, `manifest_path` is their address."""

    model_config = ConfigDict(json_schema_extra={"examples": [CAPTURE]})

    id: int
    run_id: int
    name: str
    status: str
    model_id: int
    model: str
    layers: list[str]
    hidden_dims: dict[str, int | None]
    dataset: dict[str, Any]
    samples: int | None
    tokens: int | None
    context_length: int
    prepend_bos: bool
    store_special: bool
    roles: list[str] = Field(description="Of conversations, only tokens of these roles are kept; all when empty")
    dtype: str
    size_bytes: int | None
    seconds: float | None
    n_runs: int
    owner: str | None
    created_at: Any
    job_id: int | None
    job_ids: list[int]
    error: str
    manifest_path: str


class CaptureDetail(CaptureOut):
    """With the manifest: what was run on what, under which policy, and the norms measured at each layer."""

    model_config = ConfigDict(json_schema_extra={"examples": [CAPTURE | MANIFEST]})

    manifest: dict[str, Any]
    batches: list[dict[str, Any]] = Field(description="Its shards: contexts, tokens and file of each")
    runs: list[int] = Field(description="Training runs on them")


class DatasetOf(Schema):
    """Which corpus: by its number, or by what it was added from. It has to be here: /corpora adds one."""

    model_config = ConfigDict(extra="forbid")

    corpus_id: int | None = None
    type: Literal["hf", "local"] = "hf"
    name: str = Field("", max_length=400, description="Id of a dataset of the Hub, or the corpus's own name")
    split: str = Field("", max_length=60)
    text_field: str = Field("", max_length=80)


class SaveIn(Schema):
    """What to run, on what, and where to look. Everything that is left out is as on the page."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "model_id": 1,
                    "layers": ["blocks.9.hook_resid_post"],
                    "dataset": {"corpus_id": 2},
                    "max_tokens": 1000000,
                }
            ]
        },
    )

    model_id: int | None = Field(None, description="Of what is saved without a document")
    layers: list[str] = Field(
        default_factory=list, max_length=1000, description="Names of /models/{id}/layers, or module paths"
    )
    dataset: DatasetOf | None = None
    run_id: str = Field("", max_length=120, description="A name for them")
    max_tokens: int | None = Field(None, description="The whole corpus when left out")
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="Any other field of the page: context_length, prepend_bos, store_special, roles, dtype and the rest",
    )
    document: dict[str, Any] | str | None = Field(
        None,
        description="All of it as one document, as /activations/{id}/document gives it: YAML, or its keys and values",
    )


class Gone(Schema):
    """What was deleted."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"deleted": True, "run_id": 5, "runs": []}]})

    deleted: bool
    run_id: int
    runs: list[int] = Field(description="Training runs that went with them")


def capture_out(row: Any) -> dict[str, Any]:
    """A capture in a list and after its start."""
    names = (
        "id",
        "name",
        "model_id",
        "context_length",
        "prepend_bos",
        "store_special",
        "roles",
        "dtype",
        "size_bytes",
        "seconds",
    )
    corpus = row.corpus
    return {name: getattr(row, name) for name in names} | {
        "run_id": row.pk,
        "status": row.state,
        "model": row.model.name,
        "layers": row.hook_names,
        "hidden_dims": {name: row.d_in(name) for name in row.hook_names},
        "dataset": {"corpus_id": corpus.pk, "name": corpus.name, "source": corpus.source, "location": corpus.location},
        "samples": row.n_contexts,
        "tokens": row.n_tokens,
        "n_runs": row.n_runs,
        "owner": row.owner.get_username() if row.owner else None,
        "created_at": row.created_at,
        "job_id": row.job_id,
        "job_ids": [row.job_id] if row.busy else [],
        "error": row.job.error if row.job else "",
        "manifest_path": f"/api/v1/activations/{row.pk}",
    }


def _detail(pk: Any) -> dict[str, Any]:
    row = get_object_or_404(_captures(), pk=pk)
    runs = list(row.runs.values_list("pk", flat=True))
    return capture_out(row) | {"manifest": row.manifest, "batches": _batches(row), "runs": runs}


def _batches(row: Capture) -> list[dict[str, Any]]:
    """The shards, as the manifest among the files lists them; none where they are gone or not stored."""
    try:
        shards = json.loads((row.folder / "manifest.json").read_text(encoding="utf-8"))["shards"]
    except (OSError, ValueError, KeyError):
        return []
    return [
        {"batch_index": i, "size": one["n_contexts"], "token_counts": one["n_rows"], "store_key": one["file"]}
        for i, one in enumerate(shards)
    ]


def _captures() -> Any:
    return Capture.objects.select_related("model", "corpus", "owner", "job").annotate(n_runs=Count("runs"))


@router.post(
    "/activations/save",
    auth=Needs("training.add_capture"),
    response={200: CaptureDetail, 202: CaptureDetail},
    summary="Save activations",
)
@starts(_detail)
def activations_save(request: HttpRequest, given: SaveIn) -> Any:
    """Queues a job that runs the model over the corpus. Layers, lengths and the disk they need are checked first."""
    if given.document is not None:
        return _of_document(request, given).make().pk
    if given.model_id is None or given.dataset is None:
        raise Problem(422, "Say the model_id, the layers and the dataset, or all of it by a document.")
    chosen = {"model": given.model_id, "corpus": _corpus(given.dataset)}
    wanted = given.options | chosen | {"hook_names": given.layers, "max_tokens": given.max_tokens, "name": given.run_id}
    unsaid = {"model": given.model_id, "chat_template": False}  # a page shows what it proposes; a request has to say it
    blank = CaptureForm(user=request.user, initial=unsaid)
    form = CaptureForm(laid_over(blank, wanted), user=request.user)
    refuse(form, {"model": "model_id", "hook_names": "layers", "corpus": "dataset.corpus_id", "name": "run_id"})
    return form.make().pk


def _of_document(request: HttpRequest, given: SaveIn) -> CaptureForm:
    if given.model_fields_set - {"document"}:
        raise Problem(422, "A document says everything; give nothing beside it.")
    text = given.document if isinstance(given.document, str) else to_yaml(given.document or {})
    try:
        form = form_of(from_yaml(text), request.user)
    except DocumentError as error:
        raise Problem(422, f"document: {error}", errors={"document": [str(error)]}) from None
    if not form.is_valid():
        sentences = said(form)
        raise Problem(422, f"document: {sentences[0]}", errors={"document": sentences})
    return form


def _corpus(given: DatasetOf) -> int:
    """The corpus that is meant. Raises Problem."""
    if given.corpus_id is not None:
        return given.corpus_id
    if not given.name:
        raise Problem(422, "dataset: say its corpus_id, or the name of a dataset of the Hub.")
    by_place = Corpus.objects.ready().filter(source=Corpus.Source.HUB, location=given.name)
    parts = {name: value for name in ("split", "text_field") if (value := getattr(given, name))}
    rows = by_place.filter(**parts) if given.type == "hf" else Corpus.objects.ready().filter(name=given.name)
    found: Corpus | None = rows.order_by("-pk").first()
    if found is None:
        raise Problem(422, f"dataset: {given.name} is not a corpus here; add it with POST /corpora first.")
    return int(found.pk)


@router.get("/activations", auth=Needs("training.view_capture"), response=Page[CaptureOut], summary="Saved activations")
def activations_list(
    request: HttpRequest,
    model_id: int | None = Query(None, description="Of this model"),
    q: str = "",
    limit: int = LIMIT,
    offset: int = OFFSET,
) -> Any:
    rows = _captures().filter(name__icontains=q)
    return page(rows.filter(model=model_id) if model_id is not None else rows, limit, offset, capture_out)


@router.get(
    "/activations/{int:pk}",
    auth=Needs("training.view_capture"),
    response=CaptureDetail,
    summary="Saved activations with their manifest",
)
def activations_detail(request: HttpRequest, pk: int) -> Any:
    return _detail(pk)


@router.get(
    "/activations/{int:pk}/document",
    auth=Needs("training.view_capture"),
    response=like({"model": 1, "corpus": 2, "hook_names": ["blocks.9.hook_resid_post"], "context_length": 128}),
    summary="The document that saves them again",
)
def activations_document(request: HttpRequest, pk: int) -> Any:
    """For `document` of POST /activations/save, here or on another instance that holds the model and the corpus."""
    return of_capture(get_object_or_404(Capture.objects.select_related("model", "corpus"), pk=pk))


@router.delete(
    "/activations/{int:pk}", auth=Needs("training.delete_capture"), response=Gone, summary="Delete activations"
)
def activations_delete(
    request: HttpRequest,
    pk: int,
    force: bool = Query(False, description="With the training runs on them, whose SAEs stay, and their feature views"),
) -> Any:
    """With their files. 409 while jobs work on them, or runs or feature views are made from them, unless forced."""
    row = get_object_or_404(Capture.objects.select_related("job"), pk=pk)
    require_own(request, "training.delete_capture", row)
    users = _users(row)
    busy = [one.name for one in (row, *users) if one.job is not None and one.job.state in LIVE]
    if busy:
        raise Problem(409, f"A job works on {busy[0]}; cancel it first, or wait for its end.")
    if users and not force:
        told = [{"what": one._meta.verbose_name, "id": one.pk, "name": one.name} for one in users]
        raise Problem(
            409, f"{row.name} is used by {len(users)} others; delete those first, or give force=true.", users=told
        )
    runs = list(row.runs.values_list("pk", flat=True))
    _delete(row)
    return {"deleted": True, "run_id": pk, "runs": runs}


FILING: Any = {"id": 5, "kind": "verify_capture", "job_id": 60, "job_ids": [60]}


class FilingOut(Schema):
    """A job on the files of saved activations; its `result` is at /jobs/{job_id}."""

    model_config = ConfigDict(json_schema_extra={"examples": [FILING]})

    id: int
    kind: str
    job_id: int
    job_ids: list[int]


def _filing(kind: str) -> Any:
    def answer(pk: Any) -> dict[str, Any]:
        job = Job.objects.filter(kind=kind, subject_id=pk).order_by("-pk")[0]
        return {"id": pk, "kind": kind, "job_id": job.pk, "job_ids": [job.pk] if job.is_live else []}

    return answer


def _file(request: HttpRequest, pk: int, kind: str) -> int:
    """Queue a check or an export of its files. Raises Problem."""
    row = get_object_or_404(Capture, pk=pk)
    require_own(request, "training.add_capture", row)
    if fault := capture_fault(row, kind):
        raise Problem(409, fault)
    enqueue(kind, request.user, title=f"{KINDS[kind].title}: {row.name}", capture=pk)
    return pk


@router.post(
    "/activations/{int:pk}/verify",
    auth=Needs("training.add_capture"),
    response={200: FilingOut, 202: FilingOut},
    summary="Verify their files",
)
@starts(_filing("verify_capture"))
def activations_verify(request: HttpRequest, pk: int) -> Any:
    """Every shard is read again and held against its checksum."""
    return _file(request, pk, "verify_capture")


@router.post(
    "/activations/{int:pk}/export",
    auth=Needs("training.add_capture"),
    response={200: FilingOut, 202: FilingOut},
    summary="Export them as mi_crow's LocalStore",
)
@starts(_filing("export_capture"))
def activations_export(request: HttpRequest, pk: int) -> Any:
    """Written on the server; the job's result says where."""
    return _file(request, pk, "export_capture")


def _users(row: Capture) -> list[Any]:
    """Rows that keep it from being deleted, also those of apps to the right: runs, sweeps, views of features."""
    try:
        Collector(using=DEFAULT_DB_ALIAS).collect([row])
    except ProtectedError as error:
        return sorted(error.protected_objects, key=lambda one: (one._meta.label, one.pk))
    return []


@transaction.atomic
def _delete(row: Capture) -> None:
    while users := _users(row):
        for one in users:
            if one._meta.model._default_manager.filter(pk=one.pk).exists():  # it may have gone with one before it
                one.delete()
    row.delete()
