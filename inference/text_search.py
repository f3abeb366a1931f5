"""Which features fire on a text, over all SAEs that read it: ranked by strength, by share of their maximum, or by rarity.

score_i(t) = z_i(t) * ln((n + 1) / (fires_i + 1)), with fires_i of n tokens from the SAE's largest view: what tf-idf is for
words, so that a feature that fires on every second token does not stand before one that fires on this subject alone. A
feature that fires on every token scores 0; one that never fired in the view counts as rarer than one that fired once.
Codes of different SAEs have no common unit, so each SAE has a ranking of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from concepts import featurefile
from concepts.models import Label, largest_view, name_of
from inference.codes import CodesFile, Fires
from inference.models import Inference
from saes.models import SAE

ORDERS = {
    "score": "density-adjusted score",
    "value": "activation",
    "share": "share of its maximum",
    "total": "sum over the text",
}
SHOWN = 10


@dataclass(frozen=True)
class Hit:
    """A feature that fires: its value and where it is ranked highest; density, maximum and score where harvested."""

    feature: int
    value: float
    token: int
    n_fires: int
    score: float | None
    share: float | None
    density: float | None
    label: str | None
    tokens: list[str]


@dataclass(frozen=True)
class Ranking:
    """The strongest features of one SAE on the text, and how many fire at all."""

    sae: SAE
    hits: list[Hit]
    n_features: int
    harvested: bool  # without a view nothing is known of density and maximum, and values are ranked


def rankings(
    row: Inference,
    *,
    text: int = 0,
    order: str = "score",
    token: int | None = None,
    density_max: float | None = None,
    n: int = SHOWN,
) -> list[Ranking]:
    """The features of every SAE on the text-th of the texts that were read, on one token or on all that are no control tokens.

    order: a key of ORDERS. density_max: leave out features that fire on a larger share of the view's tokens. Raises
    inference.codes.CodesError when the files are gone.
    """
    file = CodesFile(row.text_folder(text))
    return [ranking(sae, file.sae(number), order, token, density_max, n) for number, sae in readers(row)]


def readers(row: Inference) -> list[tuple[int, SAE]]:
    """The SAEs that read it and are still here, each with its number in the files."""
    saes = {sae.pk: sae for sae in row.saes.all()}
    return [(number, saes[fact["sae"]]) for number, fact in enumerate(row.facts) if fact["sae"] in saes]


def ranking(sae: SAE, fires: Fires, order: str, token: int | None, density_max: float | None, n: int) -> Ranking:
    """As `rankings`, of one SAE by what fired of it."""
    columns = columns_of(sae)
    positions = fires.positions
    kept = positions == token if token is not None else ~fires.special[positions]
    features, values, positions = fires.features[kept], fires.values[kept], positions[kept]
    if columns is not None and density_max is not None:
        seldom = columns.summary["density"][features] <= density_max
        features, values, positions = features[seldom], values[seldom], positions[seldom]
    found, at, counts = np.unique(features, return_inverse=True, return_counts=True)
    by = _strength(order, columns, features, values, at)
    best = np.lexsort((positions, -by, at))[np.concatenate([[0], counts.cumsum()[:-1]])] if len(found) else found
    chosen = best[np.argsort(-by[best], kind="stable")[:n]].tolist()
    labels = Label.objects.accepted_of(sae, features[chosen].tolist())
    hits = [
        _hit(columns, labels, int(features[i]), float(values[i]), int(positions[i]), int(counts[at[i]])) for i in chosen
    ]
    return Ranking(sae, hits, len(found), columns is not None)


def columns_of(sae: SAE) -> featurefile.FeatureView | None:
    """Those of its largest view, where that is of the SAE as it is now."""
    found = largest_view(sae)
    return found[1] if found and found[1].n_features == sae.n_features else None


def _strength(
    order: str, columns: featurefile.FeatureView | None, features: np.ndarray, values: np.ndarray, at: np.ndarray
) -> np.ndarray:
    """What is ranked by, of every code (f,); without a view the values themselves."""
    strength = np.abs(values).astype(np.float64)
    if order == "total":
        return np.bincount(at, weights=strength)[at] if len(at) else strength
    if columns is None or order == "value":
        return strength
    if order == "share":
        maximum = columns.summary["max"][features]
        return np.divide(strength, maximum, out=np.zeros_like(strength), where=maximum > 0)
    return strength * rarity(columns, features)


def rarity(columns: featurefile.FeatureView, features: Any) -> Any:
    """ln((n + 1) / (fires + 1)) of features in a view, in nats."""
    return np.log((columns.n_tokens + 1) / (columns.summary["n_fires"][features] + 1))


def _hit(
    columns: featurefile.FeatureView | None,
    labels: dict[int, str],
    feature: int,
    value: float,
    token: int,
    n_fires: int,
) -> Hit:
    if columns is None:
        return Hit(feature, value, token, n_fires, None, None, None, labels.get(feature), [])
    maximum, density = float(columns.summary["max"][feature]), float(columns.summary["density"][feature])
    score = abs(value) * float(rarity(columns, feature))
    share = abs(value) / maximum if maximum else None
    return Hit(feature, value, token, n_fires, score, share, density, labels.get(feature), name_of(columns, feature))
