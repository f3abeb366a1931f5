"""What links to a form choose beforehand."""

from __future__ import annotations

from typing import Any

from django.http import HttpRequest

from saehub.typed import whole_number


def given(request: HttpRequest, *names: str) -> dict[str, Any]:
    """Numbers of rows that a link chose beforehand."""
    numbers = {name: whole_number(request.GET.get(name, "")) for name in names}
    return {name: number for name, number in numbers.items() if number is not None}
