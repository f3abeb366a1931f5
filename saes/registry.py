"""The registry as one list: trained here, imported, on the Hub; searched, narrowed by facets with exact counts, sorted.

A request asks the same few questions however many rows there are (saes/facets.py says how they stay quick):

    how many rows of each `facets` text, and of each layer    the counts of all facets, each under the others; one scan
    which downloads wait, run or failed                       few rows; they are taken out of "not downloaded"
    the keys of the rows of this page, and those rows
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from django.contrib.postgres.search import SearchQuery
from django.core.exceptions import EmptyResultSet
from django.core.paginator import Paginator
from django.db import connection
from django.db.models import BooleanField, Count, ExpressionWrapper, F, Q, QuerySet, Value
from django.db.models.functions import Coalesce
from django.db.models.lookups import GreaterThanOrEqual, LessThanOrEqual
from django.http import QueryDict

from saehub.figures import exact_text
from saehub.jobs.models import LIVE, State
from saes.facets import FACET_FIELDS, SEPARATOR
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
HERE_FIRST = (F("ready_at").desc(nulls_last=True), F("job").desc(nulls_last=True), "pk")
STATES = {"here": "here", "coming": "coming", "failed": "failed", "none": "not downloaded"}
PENDING = {State.QUEUED: "coming", State.RUNNING: "coming", State.FAILED: "failed"}  # a cancelled one is "none"
SHORT = 8  # values of a facet that show at once; the others unfold
NOTHING = "–"  # stands in the URL for a value that is not known


@dataclass(frozen=True)
class Option:
    """A value of a facet; what a page of three hundred of them shows is written out here, not filter by filter."""

    id: str
    value: str
    label: str
    n: int
    count: str
    chosen: bool


@dataclass
class Facet:
    """A filter with several values to choose, each with its count under the other filters."""

    key: str
    label: str
    options: list[Option]

    @property
    def narrowed(self) -> bool:
        return any(option.chosen for option in self.options)

    @cached_property
    def shown(self) -> set[str]:
        """The chosen values and the most frequent ones; the others unfold."""
        by_size = sorted(self.options, key=lambda option: (not option.chosen, -option.n))
        return {option.value for place, option in enumerate(by_size) if option.chosen or place < SHORT}

    @property
    def first(self) -> list[Option]:
        return [option for option in self.options if option.value in self.shown]

    @property
    def more(self) -> list[Option]:
        return [option for option in self.options if option.value not in self.shown]


@dataclass(frozen=True)
class Filters:
    """What the URL asks for. Nonsense in it is no error: it finds nothing, or is passed over where it is no number."""

    words: str = ""
    chosen: Mapping[str, frozenset[str]] = field(default_factory=dict)
    least: float | None = None
    most: float | None = None

    @classmethod
    def of(cls, query: QueryDict) -> Filters:
        def texts(key: str) -> frozenset[str]:
            return frozenset(text for value in query.getlist(key) if (text := value.replace("\0", "")[:200]))

        words = query.get("q", "").replace("\0", "").strip()[:200]
        chosen = {key: values for key, _, _ in FACETS if (values := texts(key))}
        return cls(words, chosen, number(query.get("l0_min")), number(query.get("l0_max")))

    @property
    def narrowed(self) -> bool:
        return bool(self.words or self.chosen or self.least is not None or self.most is not None)

    def base(self) -> QuerySet[SAE]:
        """Rows under the search and the L0 range: what no facet decides."""
        rows = SAE.objects.all()
        if query := search_query(self.words):
            rows = rows.filter(words=query)
        elif self.words:
            rows = rows.none()
        if self.least is not None:
            rows = rows.filter(GreaterThanOrEqual(best_l0(), self.least))
        if self.most is not None:
            rows = rows.filter(LessThanOrEqual(best_l0(), self.most))
        return rows

    def rows(self) -> QuerySet[SAE]:
        """Rows under everything."""
        rows = self.base()
        for key, _, name in FACETS:
            if key in self.chosen:
                rows = rows.filter(_state_is(self.chosen[key]) if key == "state" else _is(name, self.chosen[key]))
        return rows


# key in the URL, label, field; in the order of the page
FACETS = (
    ("state", "State", ""),
    ("model", "Model", "model_name"),
    ("layer", "Layer", "layer"),
    ("site", "Site", "site"),
    ("architecture", "Architecture", "architecture"),
    ("width", "Features", "d_sae"),
    ("source", "Source", "source"),
    ("curation", "Curation", "curation"),
)
NAMES = {key: name for key, _, name in FACETS}
LABELS = {
    "source": {**dict(SAE.Source.choices)},
    "curation": {**dict(SAE.Curation.choices)},
    "state": STATES,
}


def number(text: str | None) -> float | None:
    """A finite number typed into a range, or None."""
    try:
        value = float((text or "").replace(",", ".").strip())
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def best_l0() -> Coalesce:
    """L0 measured here, else as published."""
    return Coalesce("l0", "published_l0")


def best_variance() -> Coalesce:
    """Explained variance measured here, else as published."""
    return Coalesce("explained_variance", "published_variance")


def search_query(text: str) -> SearchQuery | None:
    """Every word of the text as the beginning of a word; None when there is no letter or digit in it."""
    words = [f"'{word}':*" for word in re.findall(r"[^\W_]+", text)[:20]]
    return SearchQuery(" & ".join(words), config="simple", search_type="raw") if words else None


def _is(name: str, values: Iterable[str]) -> Q:
    """One of the values; NOTHING is null, or empty text. A value that cannot be one of a number's is passed over."""
    known = [value for value in values if value != NOTHING]
    if name in ("layer", "d_sae"):
        match = Q(**{f"{name}__in": [int(value) for value in known if value.isdecimal() and len(value) < 10]})
        return match | Q(**{f"{name}__isnull": True}) if NOTHING in values else match
    return Q(**{f"{name}__in": [*known, *([""] if NOTHING in values else [])]})


