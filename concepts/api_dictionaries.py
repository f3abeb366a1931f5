"""Concept dictionaries in /api/v1: made, filled from files that are looked at first, listed, exported."""

from __future__ import annotations

from typing import Any

from django.db.models import Count
from django.http import HttpRequest
from django.shortcuts import get_object_or_404
from django.utils.datastructures import MultiValueDict
from ninja import Field, File, Form, Query, Router, Schema, Status
from ninja.files import UploadedFile
from pydantic import ConfigDict

from concepts import imports, interchange
from concepts.concept_forms import ConceptForm, DictionaryForm, ImportForm
from concepts.dictionary_views import file_of
from concepts.import_views import AT_ONCE
from concepts.models import Concept, ConceptDictionary, ConceptImport
from saehub.accounts.api_access import Needs, Problem, require_own
from saehub.accounts.api_pages import LIMIT, OFFSET, Page, like, page
from saehub.accounts.idempotency import keyed
from saehub.jobs.starting import starts
from saes.api_forms import laid_over, refuse
from saes.models import SAE

router = Router(tags=["Concepts"])
DICTIONARY: Any = {
    "id": 4, "sae_id": 12, "n_size": 4608, "name": "cities", "source": "", "notes": "", "n_concepts": 2, "owner": "ada",
    "created_at": "2026-11-22T08:00:00Z", "changed_at": "2026-11-22T08:00:00Z",
}  # fmt: skip
MEMBER: Any = {"feature": 2117, "weight": 1.0, "sign": 1, "score": 0.83}
CONCEPT: Any = {"id": 6, "dictionary_id": 4, "name": "capital cities", "description": "", "members": [MEMBER]}
LOADED: Any = {
    "id": 8, "concept_id": 8, "sae_id": 12, "dictionary_id": 4, "name": "concepts.csv", "status": "looked at", "form": "csv",
    "counts": {"added": 2, "changed": 0, "unchanged": 0, "refused": 1},
    "added": [{"row": 2, "feature": 2117, "name": "capital cities", "score": 0.83, "changes": ""}], "changed": [],
    "refused": [{"row": 3, "reason": "There is no feature 9999; this SAE has features 0 to 4,607."}],
    "job_id": None, "job_ids": [], "error": "",
}  # fmt: skip


class DictionaryOut(Schema):
    """Concepts over the features of one SAE."""

    model_config = ConfigDict(json_schema_extra={"examples": [DICTIONARY]})

    id: int
    sae_id: int
    n_size: int
    name: str
    source: str
    notes: str
    n_concepts: int
    owner: str | None
    created_at: Any
    changed_at: Any


class DictionaryIn(Schema):
    """A new dictionary."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"sae_id": 12, "name": "cities"}]})

    sae_id: int
    name: str = Field(max_length=10_000)
    source: str = Field("", max_length=10_000)
    notes: str = ""


class DictionaryChange(Schema):
    """What is to be different; the rest stays."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"notes": "read twice"}]})

    name: str | None = Field(None, max_length=10_000)
    source: str | None = Field(None, max_length=10_000)
    notes: str | None = None


class MemberIO(Schema):
    """A feature of a concept: weight from 0, sign 1 or -1, and how well the name fits, where that was measured."""

    model_config = ConfigDict(extra="forbid")

    feature: int
    weight: float = Field(1.0, ge=0, allow_inf_nan=False)
    sign: int = 1
    score: float | None = Field(None, allow_inf_nan=False)


class ConceptOut(Schema):
    """A concept with the features that carry it."""

    model_config = ConfigDict(json_schema_extra={"examples": [CONCEPT]})

    id: int
    dictionary_id: int
    name: str
    description: str
    members: list[MemberIO]


