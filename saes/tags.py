"""Tags, which are the team's short words for SAEs, and stars, which are one person's own."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import Any

from django import forms
from django.db import transaction

from saes.history import note_all
from saes.models import SAE, Star

MOST = 12  # of one SAE; with LONGEST this keeps the text that the list counts within what an index holds of a row
LONGEST = 32
TAG = re.compile(r"[^\W_][\w.:+-]*")


def tags_of(text: str) -> list[str]:
    """The tags that somebody wrote, parted by spaces or commas: in small letters, each once, in order.

    Raises ValueError with a sentence where a word cannot be one, or there are too many.
    """
    words = unicodedata.normalize("NFC", text).lower().replace(",", " ").split()
    words = [word.removeprefix("#") for word in words]
    for word in words:
        if len(word) > LONGEST:
            raise ValueError(f"A tag is a short word: {word[:LONGEST]}… has more than {LONGEST} characters.")
        if not TAG.fullmatch(word):
            raise ValueError(
                f"{word} cannot be a tag: use letters, digits and . : + - _, beginning with a letter or digit."
            )
    return _few(sorted(set(words)))


def _few(tags: list[str], name: str = "An SAE") -> list[str]:
    if len(tags) > MOST:
        raise ValueError(f"{name} has room for {MOST} tags; these would be {len(tags)}.")
    return tags


def tag(user: Any, keys: Iterable[int], *, add: Iterable[str] = (), remove: Iterable[str] = ()) -> int:
    """Add tags to SAEs and take tags off them; returns how many changed, each of which gets a line in its history.

    Raises ValueError, with nothing changed, where one of them would have too many.
    """
    new, gone = set(add), set(remove)
    with transaction.atomic():
        changed: dict[tuple[str, ...], list[tuple[int, str]]] = {}
        said: dict[str, list[tuple[int, str]]] = {}
        for row in SAE.objects.select_for_update().filter(pk__in=keys).order_by("pk").only("name", "tags"):
            before = set(row.tags)
            after = _few(sorted((before | new) - gone), row.name)
            if set(after) != before:
                changed.setdefault(tuple(after), []).append((row.pk, row.name))
                said.setdefault(_difference(before, set(after)), []).append((row.pk, row.name))
        for tags, rows in changed.items():
            SAE.objects.filter(pk__in=[pk for pk, _ in rows]).update(tags=list(tags))
        for text, rows in said.items():
            note_all(user, rows, text)
    return sum(len(rows) for rows in changed.values())


def _difference(before: set[str], after: set[str]) -> str:
    parts = (("Tagged", after - before), ("No more tagged", before - after))
    return "; ".join(f"{word} {', '.join(sorted(tags))}" for word, tags in parts if tags)


class TagsField(forms.CharField):
    """Tags in one line of text."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(max_length=1000, required=False, **kwargs)

    def prepare_value(self, value: Any) -> Any:
        return " ".join(value) if isinstance(value, list) else value

    def clean(self, value: Any) -> Any:
        try:
            return tags_of(str(super().clean(value) or ""))
        except ValueError as error:
            raise forms.ValidationError(str(error)) from None

    def has_changed(self, initial: Any, data: Any) -> bool:
        return bool(super().has_changed(self.prepare_value(initial), data))


def starred_by(user: Any) -> frozenset[int]:
    """Primary keys of the SAEs that a person starred."""
    return frozenset(Star.objects.filter(user_id=user.pk).values_list("sae_id", flat=True))


def star(user: Any, sae: SAE, on: bool = True) -> None:
    """Give an SAE this person's star, or take it off; doing it again changes nothing."""
    if on:
        Star.objects.bulk_create([Star(user_id=user.pk, sae=sae)], ignore_conflicts=True)
    else:
        Star.objects.filter(user_id=user.pk, sae=sae).delete()
