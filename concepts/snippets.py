"""An example as a page shows it: a window around its peak, and the Python that finds the same number again."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from concepts.featurefile import Example, FeatureRecord, Interval
from concepts.models import FeatureView
from saehub.charts import Chart, histogram
from saes.models import SAE

CONTEXTS: dict[str, int | None] = {"snippet": 16, "stacked": 5, "full": None}  # tokens on either side of the peak
SCALES = ("feature", "snippet")
SHOWN_TOP = 8
SHOWN_SAMPLES = 2
LINES = ("marked", "broken")  # line breaks: as a sign alone, or as breaks too


@dataclass(frozen=True)
class Snippet:
    """Tokens around the peak. `maximum` is drawn at full strength; `peak` counts from the first token shown.

    `same`: how many further examples of its group show these very tokens, and are left out.
    """

    example: Example
    tokens: list[str]
    activations: np.ndarray
    special: np.ndarray
    peak: int
    maximum: float
    same: int = 0


def snippet(example: Example, around: str, maximum: float | None) -> Snippet:
    """`around` is a key of CONTEXTS; without `maximum` the example's own largest activation is the scale."""
    width = CONTEXTS[around]
    n = len(example.tokens)
    start, end = (0, n) if width is None else (max(0, example.peak - width), min(n, example.peak + width + 1))
    return Snippet(
        example,
        example.tokens[start:end],
        example.activations[start:end],
        example.special[start:end],
        example.peak - start,
        maximum or example.value,
    )


def without_repeats(snippets: list[Snippet]) -> list[Snippet]:
    """Of those that show the same tokens with the same peak the first, which says how many more there were."""
    first: dict[tuple[Any, ...], Snippet] = {}
    counts: Counter[tuple[Any, ...]] = Counter()
    for one in snippets:
        key = (one.peak, *one.tokens)
        first.setdefault(key, one)
        counts[key] += 1
    return [replace(one, same=counts[key] - 1) for key, one in first.items()]


@dataclass(frozen=True)
class Group:
    """Examples under one heading: the first few, and the rest under a fold."""

    interval: Interval | None  # None: the top contexts
    shown: list[Snippet]
    folded: list[Snippet]

    @property
    def n(self) -> int:
        """Contexts, with those that show what another shows."""
        return sum(1 + one.same for one in (*self.shown, *self.folded))


def groups(record: FeatureRecord, around: str, scale: str) -> list[Group]:
    """The top contexts, then the samples of each interval; none for a feature that never fired."""

    def group(examples: list[Example], interval: Interval | None, n: int) -> Group:
        made = [snippet(example, around, record.maximum if scale == "feature" else None) for example in examples]
        made = without_repeats(made)
        return Group(interval, made[:n], made[n:])

    intervals = [group(i.examples, i, SHOWN_SAMPLES) for i in record.intervals]
    return [group(record.top, None, SHOWN_TOP), *intervals] if record.top else []


def fires_chart(record: FeatureRecord) -> Chart | None:
    """Histogram of its activations, drawn while something else is done; None where there are none."""
    if not record.n_fires:
        return None
    found, n = record.histogram, f"{record.n_fires:,} tokens"
    return histogram(
        found.counts, found.edges, title="Activations", x_title="activation", n=n, log_y=True, size=(340, 190)
    )


def as_python(sae: SAE, view: FeatureView, record: FeatureRecord) -> str:
    """A script that computes the feature's maximum again: same model, same tokens, same token policy. "" when dead."""
    if not record.top or sae.model is None:
        return ""
    best, capture = record.top[0], view.capture
    start = "BOS, then text" if capture.prepend_bos else "text, without BOS"
    special = "stored" if capture.store_special else "seen by the model, not counted"
    return f"""\
import torch
from saes.numerics.formats import load_sae
from saes.numerics.lm import load_lm

lm = load_lm({sae.model.load_from!r}, revision={sae.model.revision or None!r})
sae = load_sae({str(sae.files)!r}{f", facts={sae.facts!r}" if sae.facts else ""})
# Context {best.context} of the capture {capture.name!r}: {capture.context_length} tokens ({start}).
# Special tokens are {special}.
ids = torch.tensor([{best.ids.tolist()}])
with torch.inference_mode():
    x = lm.activations(ids, [{view.hook!r}])[{view.hook!r}]
    acts = sae.encode(x[0])[:, {record.feature}]
print(acts[{best.peak}])  # {best.value:.6g} at token {best.peak}, {best.tokens[best.peak]!r}
"""
