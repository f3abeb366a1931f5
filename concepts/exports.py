"""A harvested view as files others read: mi_crow's top texts (JSON and CSV), those of its server, Neuronpedia's features.

Every writer is a generator over features, so that a file of 131,072 features is sent while it is made. What a target
cannot hold is left out, what a view does not know is left empty: nothing is made up.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from concepts.feature_file import MOST as MOST_OF_A_PAGE
from concepts.feature_file import as_page
from concepts.featurefile import Example, FeatureRecord
from concepts.featurefile import FeatureView as Columns
from concepts.models import FeatureView
from concepts.numerics.token_text import joined
from saehub.spreadsheets import csv_lines, neutralised

TOP_MARK = (-1.0, -1.0)  # bin_min and bin_contains of Neuronpedia's group of top activations


def _top_texts(view: FeatureView, columns: Columns, features: Iterable[int]) -> Iterator[str]:
    """The file of mi_crow's server (top_texts.json), with the statistics of every feature beside its texts.

    prompts, outputs and top_neurons belong to one answer of that server and are empty here.
    """
    head: dict[str, Any] = {
        "sae_path": view.sae.path, "sae_id": str(view.sae.pk), "layer": view.sae.hook_name, "prompts": [], "outputs": [],
        "top_neurons": [], "concept_config_path": None, "n_tokens": columns.n_tokens, "corpus": view.capture.name,
    }  # fmt: skip
    yield _dumps(head)[:-1] + ', "neuron_texts": {'
    stats: list[str] = []
    for n, i in enumerate(features):
        yield f'{", " * bool(n)}"{i}": {_dumps(_texts(columns, i, ("text", "score", "token_idx", "token_str")))}'
        stats.append(f'"{i}": {_dumps(_statistics(columns, i))}')
    yield '}, "neuron_stats": {' + ", ".join(stats) + "}}\n"


def _mi_crow(view: FeatureView, columns: Columns, features: Iterable[int]) -> Iterator[str]:
    """What mi_crow's export_top_texts_to_json writes: every feature with its texts, largest first."""
    yield "{"
    for n, i in enumerate(features):
        texts = _dumps(_texts(columns, i, ("text", "score", "token_str", "token_idx")))
        yield f'{"," * bool(n)}\n  "{i}": {texts}'
    yield "\n}\n"


def _mi_crow_csv(view: FeatureView, columns: Columns, features: Iterable[int]) -> Iterator[str]:
    """What mi_crow's export_top_texts_to_csv writes, but for cells that a spreadsheet would compute."""
    names = ("text", "score", "token_str", "token_idx")
    rows = (
        (i, neutralised(one["text"]), one["score"], neutralised(one["token_str"]), one["token_idx"])
        for i in features
        for one in _texts(columns, i, names)
    )
    return csv_lines(("neuron_idx", *names), rows)


def _neuronpedia(view: FeatureView, columns: Columns, features: Iterable[int]) -> Iterator[str]:
    """A batch as sae-dashboard writes it for Neuronpedia: NeuronpediaDashboardBatch.to_dict()."""
    model, _, source = view.sae.neuronpedia_id.partition("/")
    layer, _, suite = source.partition("-")
    head = {
        "model_id": model or view.sae.model_name, "layer": int(layer) if layer.isdecimal() else view.sae.layer,
        "sae_set": suite or view.sae.name, "sae_id_suffix": None,
    }  # fmt: skip
    yield _dumps(head)[:-1] + ', "features": ['
    for n, i in enumerate(features):
        yield ", " * bool(n) + _dumps(_dashboard(view, columns, columns.feature(i)))
    yield "]}\n"


@dataclass(frozen=True)
class Format:
    """A kind of file: what it is called, its ending, what writes it, and how many features it holds at most."""

    title: str
    suffix: str
    write: Callable[[FeatureView, Columns, Iterable[int]], Iterator[str]]
    most: int | None = None

    @property
    def content_type(self) -> str:
        return CONTENT_TYPES[self.suffix]

    def too_many(self, n: int) -> str:
        """The sentence that refuses n features; "" where they can be held."""
        if self.most is None or n <= self.most:
            return ""
        return f"A {self.title} holds at most {self.most:,} features, and these are {n:,}; choose fewer."


