"""Facets with exact counts, each under the other filters; one scan of an index however many rows there are.

What was counted is remembered for as long as nothing that could change it was written: a statement trigger on SAEs and on
the states of jobs adds a row to `saes_listchange` in the writer's own transaction (migration 0009), so a count and the
version it is remembered under are never of different rows.
"""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from threading import Lock
from typing import Any

from django.core.exceptions import EmptyResultSet
from django.db import connection, transaction
from django.db.models import BooleanField, Count, ExpressionWrapper, Q, QuerySet, Value

from saehub.figures import exact_text
from saes.facets import FACET_FIELDS, SEPARATOR
from saes.filters import FACETS, LABELS, NAMES, NOTHING, PENDING, Filters, is_one_of, state_is
from saes.models import SAE

SHORT = 8  # values of a facet that show at once; the others unfold


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


Said = str | tuple[str, ...]  # of a facet; of tags it is all that a row has
Key = tuple[Said, ...]  # of a group: state, then FACET_FIELDS without `here`
GROUP = ("state", *(name for name in FACET_FIELDS if name != "here"))
PLACES = {"state": 0} | {key: GROUP.index(name) for key, _, name in FACETS if name in GROUP}
COUNT = "SELECT facets, layer, GROUPING(facets), {of_groups}, {of_layers} FROM ({rows}) AS found GROUP BY GROUPING SETS ((facets), (layer))"
ALL, SOME = "count(*)", "count(*) FILTER (WHERE {}::boolean)"
VERSION = "SELECT sum(weight), max(id), count(*) FROM saes_listchange"
FOLD = """
WITH gone AS (
    DELETE FROM saes_listchange WHERE id IN (SELECT id FROM saes_listchange ORDER BY id FOR UPDATE SKIP LOCKED) RETURNING weight
)
INSERT INTO saes_listchange (weight) SELECT sum(weight) FROM gone HAVING count(*) > 0
"""
MOST_CHANGES = 1_000  # rows of saes_listchange, which are then made one
MOST_TEXTS = 16_384  # taken apart once for all requests
MOST_REMEMBERED = 48  # lists of filters; one is some hundred kilobytes where the registry is large


def facets_of(filters: Filters) -> tuple[list[Facet], int]:
    """All facets with their counts, each under the others, and how many rows are under all choices."""
    version = list_version()
    key = (filters.words, tuple(sorted(filters.chosen.items())), filters.least, filters.most, filters.among)
    return remembered.get(version, key, lambda: _facets_of(filters, version))


def _facets_of(filters: Filters, version: Version) -> tuple[list[Facet], int]:
    groups, layers = _counted(filters, version)
    wanted = {PLACES[key]: values for key, values in filters.chosen.items() if key != "layer"}
    counts: dict[str, Counter[Any]] = {key: Counter() for key, _, _ in FACETS}
    keys = {place: key for key, place in PLACES.items()}
    total = 0
    for group, n in groups.items():
        off = [place for place, values in wanted.items() if not _is_one(group[place], values)]
        if not off:
            total += n
            for key, place in PLACES.items():
                counts[key][group[place]] += n
        elif len(off) == 1:  # only its own filter leaves it out, so it counts for that facet
            counts[keys[off[0]]][group[off[0]]] += n
    counts["layer"] = layers
    counts["tag"] = _each(counts["tag"])
    return [_facet(key, label, counts[key], filters.chosen.get(key, frozenset())) for key, label, _ in FACETS], total


def _is_one(value: Said, values: frozenset[str]) -> bool:
    if isinstance(value, tuple):
        return not values.isdisjoint(value or (NOTHING,))
    return (value or NOTHING) in values


def _each(tags: Counter[tuple[str, ...]]) -> Counter[str]:
    """Rows of each tag, from rows of each set of tags; "" is none."""
    found: Counter[str] = Counter()
    for words, n in tags.items():
        for word in words or ("",):
            found[word] += n
    return found


def _counted(filters: Filters, version: Version) -> tuple[Counter[Key], Counter[str]]:
    """Rows of each group under search, L0 range and layer; rows of each layer under everything but the layer. One scan."""
    layer = filters.chosen.get("layer")
    in_groups = _in_groups(filters, version)
    rows = filters.base().annotate(
        in_layer=_truth(is_one_of("layer", layer) if layer else Q()), in_groups=_truth(in_groups)
    )
    groups: Counter[Key] = Counter()
    layers: Counter[str] = Counter()
    try:
        sql, params = rows.order_by().values("facets", "layer", "in_layer", "in_groups").query.sql_with_params()
    except EmptyResultSet:  # nothing can match
        return groups, layers
    with _by_index(filters.words), connection.cursor() as cursor:
        of_groups = SOME.format("in_layer") if layer else ALL
        of_layers = SOME.format("in_groups") if in_groups else ALL
        cursor.execute(COUNT.format(rows=sql, of_groups=of_groups, of_layers=of_layers), params)
        for text, number_of_layer, of_layer, in_layer, in_groups in cursor:
            if of_layer:
                layers["" if number_of_layer is None else str(number_of_layer)] += in_groups
            else:
                groups[_key(text)] += in_layer
    _take_out_pending(groups, filters.base().filter(is_one_of("layer", layer)) if layer else filters.base())
    return groups, layers


