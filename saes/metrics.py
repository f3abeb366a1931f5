"""How an SAE's metrics are shown: their order, their words, and which belong together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from saehub.charts import Chart, density_histogram
from saehub.figures import count_text

GROUPS: dict[str, dict[str, str]] = {
    "Reconstruction": {
        "explained_variance": "explained variance",
        "fvu": "FVU",
        "explained_variance_per_dimension": "expl. var., mean of dimensions",
        "explained_variance_centred": "expl. var., centred",
        "explained_variance_legacy": "expl. var., legacy",
        "cosine": "cosine",
        "l2_norm_in": "norm in",
        "l2_norm_out": "norm out",
        "l2_ratio": "L2 ratio",
        "relative_reconstruction_bias": "relative bias",
        "mse": "squared error",
        "mse_per_dimension": "squared error per dimension",
    },
    "Sparsity": {
        "l0": "L0",
        "l1": "L1",
        "dead_features": "dead features",
        "alive_fraction": "alive, share",
        "dense_features": "over-dense features",
    },
    "Language model": {
        "ce_recovered": "CE loss recovered",
        "ce_original": "CE loss, plain",
        "ce_with_sae": "CE loss, with the SAE",
        "ce_zero_ablated": "CE loss, zeros instead",
        "ce_mean_ablated": "CE loss, the mean instead",
        "ce_recovered_mean": "CE recovered, against the mean",
        "ce_increase": "CE loss added",
        "kl": "KL divergence",
        "kl_zero_ablated": "KL divergence, zeros instead",
        "kl_recovered": "KL recovered",
    },
}


@dataclass(frozen=True)
class Metric:
    """A measured number as a page shows it, with what it is, on how many tokens and on what data."""

    label: str
    id: str  # of its definition
    value: float | None
    formula: str
    n: int
    data: str

    @property
    def hover(self) -> str:
        return f"{self.formula}; n = {self.n:,}; {self.data}"


def grouped(metrics: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[Metric]]]:
    """The measured metrics in their groups; groups of which nothing was measured are left out."""
    groups = [
        (title, [_metric(key, label, metrics[key]) for key, label in of.items() if key in metrics])
        for title, of in GROUPS.items()
    ]
    return [(title, of) for title, of in groups if of]


def _metric(key: str, label: str, found: Mapping[str, Any]) -> Metric:
    return Metric(label, key, found["value"], found.get("formula", ""), found.get("n", 0), found.get("data", ""))


def density_chart(metrics: Mapping[str, Mapping[str, Any]]) -> Chart | None:
    """Features by how often they fire, where that was measured."""
    found = metrics.get("density_histogram")
    if not found or not found["value"]:
        return None
    bins = found["value"]
    return density_histogram(
        bins["counts"],
        bins["edges"],
        bins["dead"],
        size=(760, 240),
        n=f"{count_text(found['n'])} tokens of {found.get('data') or 'unnamed data'}",
    )