def _state_is(values: Iterable[str]) -> Q:
    pending = {"coming": Q(ready_at=None, job__state__in=LIVE), "failed": Q(ready_at=None, job__state=State.FAILED)}
    none = Q(ready_at=None) & (Q(job=None) | Q(job__state__in=[State.CANCELLED, State.DONE]))
    match = Q(pk__in=[])
    for value, condition in (pending | {"here": Q(ready_at__isnull=False), "none": none}).items():
        if value in values:
            match |= condition
    return match


# -- counting ----------------------------------------------------------------------------------------------------------
Key = tuple[str, ...]  # of a group: state, then FACET_FIELDS without `here`
GROUP = ("state", *(name for name in FACET_FIELDS if name != "here"))
PLACES = {"state": 0} | {key: GROUP.index(name) for key, _, name in FACETS if name in GROUP}
COUNT = """
SELECT facets, layer, GROUPING(facets), count(*) FILTER (WHERE in_layer::boolean), count(*) FILTER (WHERE in_groups::boolean)
FROM ({rows}) AS found GROUP BY GROUPING SETS ((facets), (layer))
"""


def facets_of(filters: Filters) -> tuple[list[Facet], int]:
    """All facets with their counts, each under the others, and how many rows are under all choices."""
    groups, layers = _counted(filters)
    wanted = {PLACES[key]: values for key, values in filters.chosen.items() if key != "layer"}
    counts: dict[str, Counter[str]] = {key: Counter() for key, _, _ in FACETS}
    keys = {place: key for key, place in PLACES.items()}
    total = 0
    for group, n in groups.items():
        off = [place for place, values in wanted.items() if (group[place] or NOTHING) not in values]
        if not off:
            total += n
            for key, place in PLACES.items():
                counts[key][group[place]] += n
        elif len(off) == 1:  # only its own filter leaves it out, so it counts for that facet
            counts[keys[off[0]]][group[off[0]]] += n
    counts["layer"] = layers
    return [_facet(key, label, counts[key], filters.chosen.get(key, frozenset())) for key, label, _ in FACETS], total


def _counted(filters: Filters) -> tuple[Counter[Key], Counter[str]]:
    """Rows of each group under search, L0 range and layer; rows of each layer under everything but the layer. One scan."""
    layer = filters.chosen.get("layer")
    rows = filters.base().annotate(
        in_layer=ExpressionWrapper(_is("layer", layer), BooleanField()) if layer else Value(True),
        in_groups=_in_groups(filters),
    )
    groups: Counter[Key] = Counter()
    layers: Counter[str] = Counter()
    try:
        sql, params = rows.order_by().values("facets", "layer", "in_layer", "in_groups").query.sql_with_params()
    except EmptyResultSet:  # nothing can match
        return groups, layers
    with connection.cursor() as cursor:
        cursor.execute(COUNT.format(rows=sql), params)
        for text, number_of_layer, of_layer, in_layer, in_groups in cursor:
            if of_layer:
                layers["" if number_of_layer is None else str(number_of_layer)] += in_groups
            else:
                groups[_key(text)] += in_layer
    _take_out_pending(groups, filters.base().filter(_is("layer", layer)) if layer else filters.base())
    return groups, layers


