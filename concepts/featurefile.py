"""Reads a harvested view: everything the pages show about the features of one SAE on one corpus, with numpy alone.

A view is a folder of columns (`<name>.npy`, memory-mapped) and `view.json`, which is written last. F features, E kept
examples, A activations of those examples, C contexts they come from, L tokens a context, V tokens of the tokenizer:

  n_fires (F,) int64              tokens on which the feature is above 0
  n_contexts (F,) int64           contexts with at least one such token
  maximum, mean (F,) float32      largest activation; mean over the tokens on which it fires (NaN when dead)
  histogram (F, 50) int64         fires in 50 equal bins from 0 to the feature's maximum
  top_token_ids (F, 10) int32     tokens by summed activation, largest first, -1 where there are fewer
  top_token_sums (F, 10) float32, top_token_counts (F, 10) int64
  example_start (F + 1,) int64    examples of feature i are rows example_start[i] to example_start[i + 1]
  example_group (E,) uint8        0: top contexts; j: interval j, counted from the lowest
  example_context (E,) int32      global context number;  example_peak (E,) int32 position of its largest activation
  example_value (E,) float32      that activation
  activation_start (E + 1,) int64, activation_position (A,) int32, activation_value (A,) float32
  context_number (C,) int32 ascending, context_document (C,) int32, context_tokens (C, L) int32
  vocabulary_start (V + 1,) int64, vocabulary_bytes uint8    token texts as UTF-8, end to end
  together_ids (F, 10) int32, together_correlations (F, 10) float32, together_counts (F, 10) int32    features that fire on the
                                  same tokens of a sample (`together` of view.json), -1 where there are fewer
  together_fires (F,) int32       tokens of that sample on which the feature fires
Written by the logit lens, together with `logit_lens.json`:
  logits_pos_ids, logits_neg_ids (F, 10) int32;  logits_pos_values, logits_neg_values (F, 10) float32
  neighbour_ids (F, 50) int32, neighbour_cosines (F, 50) float32;  decoder_norm (F,) float32
  directions (F, d_out) float16   decoder rows at norm 1, to hold against those of other SAEs
  logits_histogram (F, 50) int32  logits of all tokens in 50 equal bins from the lowest to the highest
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

VERSION = 1
FACTS = "view.json"
LENS_FACTS = "logit_lens.json"
LENS_VERSION = 2  # 1 had neither directions nor logits_histogram
HISTOGRAM_BINS = 50
SORT_KEYS = ("feature", "density", "n_fires", "n_contexts", "max", "mean")
BINS_PER_DECADE = 4
SHOWN_NEIGHBOURS = 10  # of a record; the columns hold more
CHUNK_NUMBERS = 2**22  # of directions made float32 at once


class ViewError(ValueError):
    """A view cannot be read, or was asked for something it does not have; the message is one sentence."""


@dataclass(frozen=True)
class Example:
    """One context on which a feature fires. `activations[j]` belongs to `tokens[j]` and is 0 where it does not fire.

    `special[j]` marks control tokens, which have no activation of their own unless the capture stored them.
    """

    context: int
    document: int
    ids: np.ndarray  # (L,) int32
    tokens: list[str]
    activations: np.ndarray  # (L,) float32
    special: np.ndarray  # (L,) bool
    peak: int
    value: float


@dataclass(frozen=True)
class Interval:
    """Contexts whose largest activation lies in (low, high], a random sample, and the share of all fires in it."""

    low: float
    high: float
    n_fires: int
    share: float
    examples: list[Example]


@dataclass(frozen=True)
class TopToken:
    id: int
    text: str
    count: int
    total: float

    @property
    def mean(self) -> float:
        return self.total / self.count


@dataclass(frozen=True)
class Logit:
    """A token and what one unit of the feature's direction adds to its logit (see `logit_lens["how"]`)."""

    id: int
    text: str
    value: float


@dataclass(frozen=True)
class Neighbour:
    feature: int
    cosine: float


@dataclass(frozen=True)
class Companion:
    """A feature that fires on the same tokens: the correlation of firing, on how many tokens of the sample both fire, and
    which share of the first one's that is."""

    feature: int
    correlation: float
    count: int
    share: float


