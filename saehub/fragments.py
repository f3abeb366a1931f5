"""One view renders the page and its fragments: which of them is asked for; and the way back to the page that asked."""

from __future__ import annotations

from typing import Any

from django.http import HttpRequest, HttpResponseBase
from django.shortcuts import redirect
from django.utils.http import url_has_allowed_host_and_scheme


def part(request: HttpRequest, name: str) -> str:
    """`#name` when htmx asks for a fragment; "" for the whole page, also when htmx restores one from its history."""
    htmx: Any = getattr(request, "htmx", None)
    return f"#{name}" if htmx and not htmx.boosted and not htmx.history_restore_request else ""


def back_to(request: HttpRequest, to: str, default: Any) -> HttpResponseBase:
    """To the page that asked where that is one of ours, else to the default: a view's name, or an object with a page."""
    ours = url_has_allowed_host_and_scheme(to, {request.get_host()}, require_https=request.is_secure())
    return redirect(to if to and ours else default)