class ConceptIn(Schema):
    """A new concept."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"name": "capital cities", "members": [{"feature": 2117}]}]}
    )

    name: str = Field(max_length=10_000)
    description: str = ""
    members: list[MemberIO] = Field(max_length=10_000)


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


def dictionaries() -> Any:
    return ConceptDictionary.objects.select_related("sae", "owner").annotate(n_concepts=Count("concepts"))


def dictionary_out(row: Any) -> dict[str, Any]:
    names = [name for name in DICTIONARY if name not in ("n_size", "owner")]
    return {name: getattr(row, name) for name in names} | {
        "n_size": row.sae.n_features,
        "owner": row.owner.get_username() if row.owner else None,
    }


def concept_out(row: Concept) -> dict[str, Any]:
    members = [
        {"feature": one.feature, "weight": one.weight, "sign": one.sign, "score": one.score}
        for one in row.members.all()
    ]
    names = ("id", "dictionary_id", "name", "description")
    return {name: getattr(row, name) for name in names} | {"members": members}


@router.get(
    "/concepts/dictionaries",
    auth=Needs("concepts.view_conceptdictionary"),
    response=Page[DictionaryOut],
    summary="Concept dictionaries",
)
def dictionary_list(
    request: HttpRequest, sae_id: int | None = None, q: str = "", limit: int = LIMIT, offset: int = OFFSET
) -> Any:
    rows = dictionaries().filter(name__icontains=q)
    return page(rows.filter(sae=sae_id) if sae_id is not None else rows, limit, offset, dictionary_out)


@router.post(
    "/concepts/dictionaries",
    auth=Needs("concepts.add_conceptdictionary"),
    response={201: DictionaryOut},
    summary="A new dictionary",
)
@keyed
def dictionary_create(request: HttpRequest, given: DictionaryIn) -> Any:
    data = given.dict()
    return Status(201, dictionary_out(_new(request, data.pop("sae_id"), **data)))


def _new(request: HttpRequest, sae: int, **fields: Any) -> Any:
    form = DictionaryForm(laid_over(DictionaryForm(), fields | {"sae": sae}))
    refuse(form, {"sae": "sae_id"})
    form.instance.owner = request.user
    return dictionaries().get(pk=form.save().pk)


@router.get(
    "/concepts/dictionaries/{int:pk}",
    auth=Needs("concepts.view_conceptdictionary"),
    response=DictionaryOut,
    summary="One dictionary",
)
def dictionary_detail(request: HttpRequest, pk: int) -> Any:
    return dictionary_out(get_object_or_404(dictionaries(), pk=pk))


@router.patch(
    "/concepts/dictionaries/{int:pk}",
    auth=Needs("concepts.change_conceptdictionary"),
    response=DictionaryOut,
    summary="Change what is said of it",
)
def dictionary_edit(request: HttpRequest, pk: int, given: DictionaryChange) -> Any:
    row = get_object_or_404(ConceptDictionary.objects.select_related("sae"), pk=pk)
    require_own(request, "concepts.change_conceptdictionary", row)
    said = {name: value for name, value in given.dict().items() if value is not None}
    form = DictionaryForm({name: getattr(row, name) for name in ("name", "source", "notes")} | said, instance=row)
    refuse(form)
    return dictionary_out(dictionaries().get(pk=form.save().pk))


@router.delete(
    "/concepts/dictionaries/{int:pk}",
    auth=Needs("concepts.delete_conceptdictionary"),
    response={204: None},
    summary="Delete a dictionary, with its history",
)
def dictionary_delete(request: HttpRequest, pk: int) -> Any:
    row = get_object_or_404(ConceptDictionary, pk=pk)
    require_own(request, "concepts.delete_conceptdictionary", row)
    row.delete()
    return Status(204, None)


@router.get(
    "/concepts/dictionaries/{int:pk}/concepts",
    auth=Needs("concepts.view_conceptdictionary"),
    response=Page[ConceptOut],
    summary="Its concepts",
)
def concept_list(request: HttpRequest, pk: int, q: str = "", limit: int = LIMIT, offset: int = OFFSET) -> Any:
    rows = get_object_or_404(ConceptDictionary, pk=pk).concepts.filter(name__icontains=q).prefetch_related("members")
    return page(rows, limit, offset, concept_out)


@router.post(
    "/concepts/dictionaries/{int:pk}/concepts",
    auth=Needs("concepts.change_conceptdictionary"),
    response={201: ConceptOut},
    summary="A new concept",
)
@keyed
def concept_create(request: HttpRequest, pk: int, given: ConceptIn) -> Any:
    dictionary = get_object_or_404(ConceptDictionary.objects.select_related("sae"), pk=pk)
    require_own(request, "concepts.change_conceptdictionary", dictionary)
    lines = members_text(given.members)
    form = ConceptForm(dictionary, {"name": given.name, "description": given.description, "members": lines})
    refuse(form)
    name = form.cleaned_data["name"]
    dictionary.change({name: form.state()}, request.user, f"New concept {name}")
    return Status(201, concept_out(dictionary.concepts.get(name=name)))


def members_text(members: list[MemberIO]) -> str:
    """As the form takes them. Raises Problem."""
    if any(one.sign not in (1, -1) for one in members):
        raise Problem(422, "members: the sign of a member is 1 or -1.")
    return "\n".join(_line(one) for one in members)


def _line(one: MemberIO) -> str:
    score = "" if one.score is None else f" {one.score!r}"
    return f"{one.feature} {one.sign * one.weight!r}{score}"


@router.get(
    "/concepts/dictionaries/{int:pk}/export",
    auth=Needs("concepts.view_conceptdictionary"),
    summary="A dictionary as a file",
    response=like({"n_size": 4608, "concepts": {"2117": {"name": "capital cities", "score": 0.83}}}),
)
def dictionary_export(
    request: HttpRequest,
    pk: int,
    format: str = Query("mi_crow", description=f"One of {', '.join(interchange.FORMATS)}"),
) -> Any:
    """mi_crow: `{"n_size", "concepts": {"5": {"name", "score"}}}`, the shape of that server's dictionary."""
    return _exported(request, get_object_or_404(ConceptDictionary.objects.select_related("sae"), pk=pk), format, pk)


@router.get(
    "/saes/{int:pk}/labels/export",
    auth=Needs("concepts.view_label"),
    summary="The labels of an SAE as a file",
    response=like({"feature": 2117, "name": "capital cities"}),
)
def label_export(
    request: HttpRequest,
    pk: int,
    format: str = Query("jsonl", description=f"One of {', '.join(interchange.FORMATS)}"),
) -> Any:
    return _exported(request, get_object_or_404(SAE, pk=pk), format, pk)


def _exported(request: HttpRequest, what: ConceptDictionary | SAE, form: str, pk: int) -> Any:
    if form not in interchange.FORMATS:
        raise Problem(422, f"format: there is no {form[:40]}; choose one of {', '.join(interchange.FORMATS)}.")
    return file_of(
        request, form, what, f"{'dictionary' if isinstance(what, ConceptDictionary) else 'labels-of-sae'}-{pk}"
    )


# ------------------------------------------------------------------------------------------------------------- files


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
        row.delete()
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
        made = _new(request, form.sae_id or 0, name=form.dictionary)
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
        if imports.is_long(row) or imports.plan(row).effective > AT_ONCE:
            row.start(request.user)
        else:
            imports.apply(row, request.user)
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
