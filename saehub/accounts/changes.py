"""The log of changes: every request of a known person that changes something leaves a row, whichever way it comes.

What exactly was changed is in the history of the row itself where it has one; this says who, when, and on what.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from django.db import DatabaseError
from django.http import HttpRequest, HttpResponseBase

from saehub.accounts.models import APIToken, Change
from saehub.plain import plain

log = logging.getLogger(__name__)
LOOKS = ("GET", "HEAD", "OPTIONS")


class ChangesMiddleware:
    """Writes a row after each request that was neither a look nor refused."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponseBase]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponseBase:
        if request.method in LOOKS:
            return self.get_response(request)
        leaving = request.user if request.user.is_authenticated else None  # who logs out is nobody after it
        response = self.get_response(request)
        if response.status_code < 400:
            keep(request, leaving)
        return response


def keep(request: HttpRequest, leaving: Any = None) -> None:
    """A row about this request. The change is made: a log that cannot be written does not undo the answer."""
    user: Any = request.user if request.user.is_authenticated else leaving
    if user is None or request.resolver_match is None:
        return
    token = getattr(request, "auth", None)
    spaces = request.resolver_match.namespaces
    way = Change.Way.API if "api" in spaces else Change.Way.ADMIN if "admin" in spaces else Change.Way.PAGE
    try:
        Change.objects.create(
            user=user,
            name=user.get_username(),
            way=way,
            token=token.name[:100] if isinstance(token, APIToken) else "",
            method=str(request.method)[:10],
            what=request.resolver_match.view_name[:100],
            path=plain(request.path)[:300],
        )
    except DatabaseError:
        log.exception("the log of changes lacks %s %s", request.method, request.path)
