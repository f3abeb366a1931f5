"""What people call features in /api/v1: labels, their history, a change undone; and a feature into a concept by its name."""

from __future__ import annotations

from typing import Any

from django.http import HttpRequest
from django.shortcuts import get_object_or_404
from ninja import Field, Query, Router, Schema, Status
from pydantic import ConfigDict

from concepts.api_dictionaries import ConceptOut, concept_out
from concepts.api_features import LabelOut, label_out, sae_of, sae_with
from concepts.concept_forms import LabelForm, LabelWordsForm, MemberForm
from concepts.models import Label, LabelChange
from saehub.accounts.api_access import Needs, require_own
from saehub.accounts.api_pages import LIMIT, OFFSET, Page, page
from saehub.accounts.idempotency import keyed
from saes.api_forms import laid_over, refuse

router = Router(tags=["Features"])
CHANGE = "concepts.change_label"
STATE: Any = {
    "text": "capital cities", "by": "", "method": "", "source": "person", "confidence": None, "score": None, "notes": "",
    "accepted": True, "owner_id": 2, "imported_id": None,
}  # fmt: skip
CHANGED: Any = {
    "id": 5, "sae_id": 12, "feature": 2117, "what": "Named capital cities", "before": [], "after": [STATE], "owner": "ada",
    "created_at": "2026-11-22T08:00:00Z",
}  # fmt: skip


class LabelIn(Schema):
    """A name for a feature."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"text": "capital cities"}]})

    text: str = Field(max_length=10_000)
    confidence: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    notes: str = ""


class LabelWords(Schema):
    """What its author says about a label; what is left out stays."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"confidence": 0.8, "notes": "seldom"}]})

    confidence: float | None = Field(None, ge=0, le=1, allow_inf_nan=False, description="null: not said")
    notes: str = ""


class LabelChangeOut(Schema):
    """One change that a person made: all labels of the feature before and after."""

    model_config = ConfigDict(json_schema_extra={"examples": [CHANGED]})

    id: int
    sae_id: int
    feature: int
    what: str
    before: list[dict[str, Any]]
    after: list[dict[str, Any]]
    owner: str | None
    created_at: Any


class MemberIn(Schema):
    """The concept's name, or dictionary/name where several dictionaries could be meant."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"concept": "cities/capitals"}]})

    concept: str = Field(max_length=10_000)


def _change_out(row: LabelChange) -> dict[str, Any]:
    names = [name for name in CHANGED if name != "owner"]
    return {name: getattr(row, name) for name in names} | {"owner": row.owner.get_username() if row.owner else None}


@router.get("/saes/{int:pk}/labels", auth=Needs("concepts.view_label"), response=Page[LabelOut], summary="Its labels")
def label_list(
    request: HttpRequest,
    pk: int,
    q: str = Query("", description="Letters of their texts"),
    feature: int | None = Query(None, ge=0, le=2**31 - 1, description="Of this feature"),
    accepted: bool | None = Query(None, description="Only those, or only the others"),
    limit: int = LIMIT,
    offset: int = OFFSET,
) -> Any:
    wanted = {"feature": feature, "accepted": accepted, "text__icontains": q or None}
    rows = Label.objects.filter(sae=sae_of(pk), **{name: value for name, value in wanted.items() if value is not None})
    return page(rows.select_related("owner").order_by("feature", "-accepted", "-pk"), limit, offset, label_out)


@router.post(
    "/saes/{int:pk}/features/{int:index}/labels",
    auth=Needs("concepts.add_label"),
    response={201: LabelOut},
    summary="Name a feature",
)
@keyed
def label_create(request: HttpRequest, pk: int, index: int, given: LabelIn) -> Any:
    """Accepted, unless another person's label is: then it is proposed."""
    sae = sae_with(pk, index)
    form = LabelForm(laid_over(LabelForm(), given.dict()))
    refuse(form)
    return Status(201, label_out(Label.objects.name_feature(sae, index, user=request.user, **form.cleaned_data)))


@router.post(
    "/labels/{int:pk}/accept", auth=Needs("concepts.change_label"), response=LabelOut, summary="Accept a label"
)
def label_accept(request: HttpRequest, pk: int) -> Any:
    """It then stands for its feature, in place of another."""
    row = get_object_or_404(Label.objects.select_related("owner", "sae"), pk=pk)
    require_own(request, "concepts.change_label", row.rival)
    row.accept(request.user)
    return label_out(row)


@router.delete("/labels/{int:pk}", auth=Needs("concepts.delete_label"), response={204: None}, summary="Delete a label")
def label_delete(request: HttpRequest, pk: int) -> Any:
    row = get_object_or_404(Label.objects.select_related("sae"), pk=pk)
    require_own(request, "concepts.delete_label", row)
    row.remove(request.user)
    return Status(204, None)


@router.patch("/labels/{int:pk}", auth=Needs(CHANGE), response=LabelOut, summary="Confidence and notes of a label")
def label_describe(request: HttpRequest, pk: int, given: LabelWords) -> Any:
    row = get_object_or_404(Label.objects.select_related("owner", "sae"), pk=pk)
    require_own(request, CHANGE, row)
    form = LabelWordsForm({"confidence": row.confidence, "notes": row.notes} | given.dict(exclude_unset=True))
    refuse(form)
    row.describe(request.user, **form.cleaned_data)
    return label_out(row)


@router.get(
    "/saes/{int:pk}/features/{int:index}/labels/history",
    auth=Needs("concepts.view_label"),
    response=Page[LabelChangeOut],
    summary="What people changed of its labels",
)
def label_history(request: HttpRequest, pk: int, index: int, limit: int = LIMIT, offset: int = OFFSET) -> Any:
    """Newest first."""
    rows = sae_with(pk, index).label_changes.filter(feature=index).select_related("owner")
    return page(rows, limit, offset, _change_out)


@router.post(
    "/labels/changes/{int:pk}/undo", auth=Needs(CHANGE), response=list[LabelOut], summary="Undo a change of labels"
)
@keyed
def label_undo(request: HttpRequest, pk: int) -> Any:
    """What others did since stays. Answers with the feature's labels; undoing is a change that can be undone."""
    change = get_object_or_404(LabelChange.objects.select_related("sae"), pk=pk)
    require_own(request, CHANGE, change)
    require_own(request, CHANGE, change.rival)
    change.undo(request.user)
    labels = Label.objects.filter(sae=change.sae, feature=change.feature).select_related("owner")
    return [label_out(row) for row in labels]


@router.post(
    "/saes/{int:pk}/features/{int:index}/concepts",
    auth=Needs("concepts.change_conceptdictionary"),
    response=ConceptOut,
    summary="Put a feature into a concept",
    tags=["Concepts"],
)
@keyed
def member_add(request: HttpRequest, pk: int, index: int, given: MemberIn) -> Any:
    """By its name; made where there is none, with weight 1."""
    form = MemberForm(sae_with(pk, index), given.dict())
    refuse(form)
    dictionary, name = form.cleaned_data["concept"]
    require_own(request, "concepts.change_conceptdictionary", dictionary)
    dictionary.add_member(name, index, request.user)
    return concept_out(dictionary.concepts.get(name=name))
