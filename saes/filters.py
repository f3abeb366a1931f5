"""What the list of SAEs may be narrowed by: words, an L0 range, the values of facets; from the URL to a WHERE."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from django.contrib.postgres.search import SearchQuery
from django.db.models import Q, QuerySet
from django.db.models.functions import Coalesce
from django.db.models.lookups import GreaterThanOrEqual, LessThanOrEqual
from django.http import QueryDict

from saehub.jobs.models import LIVE, State
from saes.models import SAE

STATES = {"here": "here", "coming": "coming", "failed": "failed", "none": "not downloaded"}
PENDING = {State.QUEUED: "coming", State.RUNNING: "coming", State.FAILED: "failed"}  # a cancelled one is "none"
NOTHING = "–"  # stands in the URL for a value that is not known


@dataclass(frozen=True)
class Filters:
    """What the URL asks for. Nonsense in it is no error: it finds nothing, or is passed over where it is no number."""

    words: str = ""
    chosen: Mapping[str, frozenset[str]] = field(default_factory=dict)
    least: float | None = None
    most: float | None = None
    among: frozenset[int] | None = None  # the starred ones, where only they are asked for

    @classmethod
    def of(cls, query: QueryDict, starred: frozenset[int] = frozenset()) -> Filters:
        def texts(key: str) -> frozenset[str]:
            return frozenset(text for value in query.getlist(key) if (text := value.replace("\0", "")[:200]))

        words = query.get("q", "").replace("\0", "").strip()[:200]
        chosen = {key: values for key, _, _ in FACETS if (values := texts(key))}
        among = starred if query.get("starred") else None
        return cls(words, chosen, number(query.get("l0_min")), number(query.get("l0_max")), among)

    @property
    def narrowed(self) -> bool:
        ranges = (self.least, self.most, self.among)
        return bool(self.words or self.chosen or any(given is not None for given in ranges))

    def base(self) -> QuerySet[SAE]:
        """Rows under the search, the L0 range and the stars: what no facet decides."""
        rows = SAE.objects.all() if self.among is None else SAE.objects.filter(pk__in=self.among)
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
                rows = rows.filter(state_is(self.chosen[key]) if key == "state" else is_one_of(name, self.chosen[key]))
        return rows


# key in the URL, label, field; in the order of the page
FACETS = (
    ("state", "State", ""),
    ("tag", "Tag", "tags"),
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


def is_one_of(name: str, values: Iterable[str]) -> Q:
    """One of the values; NOTHING is null, or empty text. A value that cannot be one of a number's is passed over."""
    known = [value for value in values if value != NOTHING]
    if name == "tags":
        match = Q(tags__has_any_keys=known)
        return match | Q(tags=[]) if NOTHING in values else match
    if name in ("layer", "d_sae"):
        match = Q(**{f"{name}__in": [int(value) for value in known if value.isdecimal() and len(value) < 10]})
        return match | Q(**{f"{name}__isnull": True}) if NOTHING in values else match
    return Q(**{f"{name}__in": [*known, *([""] if NOTHING in values else [])]})


def state_is(values: Iterable[str]) -> Q:
    pending = {"coming": Q(ready_at=None, job__state__in=LIVE), "failed": Q(ready_at=None, job__state=State.FAILED)}
    none = Q(ready_at=None) & (Q(job=None) | Q(job__state__in=[State.CANCELLED, State.DONE]))
    match = Q(pk__in=[])
    for value, condition in (pending | {"here": Q(ready_at__isnull=False), "none": none}).items():
        if value in values:
            match |= condition
    return match