@dataclass(frozen=True)
class Histogram:
    counts: np.ndarray
    edges: np.ndarray  # one more than counts


@dataclass(frozen=True)
class DensityHistogram:
    """Features by log10 of their density; those that never fired are counted apart."""

    counts: np.ndarray
    edges: np.ndarray  # log10
    dead: int
    n_tokens: int


@dataclass(frozen=True)
class FeatureRecord:
    """All that is known about one feature. `maximum` is 0 and `mean` NaN for a feature that never fired in n_tokens."""

    feature: int
    n_tokens: int
    n_fires: int
    n_contexts: int
    density: float
    maximum: float
    mean: float
    histogram: Histogram
    top: list[Example]
    intervals: list[Interval]  # highest first
    top_tokens: list[TopToken]
    raised: list[Logit]
    lowered: list[Logit]
    neighbours: list[Neighbour]
    decoder_norm: float | None


def open_view(path: str | Path) -> "FeatureView":
    """Open a finished view. Raises ViewError when it is missing, unfinished, damaged or of another version."""
    path = Path(path)
    if not path.is_dir():
        raise ViewError(f"There is no feature view {path.name}; harvest it again.")
    facts = _read_facts(path, FACTS)
    if facts is None:
        raise ViewError(f"The feature view {path.name} has no {FACTS}: it was not finished; harvest it again.")
    if facts.get("version") != VERSION:
        found = facts.get("version")
        raise ViewError(f"The feature view {path.name} has version {found}, not {VERSION}; harvest it again.")
    return FeatureView(path, facts)


