"""What becomes of concepts in /api/v1: changed and taken out, the history of their dictionary, and back."""

from __future__ import annotations

from typing import Any

from django.http import HttpRequest
from django.shortcuts import get_object_or_404
from ninja import Field, Router, Schema, Status
from pydantic import ConfigDict

from concepts.api_dictionaries import (
    ConceptOut,
    DictionaryOut,
    MemberIO,
    concept_out,
    dictionaries,
    dictionary_out,
    members_text,
)
from concepts.concept_forms import ConceptForm, member_lines
from concepts.models import Concept, ConceptDictionary, DictionaryRevision
from saehub.accounts.api_access import Needs, Problem, require_own
from saehub.accounts.api_pages import LIMIT, OFFSET, Page, page
from saehub.accounts.idempotency import keyed
from saes.api_forms import refuse

router = Router(tags=["Concepts"])
CHANGE = "concepts.change_conceptdictionary"
VIEW = "concepts.view_conceptdictionary"
REVISION: Any = {
    "number": 2, "reason": "Concept capital cities changed", "added": 0, "changed": 1, "removed": 0, "owner": "ada",
    "created_at": "2026-11-22T08:00:00Z",
}  # fmt: skip
STATE: Any = {"description": "", "members": [[2117, 1.0, 1, 0.83]]}


class ConceptChange(Schema):
    """What is to be different; `members` replaces all of them."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"members": [{"feature": 2117}]}]})

    name: str | None = Field(None, max_length=10_000)
    description: str | None = None
    members: list[MemberIO] | None = Field(None, max_length=10_000)


class RevisionOut(Schema):
    """One change of a dictionary, and how many concepts it touched."""

    model_config = ConfigDict(json_schema_extra={"examples": [REVISION]})

    number: int
    reason: str
    added: int
    changed: int
    removed: int
    owner: str | None
    created_at: Any


class RevisionDetail(RevisionOut):
    """With what each concept was before and after: [description and members, or null where there was none]."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [REVISION | {"changes": {"capital cities": [None, STATE]}}]}
    )

    changes: dict[str, list[Any]]


class RevertIn(Schema):
    """To what it was after this revision; 0: before the first."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"revision": 1}]})

    revision: int = Field(ge=0, le=10**9)


def _dictionary(pk: int) -> ConceptDictionary:
    return get_object_or_404(ConceptDictionary.objects.select_related("sae", "owner"), pk=pk)


def _own(request: HttpRequest, pk: int) -> ConceptDictionary:
    row = _dictionary(pk)
    require_own(request, CHANGE, row)
    return row


@router.get(
    "/concepts/dictionaries/{int:pk}/history", auth=Needs(VIEW), response=Page[RevisionOut], summary="Its revisions"
)
def history(request: HttpRequest, pk: int, limit: int = LIMIT, offset: int = OFFSET) -> Any:
    """Newest first."""
    rows = _dictionary(pk).revisions.defer("changes").select_related("owner")
    return page(rows, limit, offset, _revision)


def _revision(row: DictionaryRevision) -> dict[str, Any]:
    names = ("number", "reason", "added", "changed", "removed", "created_at")
    owner = row.owner.get_username() if row.owner else None
    return {name: getattr(row, name) for name in names} | {"owner": owner}


@router.get(
    "/concepts/dictionaries/{int:pk}/history/{int:number}",
    auth=Needs(VIEW),
    response=RevisionDetail,
    summary="What one revision changed",
)
def revision_detail(request: HttpRequest, pk: int, number: int) -> Any:
    row = get_object_or_404(_dictionary(pk).revisions.select_related("owner"), number=number)
    return _revision(row) | {"changes": row.changes}


@router.post(
    "/concepts/dictionaries/{int:pk}/revert", auth=Needs(CHANGE), response=DictionaryOut, summary="Back to a revision"
)
@keyed
def dictionary_revert(request: HttpRequest, pk: int, given: RevertIn) -> Any:
    """This is a revision too, so it can be undone."""
    row = _own(request, pk)
    if given.revision and not row.revisions.filter(number=given.revision).exists():
        raise Problem(404, f"{row.name} has no revision {given.revision}.")
    row.revert(given.revision, request.user)
    return dictionary_out(dictionaries().get(pk=pk))


def _concept(pk: int) -> Concept:
    return get_object_or_404(Concept.objects.select_related("dictionary__sae", "dictionary__owner"), pk=pk)


@router.get("/concepts/concepts/{int:pk}", auth=Needs(VIEW), response=ConceptOut, summary="One concept")
def concept_detail(request: HttpRequest, pk: int) -> Any:
    return concept_out(_concept(pk))


@router.patch("/concepts/concepts/{int:pk}", auth=Needs(CHANGE), response=ConceptOut, summary="Change a concept")
def concept_edit(request: HttpRequest, pk: int, given: ConceptChange) -> Any:
    """A revision of its dictionary, like every change."""
    concept = _concept(pk)
    dictionary = concept.dictionary
    require_own(request, CHANGE, dictionary)
    lines = member_lines(concept) if given.members is None else members_text(given.members)
    said = {"name": given.name, "description": given.description}
    held = {"name": concept.name, "description": concept.description, "members": lines}
    form = ConceptForm(dictionary, held | {k: v for k, v in said.items() if v is not None}, concept=concept)
    refuse(form)
    name = form.cleaned_data["name"]
    renamed = (concept.name, name) if name != concept.name else None
    dictionary.change(
        {concept.name: None, name: form.state()}, request.user, f"Concept {name} changed", renamed=renamed
    )
    return concept_out(dictionary.concepts.get(name=name))


@router.delete("/concepts/concepts/{int:pk}", auth=Needs(CHANGE), response={204: None}, summary="Take a concept out")
def concept_delete(request: HttpRequest, pk: int) -> Any:
    """The history of its dictionary brings it back."""
    concept = _concept(pk)
    require_own(request, CHANGE, concept.dictionary)
    concept.dictionary.change({concept.name: None}, request.user, f"Without concept {concept.name}")
    return Status(204, None)
