"""Which features tell two sets of texts apart, over all SAEs that read them.

m_ti is the largest |z_i| on a token of text t that is no control token, 0 where the feature is silent. Of a feature:
  difference  mean of m_ti over the first set less that over the second
  score       difference * ln((n + 1) / (fires_i + 1)), with fires_i of n tokens from the SAE's largest view (text_search.py)
  effect      Cliff's delta: the share of pairs (a text of either set) with the larger m_ti in the first, less the share with
              the larger one in the second; 1 where every text of the first set is above every text of the second
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from concepts.models import Label, name_of
from inference.codes import CodesFile, Fires
from inference.models import Inference
from inference.text_search import SHOWN, columns_of, rarity
from saes.models import SAE

ORDERS = {"score": "density-adjusted difference", "difference": "difference", "effect": "effect size"}


@dataclass(frozen=True)
class Differing:
    """A feature that fires more in one set: the means of its m_ti, and in how many texts of each set it fires at all."""

    feature: int
    first: float
    second: float
    difference: float
    score: float | None
    effect: float
    n_first: int
    n_second: int
    density: float | None
    label: str | None
    tokens: list[str]


@dataclass(frozen=True)
class Contrast:
    """The features of one SAE that differ most, those of either set, and how many fire in any text."""

    sae: SAE
    first: list[Differing]
    second: list[Differing]
    n_features: int
    harvested: bool


def contrasts(
    row: Inference, n_first: int, *, order: str = "score", density_max: float | None = None, n: int = SHOWN
) -> list[Contrast]:
    """The first n_first texts of a reading against its others, by every SAE.

    order: a key of ORDERS. density_max: leave out features that fire on a larger share of the view's tokens. Raises
    inference.codes.CodesError when the files are gone.
    """
    files = [CodesFile(row.text_folder(number)) for number in range(len(row.prompts))]
    saes = {sae.pk: sae for sae in row.saes.all()}
    return [
        _contrast(saes[fact["sae"]], [file.sae(number) for file in files], n_first, order, density_max, n)
        for number, fact in enumerate(row.facts)
        if fact["sae"] in saes
    ]


def _contrast(sae: SAE, texts: list[Fires], n_first: int, order: str, density_max: float | None, n: int) -> Contrast:
    columns = columns_of(sae)
    features, peaks = _peaks(texts)
    if columns is not None and density_max is not None:
        seldom = columns.summary["density"][features] <= density_max
        features, peaks = features[seldom], peaks[:, seldom]
    first, second = peaks[:n_first], peaks[n_first:]
    difference = first.mean(0) - second.mean(0)
    score = None if columns is None else difference * rarity(columns, features)
    facts = {"difference": difference, "score": score, "effect": _effect(first, second)}
    by = facts[order] if facts[order] is not None else difference
    ranked = np.lexsort((-np.abs(difference), -np.abs(by)))  # equal effects by their difference
    sides = [[int(i) for i in ranked if sign * by[i] > 0][:n] for sign in (1, -1)]
    labels = Label.objects.accepted_of(sae, features[[i for side in sides for i in side]].tolist())

    def shown(i: int) -> Differing:
        feature = int(features[i])
        return Differing(
            feature=feature, first=float(first[:, i].mean()), second=float(second[:, i].mean()),
            difference=float(difference[i]), score=None if score is None else float(score[i]),
            effect=float(facts["effect"][i]), n_first=int((first[:, i] > 0).sum()), n_second=int((second[:, i] > 0).sum()),
            density=None if columns is None else float(columns.summary["density"][feature]), label=labels.get(feature),
            tokens=[] if columns is None else name_of(columns, feature),
        )  # fmt: skip

    more, less = ([shown(i) for i in side] for side in sides)
    return Contrast(sae, more, less, len(features), columns is not None)


def _peaks(texts: list[Fires]) -> tuple[np.ndarray, np.ndarray]:
    """The features that fire in any text (f,) ascending, and m (texts, f)."""
    fired = []
    for one in texts:
        kept = ~one.special[one.positions]
        fired.append((one.features[kept], np.abs(one.values[kept]).astype(np.float64)))
    features = np.unique(np.concatenate([numbers for numbers, _ in fired])).astype(np.int64)
    peaks = np.zeros((len(texts), len(features)))
    for peak, (numbers, values) in zip(peaks, fired, strict=True):
        np.maximum.at(peak, np.searchsorted(features, numbers), values)
    return features, peaks


def _effect(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Cliff's delta of every feature (f,) for peaks (a, f) and (b, f)."""
    signs = sum((np.sign(one - second).sum(0) for one in first), np.zeros(first.shape[1]))
    found: Any = signs / (len(first) * len(second))
    return np.asarray(found)
