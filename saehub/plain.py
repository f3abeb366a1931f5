"""Values as PostgreSQL takes them: what comes out of files of strangers, and out of computations, may hold others."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any


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
