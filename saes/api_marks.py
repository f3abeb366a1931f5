"""Tags and stars by /api/v1."""

from __future__ import annotations

from typing import Any

from django.http import HttpRequest
from django.shortcuts import get_object_or_404
from ninja import Field, Router, Schema
from pydantic import ConfigDict

from saehub.accounts.api_access import Needs, Problem
from saes.basket import MOST
from saes.models import SAE
from saes.tags import star, tag, tags_of

router = Router(tags=["SAEs"])


class TagsIn(Schema):
    """Which SAEs, and what to add to their tags and take off them."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"saes": [12, 13], "add": ["paper"], "remove": ["to-check"]}]}
    )

    saes: list[int] = Field(min_length=1, max_length=MOST)
    add: list[str] = Field(default_factory=list, max_length=100)
    remove: list[str] = Field(default_factory=list, max_length=100)


class Tagged(Schema):
    """How many SAEs changed, and the tags of all that were named."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"changed": 2, "tags": {"12": ["paper"], "13": ["paper"]}}]}
    )

    changed: int
    tags: dict[str, list[str]]


class Starred(Schema):
    model_config = ConfigDict(json_schema_extra={"examples": [{"id": 12, "starred": True}]})

    id: int
    starred: bool


@router.post("/saes/tags", auth=Needs("saes.tag_sae"), response=Tagged, summary="Tag SAEs, or take tags off them")
def sae_tag(request: HttpRequest, wanted: TagsIn) -> dict[str, Any]:
    """Tags are the team's: whoever may tag does so whosever SAE it is. Each change is in the SAE's history."""
    keys = set(wanted.saes)
    missing = keys - set(SAE.objects.filter(pk__in=[pk for pk in keys if 0 < pk < 2**63]).values_list("pk", flat=True))
    if missing:
        raise Problem(404, f"There is no SAE {min(missing)}.")
    try:
        changed = tag(request.user, keys, add=_words(wanted.add), remove=_words(wanted.remove))
    except ValueError as error:
        raise Problem(422, str(error)) from None
    found = SAE.objects.filter(pk__in=keys).order_by("pk").values_list("pk", "tags")
    return {"changed": changed, "tags": {str(pk): tags for pk, tags in found}}


def _words(given: list[str]) -> list[str]:
    """Raises ValueError where one of the texts is not one tag."""
    found = [tags_of(text[:1000]) for text in given]
    for text, tags in zip(given, found, strict=True):
        if len(tags) != 1:
            raise ValueError(f"{text[:40]!r} is not one tag.")
    return [tags[0] for tags in found]


@router.put("/saes/{int:pk}/star", auth=Needs("saes.star_sae"), response=Starred, summary="Give it your star")
def sae_star(request: HttpRequest, pk: int) -> dict[str, Any]:
    """Stars are each person's own; `GET /saes?starred=true` lists yours."""
    star(request.user, get_object_or_404(SAE.objects.only("pk"), pk=pk))
    return {"id": pk, "starred": True}


@router.delete("/saes/{int:pk}/star", auth=Needs("saes.star_sae"), response=Starred, summary="Take your star off it")
def sae_unstar(request: HttpRequest, pk: int) -> dict[str, Any]:
    star(request.user, get_object_or_404(SAE.objects.only("pk"), pk=pk), on=False)
    return {"id": pk, "starred": False}
