"""Files of concepts and labels in /api/v1: sent, looked at first, applied or thrown away."""

from __future__ import annotations

from typing import Any

from django.http import HttpRequest
from django.shortcuts import get_object_or_404
from django.utils.datastructures import MultiValueDict
from ninja import Field, File, Form, Router, Schema, Status
from ninja.files import UploadedFile
from pydantic import ConfigDict

from concepts import imports, interchange
from concepts.api_dictionaries import new_dictionary
from concepts.concept_forms import ImportForm
from concepts.models import ConceptDictionary, ConceptImport
from saehub.accounts.api_access import Needs, Problem, require_own
from saehub.jobs.starting import starts
from saes.api_forms import refuse
from saes.models import SAE

router = Router(tags=["Concepts"])
LOADED: Any = {
    "id": 8, "concept_id": 8, "sae_id": 12, "dictionary_id": 4, "name": "concepts.csv", "status": "looked at", "form": "csv",
    "counts": {"added": 2, "changed": 0, "unchanged": 0, "refused": 1},
    "added": [{"row": 2, "feature": 2117, "name": "capital cities", "score": 0.83, "changes": ""}], "changed": [],
    "refused": [{"row": 3, "reason": "There is no feature 9999; this SAE has features 0 to 4,607."}],
    "job_id": None, "job_ids": [], "error": "",
}  # fmt: skip


class LoadIn(Schema):
    """What goes along with a file: where it goes, and whether it is applied at once."""

    dictionary_id: int | None = Field(None, description="Into this dictionary")
    sae_id: int | None = Field(None, description="Into the labels of this SAE, or into a new dictionary over it")
    dictionary: str = Field("", max_length=10_000, description="Name of a new dictionary over sae_id")
    accept: bool = Field(True, description="Labels: accept them where a feature has no accepted one")
    apply: bool = Field(False, description="Without looking at the preview first")


class LoadOut(Schema):
    """What a file would do, or has done. `concept_id` is another name of `id`."""

    model_config = ConfigDict(json_schema_extra={"examples": [LOADED]})

    id: int
    concept_id: int
    sae_id: int
    dictionary_id: int | None
    name: str
    status: str
    form: str
    counts: dict[str, int]
    added: list[dict[str, Any]] = Field(description=f"The first {imports.SHOWN}")
    changed: list[dict[str, Any]]
    refused: list[dict[str, Any]]
    job_id: int | None
    job_ids: list[int]
    error: str


def _load_out(row: ConceptImport) -> dict[str, Any]:
    found: dict[str, Any] = {"form": row.form, "counts": row.counts, "added": [], "changed": [], "refused": []}
    error = row.job.error if row.job else ""
    if not row.ready and not row.busy:
        try:
            plan = imports.preview(row)
            found = {"form": plan.form, "counts": plan.counts, "refused": [vars(one) for one in plan.refused]}
            for sort in ("added", "changed"):
                found[sort] = [_difference(one) for one in getattr(plan, sort)]
        except (interchange.FileRefused, FileNotFoundError) as refusal:
            error = str(refusal) if isinstance(refusal, interchange.FileRefused) else "The file is gone; send it again."
    return found | {
        "id": row.pk, "concept_id": row.pk, "sae_id": row.sae_id, "dictionary_id": row.dictionary_id, "name": row.name,
        "status": _status(row), "job_id": row.job_id,
        "job_ids": [row.job_id] if row.busy else [], "error": error,
    }  # fmt: skip


def _status(row: ConceptImport) -> str:
    """applied, looked at, or how the job stands that does either."""
    if row.ready:
        return "applied"
    if row.job is None or (row.job.kind == row.LOOK and row.look is not None and not row.busy):
        return "looked at"
    return str(row.job.state)


def _difference(one: imports.Difference) -> dict[str, Any]:
    entry = one.entry
    return {"row": entry.row, "feature": entry.feature, "name": entry.name, "score": entry.score, "changes": one.words}


def _load_row(pk: Any) -> ConceptImport:
    rows = ConceptImport.objects.select_related("sae", "dictionary", "owner", "job")
    row: ConceptImport = get_object_or_404(rows, pk=pk)
    return row


