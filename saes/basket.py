"""The basket: SAEs somebody chose, kept in their session until they are downloaded or put back."""

from __future__ import annotations

from collections.abc import Iterable

from django.http import HttpRequest

KEY = "basket"
MOST = 2000  # more than any release holds; a session row is not a place for the whole catalogue


def basket_of(request: HttpRequest) -> list[int]:
    """Primary keys in the order they were chosen."""
    kept = request.session.get(KEY, [])
    return [pk for pk in kept if isinstance(pk, int)] if isinstance(kept, list) else []


def put_in(request: HttpRequest, keys: Iterable[int]) -> int:
    """Add what is not in it yet, up to MOST; returns how many were added."""
    before = basket_of(request)
    new = [pk for pk in dict.fromkeys(keys) if pk not in set(before)][: MOST - len(before)]
    request.session[KEY] = before + new
    return len(new)


def take_out(request: HttpRequest, keys: Iterable[int]) -> None:
    gone = set(keys)
    request.session[KEY] = [pk for pk in basket_of(request) if pk not in gone]
