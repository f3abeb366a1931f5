"""Lists of the API, all alike: `count`, `limit`, `offset` and `items`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Generic, TypeVar

from django.db.models import QuerySet
from ninja import Field, Query, Schema

MOST = 200
FARTHEST = 10_000_000
LIMIT: int = Query(50, ge=1, le=MOST, description=f"Items at most, 1 to {MOST}")
OFFSET: int = Query(0, ge=0, le=FARTHEST, description="Items left out in front")

Item = TypeVar("Item")


def like(example: dict[str, Any]) -> Any:
    """Type of an answer that is a JSON object of a form described elsewhere, shown by an example."""
    return Annotated[dict[str, Any], Field(examples=[example])]


class Page(Schema, Generic[Item]):
    """A part of a list: `items` from `offset` on, of `count` in all."""

    count: int = Field(examples=[1])
    limit: int = Field(examples=[50])
    offset: int = Field(examples=[0])
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
