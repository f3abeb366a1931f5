"""Lists of the API, all alike: `count`, `limit`, `offset` and `items`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from django.db.models import QuerySet
from ninja import Query, Schema

MOST = 200
FARTHEST = 10_000_000
LIMIT: int = Query(50, ge=1, le=MOST, description=f"Items at most, 1 to {MOST}")
OFFSET: int = Query(0, ge=0, le=FARTHEST, description="Items left out in front")

Item = TypeVar("Item")


class Page(Schema, Generic[Item]):
    """A part of a list: `items` from `offset` on, of `count` in all."""

    count: int
    limit: int
    offset: int
    items: list[Item]


def page(
    rows: QuerySet[Any] | Sequence[Any], limit: int, offset: int, shown: Callable[[Any], dict[str, Any]]
) -> dict[str, Any]:
    """`limit` of the rows from `offset` on, each as `shown` writes it."""
    count = rows.count() if isinstance(rows, QuerySet) else len(rows)
    return {
        "count": count,
        "limit": limit,
        "offset": offset,
        "items": [shown(row) for row in rows[offset : offset + limit]],
    }
