"""Concept dictionaries in /api/v1: made, listed, exported."""

from __future__ import annotations

from typing import Any

from django.db.models import Count
from django.http import HttpRequest
from django.shortcuts import get_object_or_404
from ninja import Field, Query, Router, Schema, Status
from pydantic import ConfigDict

from concepts import interchange
from concepts.concept_forms import ConceptForm, DictionaryForm
from concepts.dictionary_views import file_of
from concepts.models import Concept, ConceptDictionary
from saehub.accounts.api_access import Needs, Problem, require_own
from saehub.accounts.api_pages import LIMIT, OFFSET, Page, like, page
from saehub.accounts.idempotency import keyed
from saes.api_forms import laid_over, refuse
from saes.models import SAE

router = Router(tags=["Concepts"])
DICTIONARY: Any = {
    "id": 4, "sae_id": 12, "n_size": 4608, "name": "cities", "source": "", "notes": "", "n_concepts": 2, "owner": "ada",
    "created_at": "2026-11-22T08:00:00Z", "changed_at": "2026-11-22T08:00:00Z",
}  # fmt: skip
MEMBER: Any = {"feature": 2117, "weight": 1.0, "sign": 1, "score": 0.83}
CONCEPT: Any = {"id": 6, "dictionary_id": 4, "name": "capital cities", "description": "", "members": [MEMBER]}


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
    return Status(201, dictionary_out(new_dictionary(request, data.pop("sae_id"), **data)))


def new_dictionary(request: HttpRequest, sae: int, **fields: Any) -> Any:
    """The row, as `dictionaries` gives it. Raises Problem."""
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