@contextmanager
def _by_index(words: str) -> Iterator[None]:
    """Let a search for words be read off their index, which is several times as fast even where nearly all rows match.

    To the planner a match of `words` costs as little as a comparison of numbers, so by itself it reads them of every row.
    """
    if not words:
        yield
        return
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("SET LOCAL enable_seqscan = off")
        yield
        cursor.execute("SET LOCAL enable_seqscan TO DEFAULT")


@lru_cache(MOST_TEXTS)
def _key(text: str) -> Key:
    here, *rest, tags, model = text.split(SEPARATOR, len(FACET_FIELDS) - 1)
    return ("here" if here else "none", *rest, () if tags == "[]" else tuple(json.loads(tags)), model)


def _take_out_pending(groups: Counter[Key], rows: QuerySet[SAE]) -> None:
    """Rows whose download waits, runs or failed are not merely "not downloaded"."""
    pending = rows.filter(ready_at=None, job__isnull=False, job__state__in=list(PENDING))
    for text, state, n in pending.order_by().values_list("facets", "job__state").annotate(n=Count("*")):
        key = _key(text)
        groups[(PENDING[state], *key[1:])] += n
        groups[key] -= n


def _truth(condition: Q) -> Any:
    return ExpressionWrapper(condition, BooleanField()) if condition else Value(True)


def _in_groups(filters: Filters, version: Version) -> Q:
    """Whether a row is under the facets but the layer. Which texts those are is asked first, which takes milliseconds and
    leaves the large scan inside of its index."""
    chosen = {key: values for key, values in filters.chosen.items() if key != "layer"}
    state = chosen.pop("state", frozenset())
    if state == {"here"}:  # the one state that the texts tell
        chosen["state"], state = state, frozenset()
    condition = Q()
    if filters.words:  # the scan reads whole rows anyway
        for key, values in chosen.items():
            condition &= state_is(values) if key == "state" else is_one_of(NAMES[key], values)
    elif chosen:
        texts = remembered.get(version, "texts", _texts)
        fits = [text for text in texts if all(_is_one(_key(text)[PLACES[key]], chosen[key]) for key in chosen)]
        condition &= Q(facets__in=fits) if fits else Q(pk__in=[])
    if state:
        condition &= state_is(state)
    return condition


def _texts() -> list[str]:
    return list(SAE.objects.order_by().values_list("facets", flat=True).distinct())


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
        return "without one" if key == "tag" else "not known"
    if key == "width" and value.isdecimal():
        return exact_text(int(value))
    return LABELS.get(key, {}).get(value, value)


def _rank(key: str, value: str) -> tuple[int, int, str]:
    if key in LABELS:
        return 0, list(LABELS[key]).index(value) if value in LABELS[key] else 99, value
    return (
        (0, int(value), "") if value.isdecimal() and key in ("layer", "width") else (value == NOTHING, 0, value.lower())
    )


# -- remembering -------------------------------------------------------------------------------------------------------
Version = tuple[int, int]


def list_version() -> Version:
    """Names what this connection sees of SAEs and of the states of jobs.

    Each writing transaction adds a row with an id that never comes again, also when it is rolled back. With the same
    largest id the sum of weights only grows, so an equal pair means the same transactions are seen.
    """
    with connection.cursor() as cursor:
        cursor.execute(VERSION)
        weight, newest, rows = cursor.fetchone()
        if rows > MOST_CHANGES:
            cursor.execute(FOLD)  # no sum changes, for whoever looks when
    return int(weight), newest


class Remembered:
    """The newest answers of one version, in this process. What is remembered is never changed by who gets it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._version: Version | None = None
        self._answers: OrderedDict[Any, Any] = OrderedDict()

    def get(self, version: Version, key: Any, make: Callable[[], Any]) -> Any:
        """The answer to `key`, made where it is not known. The version was read before: newer answers do no harm."""
        with self._lock:
            if version == self._version and key in self._answers:
                self._answers.move_to_end(key)
                return self._answers[key]
        answer = make()
        with self._lock:
            if version != self._version:
                self._version = version
                self._answers.clear()
            self._answers[key] = answer
            while len(self._answers) > MOST_REMEMBERED:
                self._answers.popitem(last=False)
        return answer


remembered = Remembered()
