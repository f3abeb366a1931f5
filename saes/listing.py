"""Lists of rows as the pages show them: 25 a page, search, sort and filters in the URL."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from django.core.paginator import Paginator
from django.db.models import Count, F, Q, QuerySet
from django.http import HttpRequest

PAGE = 25


@dataclass(frozen=True)
class Column:
    """A column's header. `key` is its word in the URL and `by` what it sorts by; without `by` it cannot be sorted."""

    key: str
    label: str
    by: str = ""
    figures: bool = False  # right-aligned

    @property
    def first(self) -> str:
        """Sort on the first click: figures begin with the largest."""
        return f"-{self.key}" if self.figures else self.key


@dataclass(frozen=True)
class Header:
    """A column as the present list shows it: what a click sorts by, and how it is sorted now."""

    column: Column
    link: str
    order: str  # "ascending" | "descending" | "none", as aria-sort wants it


@dataclass(frozen=True)
class Facet:
    """A filter by one field's values, each with its count over the rows that the other filters leave."""

    key: str
    label: str
    chosen: str
    options: list[tuple[str, str, int]]  # value, label, rows


def listing(
    request: HttpRequest,
    rows: QuerySet[Any],
    columns: Sequence[Column],
    *,
    search: Iterable[str] = (),
    facets: Mapping[str, tuple[str, str]] | None = None,
) -> dict[str, Any]:
    """Context of a list: `page`, `headers`, `facets`, `words` (searched for), `narrowed`, and `live` while a row is being made.

    facets: URL key -> (label, text field of the row). A value that no row has leaves an empty list, which says so.
    """
    q = request.GET.get("q", "").strip()[:200]
    rows = _searched(rows, q, search)
    chosen = {key: value for key in facets or {} if (value := request.GET.get(key))}
    found = [_facet(rows, key, label, field, chosen, facets or {}) for key, (label, field) in (facets or {}).items()]
    rows = _filtered(rows, chosen, facets or {})
    sort, headers = sorting(request.GET.get("sort", ""), columns)
    rows = rows.order_by(sort, "-pk") if sort is not None else rows.order_by(*rows.model._meta.ordering)
    page = Paginator(rows, PAGE).get_page(request.GET.get("page"))
    live = any(getattr(row, "busy", False) for row in page)
    return {"page": page, "headers": headers, "facets": found, "words": q, "narrowed": bool(q or chosen), "live": live}


def _searched(rows: QuerySet[Any], q: str, fields: Iterable[str]) -> QuerySet[Any]:
    for word in q.split():
        rows = rows.filter(Q(*((f"{field}__icontains", word) for field in fields), _connector=Q.OR))
    return rows


def _filtered(rows: QuerySet[Any], chosen: Mapping[str, str], facets: Mapping[str, tuple[str, str]]) -> QuerySet[Any]:
    return rows.filter(**{facets[key][1]: value for key, value in chosen.items()})


def _facet(
    rows: QuerySet[Any],
    key: str,
    label: str,
    field: str,
    chosen: Mapping[str, str],
    facets: Mapping[str, tuple[str, str]],
) -> Facet:
    others = {name: value for name, value in chosen.items() if name != key}
    counts = _filtered(rows, others, facets).order_by(field).values_list(field).annotate(n=Count("pk", distinct=True))
    words = {} if "__" in field else dict(rows.model._meta.get_field(field).flatchoices)
    options = [(value, words.get(value, value), n) for value, n in counts[:40] if value]
    return Facet(key, label, chosen.get(key, ""), options)


def sorting(sort: str, columns: Sequence[Column]) -> tuple[Any, list[Header]]:
    """What the URL's `sort` orders by (None: the list's own order), and the headers that show it."""
    by = {column.key: column.by for column in columns if column.by}
    key, down = sort.removeprefix("-"), sort.startswith("-")
    headers = []
    for column in columns:
        mine = column.key == key and column.key in by
        link = (column.key if down else f"-{column.key}") if mine else column.first
        order = ("descending" if down else "ascending") if mine else "none"
        headers.append(Header(column, link if column.by else "", order))
    if key not in by:
        return None, headers
    field = F(by[key])
    return (field.desc(nulls_last=True) if down else field.asc(nulls_last=True)), headers
