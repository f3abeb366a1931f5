"""The registry as one list: trained here, imported, on the Hub; searched, narrowed by facets with exact counts, sorted.

A request asks the same few questions however many rows there are (saes/facets.py says how they stay quick):

    how many rows of each `facets` text, and of each layer    the counts of all facets, each under the others; one scan
    which downloads wait, run or failed                       few rows; they are taken out of "not downloaded"
    the keys of the rows of this page, and those rows
    what this person starred
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from django.core.paginator import Page, Paginator
from django.db.models import F, QuerySet
from django.http import QueryDict

from saehub.jobs.models import State
from saes.counting import Facet, facets_of
from saes.filters import PENDING, STATES, Filters, best_l0, best_variance
from saes.listing import PAGE, Column, sorting
from saes.models import SAE

COLUMNS = (
    Column("name", "SAE", "name"),
    Column("model", "Model, hook point", "model_name"),
    Column("architecture", "Architecture", "architecture"),
    Column("features", "Features", "d_sae", figures=True),
    Column("l0", "L0", "best_l0", figures=True),
    Column("ev", "Expl. var.", "best_variance", figures=True),
    Column("size", "Size", "size_bytes", figures=True),
    Column("state", "State"),
)
NEVER_NULL = {"name": False, "model_name": False, "architecture": False, "size_bytes": True}  # is its index descending
HERE_FIRST = (F("ready_at").desc(nulls_last=True), F("job").desc(nulls_last=True), "pk")


class Counted(Paginator):
    """A paginator that is told how many rows there are, and walks to a page from the nearer end."""

    def __init__(self, rows: QuerySet[SAE], total: int) -> None:
        super().__init__(rows, PAGE)
        self.total = total

    @cached_property
    def count(self) -> int:  # type: ignore[override]
        return self.total

    def page(self, number: Any) -> Page:
        number = self.validate_number(number)
        start = (number - 1) * PAGE
        return Page(_between(self.object_list, start, start + PAGE, self.total), number, self)


def _between(rows: Any, start: int, stop: int, total: int) -> list[Any]:
    """rows[start:stop] of an ordered queryset of `total` rows; beyond the middle it is walked from its end."""
    stop = min(stop, total)
    if start < total / 2:
        return list(rows[start:stop])
    return list(rows.reverse()[total - stop : total - start])[::-1] if start < stop else []


@dataclass(frozen=True)
class Row:
    """An SAE as the list shows it."""

    sae: SAE

    @property
    def title(self) -> str:
        """The release, or its own name."""
        return self.sae.name.removesuffix(f"/{self.sae.sae_id}") if self.sae.sae_id else self.sae.name

    @property
    def id(self) -> str:
        """Its id in the release, or where it is on the Hub."""
        place = f"{self.sae.repo_id}:{self.sae.repo_path}" if self.sae.repo_id else ""
        return self.sae.sae_id if self.title != self.sae.name else place if place != self.sae.name else ""

    @property
    def state(self) -> str:
        """A key of STATES."""
        if self.sae.ready_at is not None:
            return "here"
        return PENDING.get(State(self.sae.job.state), "none") if self.sae.job else "none"

    @property
    def word(self) -> str:
        return STATES[self.state]

    @property
    def nominal(self) -> bool:
        """Whether its width is only what its name says."""
        return self.sae.read_at is None and self.sae.ready_at is None


def registry(query: QueryDict, starred: frozenset[int] = frozenset()) -> dict[str, Any]:
    """Context of the list: page, headers, facets, filters, total. `starred`: keys of the SAEs that this person starred."""
    filters = Filters.of(query, starred)
    facets, total = facets_of(filters)
    order, headers = sorting(query.get("sort", ""), COLUMNS)
    page = Counted(_ordered(filters, order), total).get_page(query.get("page"))
    page.object_list = [Row(sae) for sae in _whole(list(page.object_list))]
    return {
        "page": page,
        "headers": headers,
        "facets": facets,
        "filters": filters,
        "words": filters.words,
        "narrowed": filters.narrowed,
        "total": total,
        "starred": starred,
        "n_starred": total if filters.among is not None else filters.rows().filter(pk__in=starred).count(),
    }


def _ordered(filters: Filters, order: Any) -> QuerySet[Any]:
    """Primary keys in order: a deep page walks an index or sorts narrow rows, never whole ones."""
    rows = filters.rows()
    if order is None:
        return rows.order_by(*HERE_FIRST).values_list("pk", flat=True)
    by = order.expression.name
    if by in NEVER_NULL and order.descending != NEVER_NULL[by]:  # its one index, walked backwards
        way = F(by).desc() if order.descending else F(by).asc(nulls_first=True)
        return rows.order_by(way, "-pk").values_list("pk", flat=True)
    rows = rows.alias(best_l0=best_l0(), best_variance=best_variance())
    return rows.order_by(order, "pk").values_list("pk", flat=True)


def _whole(keys: list[int]) -> list[SAE]:
    """The rows of a page, in the order of their keys."""
    rows = SAE.objects.select_related("job", "owner").defer(
        "config", "metrics", "proof", "facts", "asked", "notes", "words", "facets", "checksums"
    )
    found = rows.in_bulk(keys)
    return [found[key] for key in keys if key in found]


def rows_between(
    query: QueryDict, start: int, stop: int, starred: frozenset[int] = frozenset()
) -> tuple[list[SAE], int, list[Facet]]:
    """Rows of the list by their places in it, for the API: the same filters, sort and counts as the page."""
    filters = Filters.of(query, starred)
    facets, total = facets_of(filters)
    order, _ = sorting(query.get("sort", ""), COLUMNS)
    return _whole(_between(_ordered(filters, order), start, stop, total)), total, facets
