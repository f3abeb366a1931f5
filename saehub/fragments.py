"""One view renders the page and its fragments: which of them is asked for."""

from __future__ import annotations

from typing import Any

from django.http import HttpRequest


def part(request: HttpRequest, name: str) -> str:
    """`#name` when htmx asks for a fragment; "" for the whole page, also when htmx restores one from its history."""
    htmx: Any = getattr(request, "htmx", None)
    return f"#{name}" if htmx and not htmx.boosted and not htmx.history_restore_request else ""
