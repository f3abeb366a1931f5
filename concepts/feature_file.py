"""Features as one HTML file that needs nothing else: to put beside a paper, to send, to keep.

It is the page of each feature without what asks a server: the same template fragments, the same style sheets, written into
the file. Charts are drawn while it is sent, which is why it holds a limited number of features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from django.contrib.staticfiles import finders
from django.template.loader import render_to_string
from django.utils import timezone
from django.utils.safestring import SafeString, mark_safe

from concepts.featurefile import FeatureView as Columns
from concepts.models import FeatureView, Label, name_of
from concepts.snippets import fires_chart, groups

MOST = 100
LISTED_TOKENS = 6
TEMPLATE = "concepts/feature_file.html"
STYLES = ("css/base.css", "css/components.css", "css/pages.css", "css/concepts.css")
SCRIPTS = ("js/tokens.js", "js/charts.js")


def as_page(view: FeatureView, columns: Columns, features: Iterable[int]) -> Iterator[str]:
    """The file piece by piece: its head with a list of the features, each feature, its end."""
    numbers = list(features)
    labels: dict[int, list[Label]] = {i: [] for i in numbers}
    for label in Label.objects.filter(sae=view.sae, feature__in=numbers).select_related("owner"):
        labels[label.feature].append(label)
    facts = {"view": view, "sae": view.sae, "columns": columns, "lens": columns.logit_lens, "numbers": set(numbers)}
    rows = [_row(columns, i, labels[i]) for i in numbers]
    sources = {"styles": _source(STYLES), "scripts": _source(SCRIPTS), "written": timezone.now()}
    yield _part("head", facts | sources | {"rows": rows})
    for i in numbers:
        yield _part("feature", facts | _feature(columns, i, labels[i]))
    yield _part("end", facts)


def _part(name: str, context: dict[str, Any]) -> str:
    return render_to_string(f"{TEMPLATE}#{name}", context)


def _row(columns: Columns, i: int, labels: list[Label]) -> dict[str, Any]:
    n_fires = int(columns.column("n_fires")[i])
    return {
        "index": i,
        "label": next((label.text for label in labels if label.accepted), None),
        "name": name_of(columns, i, LISTED_TOKENS),
        "density": n_fires / columns.n_tokens,
        "maximum": float(columns.column("maximum")[i]) if n_fires else None,
    }


def _feature(columns: Columns, i: int, labels: list[Label]) -> dict[str, Any]:
    record = columns.feature(i)
    return {
        "feature": record,
        "index": i,
        "labels": labels,
        "accepted": next((label for label in labels if label.accepted), None),
        "name": name_of(columns, i),
        "fires": fires_chart(record),
        "prefix": f"f{i}-",
        "companions": columns.companions(i),
        "n_together": columns.n_together,
        "groups": groups(record, "snippet", "feature"),
        "around": "snippet",
        "line_css": "",
    }


@cache
def _source(names: tuple[str, ...]) -> SafeString:
    """Style sheets or modules of ours, end to end."""
    found = [finders.find(name) for name in names]
    # files of this project alone, named in this module: nothing that anybody sends
    return mark_safe("\n".join(Path(str(file)).read_text(encoding="utf-8") for file in found))
