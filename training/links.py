"""What links to a form choose beforehand."""

from __future__ import annotations

from typing import Any

from django.http import HttpRequest


def given(request: HttpRequest, *names: str) -> dict[str, Any]:
    """Numbers of rows that a link chose beforehand."""
    return {name: int(value) for name in names if (value := request.GET.get(name, "")).isdecimal()}