CONTENT_TYPES = {"json": "application/json", "csv": "text/csv", "html": "text/html"}
FORMATS = {
    "html": Format("page that needs nothing else (HTML)", "html", as_page, MOST_OF_A_PAGE),
    "top_texts": Format("top texts with statistics (mi_crow server)", "json", _top_texts),
    "mi_crow": Format("top texts (mi_crow JSON)", "json", _mi_crow),
    "mi_crow_csv": Format("top texts (mi_crow CSV)", "csv", _mi_crow_csv),
    "neuronpedia": Format("features (Neuronpedia JSON)", "json", _neuronpedia),
}


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _texts(columns: Columns, i: int, names: Iterable[str]) -> list[dict[str, Any]]:
    """Top texts of a feature under mi_crow's names. token_idx counts from the context's first token, BOS included."""
    found = [
        {
            "text": text_of(example),
            "score": example.value,
            "token_str": example.tokens[example.peak],
            "token_idx": example.peak,
        }
        for example in columns.top(i)
    ]
    return [{name: one[name] for name in names} for one in found]


def text_of(example: Example) -> str:
    """The text of a context without its control tokens; characters that lie over several tokens are whole again."""
    return joined(token for token, special in zip(example.tokens, example.special.tolist(), strict=True) if not special)


def _statistics(columns: Columns, i: int) -> dict[str, Any]:
    n_fires, mean = int(columns.column("n_fires")[i]), float(columns.column("mean")[i])
    return {
        "n_fires": n_fires,
        "density": n_fires / columns.n_tokens,
        "maximum": float(columns.column("maximum")[i]),
        "mean": mean if n_fires else None,
    }


def _dashboard(view: FeatureView, columns: Columns, record: FeatureRecord) -> dict[str, Any]:
    """NeuronpediaDashboardFeature.to_dict(); lists of what a view does not hold are empty."""
    unknown = (
        "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1", "correlated_neurons_indices",
        "correlated_neurons_l1", "correlated_neurons_pearson", "correlated_features_indices", "correlated_features_l1",
        "correlated_features_pearson", "decoder_weights_dist", "vector",
    )  # fmt: skip
    edges, logits = record.histogram.edges, columns.logits_histogram(record.feature)
    alive = record.n_fires > 0
    return {"feature_index": record.feature} | {key: [] for key in unknown} | {
        "neg_str": [logit.text for logit in record.lowered],
        "neg_values": [logit.value for logit in record.lowered],
        "pos_str": [logit.text for logit in record.raised],
        "pos_values": [logit.value for logit in record.raised],
        "frac_nonzero": record.density,
        "freq_hist_data_bar_values": _middles(edges) if alive else [],
        "freq_hist_data_bar_heights": record.histogram.counts.tolist() if alive else [],
        "logits_hist_data_bar_values": _middles(logits.edges) if logits else [],
        "logits_hist_data_bar_heights": logits.counts.tolist() if logits else [],
        "n_prompts_total": view.capture.manifest.get("n_contexts", 0) if view.capture.manifest else 0,
        "n_tokens_in_prompt": view.capture.context_length,
        "dataset": view.capture.name,
        "activations": [
            _activation(example, TOP_MARK[0], record.maximum, TOP_MARK[1]) for example in record.top
        ] + [
            _activation(example, interval.low, interval.high, float(interval.share))
            for interval in record.intervals for example in interval.examples
        ],
    }  # fmt: skip


def _middles(edges: np.ndarray) -> list[float]:
    middles: list[float] = ((edges[:-1] + edges[1:]) / 2).tolist()
    return middles


def _activation(example: Example, low: float, high: float, share: float) -> dict[str, Any]:
    return {
        "bin_min": low, "bin_max": high, "bin_contains": share, "tokens": example.tokens,
        "values": np.asarray(example.activations, dtype=np.float64).round(6).tolist(),
        "qualifying_token_index": example.peak,
    }  # fmt: skip
