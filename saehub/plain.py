"""Values as PostgreSQL takes them: what comes out of files of strangers, and out of computations, may hold others."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

REFUSED = "Texts may hold neither the zero character nor halves of surrogate pairs."


def storable(value: Any) -> bool:
    """Whether PostgreSQL takes every text in a value of JSON."""
    if isinstance(value, dict):
        return all(storable(part) for pair in value.items() for part in pair)
    if isinstance(value, list | tuple):
        return all(storable(part) for part in value)
    return not isinstance(value, str) or plain(value) == value


def plain(value: Any) -> Any:
    """JSON values without what PostgreSQL refuses: NaN, infinities, null characters, lone surrogates."""
    if isinstance(value, str):
        return value.replace("\0", "").encode("utf-8", "replace").decode()
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, Mapping):
        return {plain(str(key)): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value if isinstance(value, bool | int | None) else str(value)