def _key(text: str) -> Key:
    here, *rest = text.split(SEPARATOR, len(FACET_FIELDS) - 1)
    return ("here" if here else "none", *rest)


def _take_out_pending(groups: Counter[Key], rows: QuerySet[SAE]) -> None:
    """Rows whose download waits, runs or failed are not merely "not downloaded"."""
    pending = rows.filter(ready_at=None, job__isnull=False, job__state__in=list(PENDING))
    for text, state, n in pending.order_by().values_list("facets", "job__state").annotate(n=Count("*")):
        key = _key(text)
        groups[(PENDING[state], *key[1:])] += n
        groups[key] -= n


def _in_groups(filters: Filters) -> Any:
    """Whether a row is under the facets but the layer. Which texts those are is asked first, which takes milliseconds and
    leaves the large scan inside of its index."""
    chosen = {key: values for key, values in filters.chosen.items() if key != "layer"}
    state = chosen.pop("state", frozenset())
    if state == {"here"}:  # the one state that the texts tell
        chosen["state"], state = state, frozenset()
    condition = Q()
    if filters.words:  # the scan reads whole rows anyway
        for key, values in chosen.items():
            condition &= _state_is(values) if key == "state" else _is(NAMES[key], values)
    elif chosen:
        texts = SAE.objects.order_by().values_list("facets", flat=True).distinct()
        fits = [text for text in texts if all((_key(text)[PLACES[key]] or NOTHING) in chosen[key] for key in chosen)]
        condition &= Q(facets__in=fits) if fits else Q(pk__in=[])
    if state:
        condition &= _state_is(state)
    return ExpressionWrapper(condition, BooleanField()) if condition else Value(True)


def _facet(key: str, label: str, counts: Mapping[str, int], chosen: frozenset[str]) -> Facet:
    values = {value or NOTHING: n for value, n in counts.items() if n > 0}
    values |= {value: 0 for value in chosen if value not in values}
    ordered = sorted(values, key=lambda value: _rank(key, value))
    options = [
        Option(f"f-{key}-{place}", value, _word(key, value), values[value], f"{values[value]:,}", value in chosen)
        for place, value in enumerate(ordered)
    ]
    return Facet(key, label, options)


def _word(key: str, value: str) -> str:
    if value == NOTHING:
        return "not known"
    if key == "width" and value.isdecimal():
        return exact_text(int(value))
    return LABELS.get(key, {}).get(value, value)


def _rank(key: str, value: str) -> tuple[int, int, str]:
    if key in LABELS:
        return 0, list(LABELS[key]).index(value) if value in LABELS[key] else 99, value
    return (
        (0, int(value), "") if value.isdecimal() and key in ("layer", "width") else (value == NOTHING, 0, value.lower())
    )


# -- the list ----------------------------------------------------------------------------------------------------------
class Counted(Paginator):
    """A paginator that is told how many rows there are."""

    def __init__(self, rows: QuerySet[SAE], total: int) -> None:
        super().__init__(rows, PAGE)
        self.total = total

    @cached_property
    def count(self) -> int:  # type: ignore[override]
        return self.total


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


def registry(query: QueryDict) -> dict[str, Any]:
    """Context of the list: page, headers, facets, filters, total."""
    filters = Filters.of(query)
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
    }


def _ordered(filters: Filters, order: Any) -> QuerySet[Any]:
    """Primary keys in order: a deep page walks an index or sorts narrow rows, never whole ones."""
    rows = filters.rows()
    if order is None:
        return rows.order_by(*HERE_FIRST).values_list("pk", flat=True)
    if order.descending and order.expression.name == "name":  # never null, so its index can be walked backwards
        return rows.order_by("-name", "-pk").values_list("pk", flat=True)
    rows = rows.alias(best_l0=best_l0(), best_variance=best_variance())
    return rows.order_by(order, "pk").values_list("pk", flat=True)


def _whole(keys: list[int]) -> list[SAE]:
    """The rows of a page, in the order of their keys."""
    rows = SAE.objects.select_related("job", "owner").defer(
        "config", "metrics", "proof", "facts", "asked", "notes", "words", "facets", "checksums"
    )
    found = rows.in_bulk(keys)
    return [found[key] for key in keys if key in found]


def rows_between(query: QueryDict, start: int, stop: int) -> tuple[list[SAE], int, list[Facet]]:
    """Rows of the list by their places in it, for the API: the same filters, sort and counts as the page."""
    filters = Filters.of(query)
    facets, total = facets_of(filters)
    order, _ = sorting(query.get("sort", ""), COLUMNS)
    return _whole(list(_ordered(filters, order)[start:stop])), total, facets