@router.post(
    "/concepts/load",
    auth=Needs("concepts.add_conceptimport"),
    response={200: LoadOut, 202: LoadOut},
    summary="Send a file of concepts or labels",
)
@starts(lambda pk: _load_out(_load_row(pk)))
def concepts_load(request: HttpRequest, file: UploadedFile = File(...), form: LoadIn = Form(...)) -> Any:
    """Validated against the SAE's features. Answers with the preview; nothing is written before /concepts/load/{id}/apply,
    or with `apply`. A file above 2 MB is looked at by a job. CSV and concepts.json of mi_crow, explanations of Neuronpedia, or our own lines."""
    checked = ImportForm({"accept": "on"} if form.accept else {}, MultiValueDict({"file": [file]}))
    refuse(checked)
    sae, dictionary = _target(request, form)
    row = imports.keep(checked.cleaned_data["file"], request.user, sae, dictionary, form.accept)
    long = imports.is_long(row)
    try:
        if not long:
            imports.plan(row)
    except interchange.FileRefused as refusal:
        imports.discard(row)
        if dictionary is not None and form.dictionary_id is None:  # made for this file
            dictionary.delete()
        raise Problem(422, f"file: {refusal}", errors={"file": [str(refusal)]}) from None
    if form.apply:
        _apply(request, row)
    elif long:
        row.look_at(request.user)
    return row.pk


def _target(request: HttpRequest, form: LoadIn) -> tuple[SAE, ConceptDictionary | None]:
    """Where the file goes. Raises Problem."""
    if (form.dictionary_id is None) == (form.sae_id is None):
        raise Problem(422, "Say one of dictionary_id and sae_id.")
    if form.dictionary_id is not None:
        dictionary = get_object_or_404(ConceptDictionary.objects.select_related("sae"), pk=form.dictionary_id)
        require_own(request, "concepts.change_conceptdictionary", dictionary)
        return dictionary.sae, dictionary
    if form.dictionary:
        made = new_dictionary(request, form.sae_id or 0, name=form.dictionary)
        return made.sae, made
    sae = get_object_or_404(SAE, pk=form.sae_id)
    if not sae.n_features:
        raise Problem(422, f"How many features {sae.name} has is not known yet, so no file can be checked against it.")
    return sae, None


@router.get(
    "/concepts/load/{int:pk}", auth=Needs("concepts.view_conceptimport"), response=LoadOut, summary="What a file does"
)
def concepts_loaded(request: HttpRequest, pk: int) -> Any:
    return _load_out(_load_row(pk))


@router.post(
    "/concepts/load/{int:pk}/apply",
    auth=Needs("concepts.add_conceptimport"),
    response={200: LoadOut, 202: LoadOut},
    summary="Apply a file that was looked at",
)
@starts(lambda pk: _load_out(_load_row(pk)))
def concepts_apply(request: HttpRequest, pk: int) -> Any:
    """All of its rows that are not refused, or none; a job where they are many."""
    row = _load_row(pk)
    require_own(request, "concepts.add_conceptimport", row)
    if row.dictionary is not None:
        require_own(request, "concepts.change_conceptdictionary", row.dictionary)
    _apply(request, row)
    return row.pk


def _doing(row: ConceptImport) -> str:
    return "looked at" if row.looking else "applied"


def _apply(request: HttpRequest, row: ConceptImport) -> None:
    if row.ready or row.busy:
        raise Problem(409, "This file is applied already." if row.ready else f"This file is being {_doing(row)}.")
    try:
        imports.begin(row, request.user)
    except interchange.FileRefused as refusal:
        raise Problem(422, str(refusal)) from None
    except FileNotFoundError:
        raise Problem(409, "The file is not there any more; send it again.") from None


@router.delete(
    "/concepts/load/{int:pk}",
    auth=Needs("concepts.add_conceptimport"),
    response={204: None},
    summary="Throw a file away",
)
def concepts_discard(request: HttpRequest, pk: int) -> Any:
    row = _load_row(pk)
    require_own(request, "concepts.add_conceptimport", row)
    if row.ready or row.busy:
        raise Problem(409, "This file is applied already." if row.ready else f"This file is being {_doing(row)}.")
    row.delete()
    return Status(204, None)