def _read_facts(path: Path, name: str) -> dict[str, Any] | None:
    try:
        return json.loads((path / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ViewError(f"{name} of the feature view {path.name} is damaged ({error}); harvest it again.") from error


class FeatureView:
    """A finished view, read-only. Opening reads view.json; a column is mapped when it is first needed."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path = path
        self.facts = facts
        self.n_features: int = facts["n_features"]
        self.n_tokens: int = facts["n_tokens"]
        self._columns: dict[str, np.ndarray] = {}

    @cached_property
    def logit_lens(self) -> dict[str, Any] | None:
        """What the logit lens says about itself (`how`, `logits`, ...), or None when it was not run."""
        return _read_facts(self.path, LENS_FACTS)

    @cached_property
    def summary(self) -> dict[str, np.ndarray]:
        """One array of length F for every key of SORT_KEYS, and `top_token_ids` (F, 10)."""
        n_fires = np.array(self.column("n_fires"))
        return {
            "feature": np.arange(self.n_features),
            "n_fires": n_fires,
            "n_contexts": np.array(self.column("n_contexts")),
            "density": n_fires / self.n_tokens,
            "max": np.array(self.column("maximum")),
            "mean": np.array(self.column("mean")),
            "top_token_ids": np.array(self.column("top_token_ids")),
        }

    @property
    def lens_version(self) -> int:
        """0 without a logit lens."""
        return int(self.logit_lens.get("version", 1)) if self.logit_lens else 0

    def column(self, name: str) -> np.ndarray:
        """A column as a read-only memory map. Raises ViewError when its file is missing or damaged."""
        if name not in self._columns:
            try:
                mapped = np.load(self.path / f"{name}.npy", mmap_mode="r", allow_pickle=False)
                self._columns[name] = mapped.view(np.ndarray)  # still mapped; np.memmap is slow at being indexed
            except FileNotFoundError as error:
                raise ViewError(
                    f"The feature view {self.path.name} lost its column {name}; harvest it again."
                ) from error
            except (ValueError, OSError, EOFError) as error:
                raise ViewError(
                    f"The column {name} of the feature view {self.path.name} is damaged ({error}); harvest it again."
                ) from error
        return self._columns[name]

    # ---------------------------------------------------------------------------------------------- one feature

    def feature(self, i: int) -> FeatureRecord:
        """Everything about feature i. Raises ViewError when there is no such feature."""
        if not 0 <= i < self.n_features:
            raise ViewError(f"There is no feature {i}; this SAE has features 0 to {self.n_features - 1}.")
        n_fires, maximum = int(self.column("n_fires")[i]), float(self.column("maximum")[i])
        histogram = Histogram(np.array(self.column("histogram")[i]), np.linspace(0, maximum, HISTOGRAM_BINS + 1))
        groups = self._examples(i)
        return FeatureRecord(
            feature=i,
            n_tokens=self.n_tokens,
            n_fires=n_fires,
            n_contexts=int(self.column("n_contexts")[i]),
            density=n_fires / self.n_tokens,
            maximum=maximum,
            mean=float(self.column("mean")[i]),
            histogram=histogram,
            top=groups.get(0, []),
            intervals=self._intervals(histogram, n_fires, groups) if n_fires else [],
            top_tokens=self._top_tokens(i),
            raised=self._logits("pos", i),
            lowered=self._logits("neg", i),
            neighbours=self.feature_neighbours(i)[:SHOWN_NEIGHBOURS],
            decoder_norm=float(self.column("decoder_norm")[i]) if self.logit_lens else None,
        )

    def top(self, i: int) -> list[Example]:
        """The top contexts of feature i alone, largest first."""
        start, end = self.column("example_start")[i : i + 2].tolist()
        return [self._example(row) for row in range(start, end) if self.column("example_group")[row] == 0]

    def _examples(self, i: int) -> dict[int, list[Example]]:
        start, end = self.column("example_start")[i : i + 2]
        groups: dict[int, list[Example]] = {}
        for row in range(start, end):
            groups.setdefault(int(self.column("example_group")[row]), []).append(self._example(row))
        return groups

    def _example(self, row: int) -> Example:
        context = int(self.column("example_context")[row])
        at = int(np.searchsorted(self.column("context_number"), context))
        ids = np.array(self.column("context_tokens")[at])
        start, end = self.column("activation_start")[row : row + 2]
        activations = np.zeros(len(ids), np.float32)
        activations[self.column("activation_position")[start:end]] = self.column("activation_value")[start:end]
        return Example(
            context=context,
            document=int(self.column("context_document")[at]),
            ids=ids,
            tokens=self.token_texts(ids),
            activations=activations,
            special=np.isin(ids, self.facts["special_ids"]),
            peak=int(self.column("example_peak")[row]),
            value=float(self.column("example_value")[row]),
        )

    def _intervals(self, histogram: Histogram, n_fires: int, groups: dict[int, list[Example]]) -> list[Interval]:
        count = self.facts["intervals"]
        fires = histogram.counts.reshape(count, -1).sum(1)
        edges = histogram.edges[:: HISTOGRAM_BINS // count]
        return [
            Interval(float(edges[j]), float(edges[j + 1]), int(fires[j]), fires[j] / n_fires, groups.get(j + 1, []))
            for j in reversed(range(count))
        ]

    def _top_tokens(self, i: int) -> list[TopToken]:
        ids = self.column("top_token_ids")[i]
        rows = zip(ids, self.column("top_token_counts")[i], self.column("top_token_sums")[i], strict=True)
        return [
            TopToken(int(id), self.token_text(id), int(count), float(total)) for id, count, total in rows if id >= 0
        ]

    def _logits(self, side: str, i: int) -> list[Logit]:
        if not self._has_logits:
            return []
        rows = zip(self.column(f"logits_{side}_ids")[i], self.column(f"logits_{side}_values")[i], strict=True)
        return [Logit(int(id), self.token_text(id), float(value)) for id, value in rows]

    def feature_neighbours(self, i: int) -> list[Neighbour]:
        """The features nearest by cosine that the lens kept, nearest first; none without it."""
        if not self.logit_lens:
            return []
        rows = zip(self.column("neighbour_ids")[i], self.column("neighbour_cosines")[i], strict=True)
        return [Neighbour(int(feature), float(cosine)) for feature, cosine in rows]

    @property
    def n_together(self) -> int:
        """Tokens of the sample that companions rest on; 0 where a harvest of before kept none."""
        return int(self.facts.get("together", {}).get("n_tokens", 0))

    def companions(self, i: int) -> list[Companion]:
        """The features that fire on the same tokens, the most correlated first."""
        if not self.n_together:
            return []
        n_fires = int(self.column("together_fires")[i])
        names = ("together_ids", "together_correlations", "together_counts")
        rows = zip(*(self.column(name)[i].tolist() for name in names), strict=True)
        return [Companion(other, found, count, count / n_fires) for other, found, count in rows if other >= 0]

    @property
    def directions(self) -> np.ndarray | None:
        """Decoder rows at norm 1 (F, d_out) float16; None where the lens kept none, as version 1 did."""
        return self.column("directions") if self.lens_version >= 2 else None

    def logits_histogram(self, i: int) -> Histogram | None:
        """What the direction of feature i adds to the logits of all tokens; None where that was not kept."""
        if not self._has_logits or self.lens_version < 2:
            return None
        low, high = float(self.column("logits_neg_values")[i, 0]), float(self.column("logits_pos_values")[i, 0])
        return Histogram(np.array(self.column("logits_histogram")[i]), np.linspace(low, high, HISTOGRAM_BINS + 1))

    def nearest(self, direction: np.ndarray, n: int = 50) -> list[Neighbour]:
        """The features whose directions have the largest cosine with this one of norm 1 (d_out,), nearest first.

        Good to 1e-4, since directions are kept in halves. Reads all of them once. Raises ViewError where there are none.
        """
        rows = self.directions
        if rows is None:
            raise ViewError(f"The feature view {self.path.name} has no directions; harvest it again.")
        if rows.shape[1] != len(direction):
            raise ViewError(f"Its directions have {rows.shape[1]} numbers, not {len(direction)}.")
        step = max(1, CHUNK_NUMBERS // rows.shape[1])
        parts = [rows[i : i + step].astype(np.float32) @ direction for i in range(0, len(rows), step)]
        cosines = np.concatenate(parts)
        return [Neighbour(int(i), float(cosines[i])) for i in np.argsort(-cosines, kind="stable")[:n]]

    @property
    def _has_logits(self) -> bool:
        return bool(self.logit_lens and self.logit_lens["logits"])

    # ---------------------------------------------------------------------------------------------- all features

    def sorted(
        self,
        key: str = "density",
        descending: bool = True,
        filters: Mapping[str, Any] | None = None,
        *,
        by: np.ndarray | None = None,
    ) -> np.ndarray:
        """Feature numbers in the order of a key of SORT_KEYS or of `token`; equal ones by number, undefined ones last.

        token: the top token by its letters. filters: `alive` (bool); `(low, high)` for any key of SORT_KEYS, either side
        None for open; `token`, `raises`, `lowers` (str): a top token, or a token among the logits raised or lowered,
        contains the text (case ignored); `chosen` (F,) bool: features that something else than the view tells apart.
        by: (F,) float values to sort by in place of the key's, such as the order of labels. Raises ViewError for an
        unknown key or filter.
        """
        if by is None and key not in (*SORT_KEYS, "token"):
            raise ViewError(f'Features cannot be sorted by "{key}"; choose one of {", ".join(SORT_KEYS)}.')
        values = by if by is not None else self._token_order if key == "token" else self.summary[key]
        found = np.flatnonzero(self._matching(filters or {}))
        values = values[found]
        return found[np.argsort(-values if descending else values, kind="stable")]

    @cached_property
    def _token_order(self) -> np.ndarray:
        """Place of every feature's top token among all tokens by their letters (F,), NaN for a dead one."""
        words = self._folded_vocabulary
        places = np.empty(len(words) + 1)
        places[sorted(range(len(words)), key=lambda i: (words[i].strip(), words[i]))] = np.arange(len(words))
        places[-1] = np.nan
        return places[np.minimum(self.summary["top_token_ids"][:, 0], len(words))]

    def _matching(self, filters: Mapping[str, Any]) -> np.ndarray:
        matching = np.ones(self.n_features, dtype=bool)
        for name, wanted in filters.items():
            matching &= self._filter(name, wanted)
        return matching

    def _filter(self, name: str, wanted: Any) -> np.ndarray:
        if name == "alive":
            return (self.summary["n_fires"] > 0) == wanted
        if name == "chosen":
            return np.asarray(wanted, dtype=bool)
        if name == "token":
            return self._holds(self.summary["top_token_ids"], wanted)
        if name in ("raises", "lowers"):
            if not self._has_logits:
                raise ViewError(f"The feature view {self.path.name} has no logits; run the logit lens first.")
            return self._holds(self.column("logits_pos_ids" if name == "raises" else "logits_neg_ids"), wanted)
        if name not in SORT_KEYS:
            raise ViewError(f'Features cannot be filtered by "{name}".')
        low, high = wanted
        values = self.summary[name]
        return (values >= (-np.inf if low is None else low)) & (values <= (np.inf if high is None else high))

    def _holds(self, ids: np.ndarray, text: str) -> np.ndarray:
        """Features (F,) with one of their token ids (F, n) holding the text."""
        wanted = text.casefold()
        chosen = np.array([wanted in token for token in self._folded_vocabulary] + [False])  # -1: no token
        return chosen[np.minimum(ids, len(chosen) - 1)].any(1)

    def token_ids(self, text: str) -> np.ndarray:
        """Ids of the tokens that are this text, but for case and spaces around; without one, of those that hold it."""
        wanted = text.strip().casefold()
        if not wanted:
            return np.empty(0, np.int64)
        found = [i for i, token in enumerate(self._folded_vocabulary) if wanted in token]
        same = [i for i in found if self._folded_vocabulary[i].strip() == wanted]
        return np.array(same or found, dtype=np.int64)

    def writing(self, ids: np.ndarray, *, lowered: bool = False, n: int = 50) -> list[tuple[int, Logit]]:
        """The features that raise (or lower) one of these tokens most, with that token, strongest first.

        Only the tokens that the logit lens kept of a feature are known. Raises ViewError without a logit lens.
        """
        if not self._has_logits:
            raise ViewError(f"The feature view {self.path.name} has no logits; run the logit lens first.")
        side = "neg" if lowered else "pos"
        kept, values = self.column(f"logits_{side}_ids"), self.column(f"logits_{side}_values")
        rows, places = np.nonzero(np.isin(kept, ids))  # a feature's tokens lie strongest first
        rows, first = np.unique(rows, return_index=True)
        places = places[first]
        strength = np.abs(values[rows, places])
        best = np.argsort(-strength, kind="stable")[:n]
        return [
            (int(i), Logit(int(kept[i, j]), self.token_text(int(kept[i, j])), float(values[i, j])))
            for i, j in zip(rows[best], places[best], strict=True)
        ]

    def density_histogram(self) -> DensityHistogram:
        """Alive features in bins of log10 density, a quarter of a decade wide, from one fire in n_tokens up to 1."""
        decades = max(1, int(np.ceil(np.log10(self.n_tokens))))
        edges = np.linspace(-decades, 0, decades * BINS_PER_DECADE + 1)
        density = self.summary["density"]
        alive = density > 0
        counts, _ = np.histogram(np.clip(np.log10(density[alive]), edges[0], 0), bins=edges)
        return DensityHistogram(counts, edges, int((~alive).sum()), self.n_tokens)

    # ---------------------------------------------------------------------------------------------- tokens

    def token_texts(self, ids: np.ndarray) -> list[str]:
        """Texts of token ids; see concepts.numerics.token_text for how bytes are shown."""
        start, data = self.column("vocabulary_start"), self.column("vocabulary_bytes").data
        known = (ids >= 0) & (ids < len(start) - 1)
        safe = np.where(known, ids, 0)
        spans = zip(start[safe].tolist(), start[safe + known].tolist(), known.tolist(), ids.tolist(), strict=True)
        return [str(data[a:b], "utf-8") if known else f"<token {i}>" for a, b, known, i in spans]

    def token_text(self, i: int) -> str:
        return self.token_texts(np.array([i]))[0]

    @cached_property
    def _folded_vocabulary(self) -> list[str]:
        starts = self.column("vocabulary_start").tolist()
        whole = bytes(self.column("vocabulary_bytes"))
        return [whole[a:b].decode().casefold() for a, b in pairwise(starts)]
