"""The columns of a view, computed from the codes of one block of features after another (see featurefile)."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from concepts.featurefile import HISTOGRAM_BINS
from concepts.numerics.code_files import Block, compiled
from training.numerics.threads import share

TOP_TOKENS = 10
RUNS, MIN_FEATURES = 16, 64  # shares of a block's features, and the least of one


class Columns:
    """Columns of the view, written one block of features after another."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.stack = stack  # closes the files, whatever happens
        self.files: dict[str, BinaryIO] = {}
        self.shapes: dict[str, tuple[np.dtype, int, tuple[int, ...]]] = {}

    def append(self, name: str, rows: np.ndarray) -> None:
        if name not in self.files:
            self.files[name] = self.stack.enter_context((self.folder / f"{name}.npy").open("wb"))
            self._header(name, rows.dtype, 0, rows.shape[1:])
        dtype, count, tail = self.shapes[name]
        self.files[name].write(np.ascontiguousarray(rows, dtype=dtype).view(np.uint8).data)
        self.shapes[name] = dtype, count + len(rows), tail

    def finish(self) -> None:
        """Write the headers again with the true lengths; numpy pads them so that a longer number still fits."""
        for name, file in self.files.items():
            file.seek(0)
            self._header(name, *self.shapes[name])

    def _header(self, name: str, dtype: np.dtype, count: int, tail: tuple[int, ...]) -> None:
        self.shapes[name] = dtype, count, tail
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count, *tail)}
        np.lib.format.write_array_header_1_0(self.files[name], header)


@dataclass(frozen=True)
class _Fires:
    """The codes of a block ordered by (feature, context, position), features counted from the block's first, and their
    groups: group g is the fires of one feature in one context, codes start[g] to start[g + 1]."""

    n_features: int
    codes: np.ndarray
    start: np.ndarray  # (G + 1,)
    feature: np.ndarray  # (G,)
    context: np.ndarray  # (G,)
    peak: np.ndarray  # (G,) largest activation
    position: np.ndarray  # (G,) where it is, the first of equals


def _group(block: Block) -> _Fires:
    codes = block.codes()
    codes["feature"] -= block.first
    # the codes lie in the order of contexts and positions, and the sort is stable
    codes = codes[np.argsort(codes["feature"].astype(np.min_scalar_type(block.end - block.first)), kind="stable")]
    feature, context, value = codes["feature"], codes["context"], codes["value"]
    new = np.flatnonzero((np.diff(feature) != 0) | (np.diff(context) != 0)) + 1
    start = np.concatenate([[0], new, [len(codes)]]) if len(codes) else np.zeros(1, np.int64)
    first = start[:-1]
    peak = np.maximum.reduceat(value, first) if len(codes) else value
    is_peak = np.flatnonzero(value == np.repeat(peak, np.diff(start)))
    position = codes["position"][is_peak[np.searchsorted(is_peak, first)]]
    return _Fires(block.end - block.first, codes, start, feature[first], context[first], peak, position)


def collect(
    block: Block,
    tokens: np.ndarray,
    columns: Columns,
    k: int,
    intervals: int,
    per_interval: int,
    rng: np.random.Generator,
) -> None:
    """Append the columns of one block of features; tokens: (contexts, positions) int32, writable or a copy on write."""
    way = _collect_plainly if compiled() is None else _collect_quickly
    way(block, tokens, columns, k, intervals, per_interval, rng)


class _Sorted(NamedTuple):
    """The codes of a block by feature, in order within each: those of feature i are bounds[i] ... bounds[i + 1]."""

    bounds: np.ndarray
    context: np.ndarray
    position: np.ndarray
    value: np.ndarray


def _collect_quickly(
    block: Block,
    tokens: np.ndarray,
    columns: Columns,
    k: int,
    intervals: int,
    per_interval: int,
    rng: np.random.Generator,
) -> None:
    codes, token = _sort(block, tokens)
    maximum, contexts = _append_statistics(codes, token, columns)
    _append_examples(codes, maximum, contexts, columns, k, intervals, per_interval, rng)


def _sort(block: Block, tokens: np.ndarray) -> tuple[_Sorted, np.ndarray]:
    """The codes, and the token id of each."""
    codes, n = block.codes(), block.end - block.first
    context, position = np.empty((2, len(codes)), np.int32)
    made = _Sorted(np.empty(n + 1, np.int64), context, position, np.empty(len(codes), np.float32))
    token = np.empty(len(codes), np.int32)
    compiled().by_feature(codes.view(np.int32).reshape(-1, 4), block.first, tokens, *made, token)
    return made, token


def _run_of(n: int) -> int:
    """Features that one task takes of n."""
    return max(MIN_FEATURES, -(-n // RUNS))


def _append_statistics(codes: _Sorted, token: np.ndarray, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
    """Statistics and top tokens; returns the maximum (features,) float32 and in how many contexts each fires."""
    n, vocabulary = len(codes.bounds) - 1, int(token.max(initial=0)) + 1
    maximum, mean = np.empty(n, np.float32), np.empty(n, np.float32)
    contexts, fires, histogram = np.empty(n, np.int64), np.empty(n, np.int64), np.empty((n, HISTOGRAM_BINS), np.int64)
    ids, sums, counts = (np.empty((n, TOP_TOKENS), dtype) for dtype in (np.int32, np.float32, np.int64))

    def task(first: int, last: int) -> None:
        compiled().statistics(first, last, *codes, contexts, maximum, mean, histogram, fires)
        compiled().top_tokens(first, last, codes.bounds, codes.value, token, vocabulary, ids, sums, counts)

    share(task, n, _run_of(n))
    for name, column in (
        ("n_fires", fires), ("n_contexts", contexts), ("maximum", maximum), ("mean", mean), ("histogram", histogram),
        ("top_token_ids", ids), ("top_token_sums", sums), ("top_token_counts", counts),
    ):  # fmt: skip
        columns.append(name, column)
    return maximum, contexts


def _append_examples(
    codes: _Sorted,
    maximum: np.ndarray,
    contexts: np.ndarray,
    columns: Columns,
    k: int,
    intervals: int,
    per_interval: int,
    rng: np.random.Generator,
) -> None:
    n, room, groups = len(maximum), k + intervals * per_interval, np.concatenate([[0], np.cumsum(contexts)])
    total = int(groups[-1])
    draws = rng.random(total).astype(np.float32)
    chosen, tags = np.empty((n, room), np.int64), np.empty((n, room), np.uint8)
    starts, peak_at, peaks = np.empty(total + 1, np.int64), np.empty(total, np.int32), np.empty(total, np.float32)
    starts[total] = len(codes.value)
    given = maximum, groups, draws, k, intervals, per_interval, HISTOGRAM_BINS
    made = chosen, tags, starts, peak_at, peaks
    share(lambda i, j: compiled().examples(i, j, *codes, *given, *made), n, _run_of(n))

    there = chosen >= 0
    kept = chosen[there]
    first, length = starts[kept], starts[kept + 1] - starts[kept]
    positions, values = np.empty(int(length.sum()), np.int32), np.empty(int(length.sum()), np.float32)
    compiled().pick(first, length, codes.position, codes.value, positions, values)
    for name, column in (
        ("example_count", there.sum(1)), ("example_group", tags[there]), ("example_context", codes.context[first]),
        ("example_peak", peak_at[kept]), ("example_value", peaks[kept]), ("activation_count", length),
        ("activation_position", positions), ("activation_value", values),
    ):  # fmt: skip
        columns.append(name, column)


def _collect_plainly(
    block: Block,
    tokens: np.ndarray,
    columns: Columns,
    k: int,
    intervals: int,
    per_interval: int,
    rng: np.random.Generator,
) -> None:
    fires = _group(block)
    maximum = _write_statistics(fires, columns)
    _write_top_tokens(fires, tokens, columns)
    top = _first_per(fires.feature, fires.peak, k)
    interval = _bins(fires.peak, maximum[fires.feature]) // (HISTOGRAM_BINS // intervals)
    sampled = _first_per(fires.feature * intervals + interval, rng.random(len(fires.peak)), per_interval)
    group = np.concatenate([np.zeros(len(top), np.uint8), (interval[sampled] + 1).astype(np.uint8)])
    _write_examples(fires, np.concatenate([top, sampled]), group, columns)


def _first_per(owner: np.ndarray, value: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest values >= 0 of every owner, by owner, then falling value, then index."""
    # the bits of a positive float32 order as it does, so one integer sorts by both (six times faster than lexsort)
    bits = np.ascontiguousarray(value, dtype=np.float32).view(np.int32)
    order = np.argsort((owner.astype(np.int64) << 32) - bits, kind="stable")
    return order[_rank(owner[order]) < count]


def _rank(owner: np.ndarray) -> np.ndarray:
    """Position of every entry among those of its owner; equal owners lie together."""
    start = np.flatnonzero(np.diff(owner, prepend=-1))
    return np.arange(len(owner)) - np.repeat(start, np.diff(start, append=len(owner)))


def _bins(value: np.ndarray, maximum: np.ndarray) -> np.ndarray:
    """Histogram bin of activations, each with its feature's maximum."""
    return np.minimum((value / maximum * HISTOGRAM_BINS).astype(np.int64), HISTOGRAM_BINS - 1)


def _write_statistics(fires: _Fires, columns: Columns) -> np.ndarray:
    """Counts, mean, histogram and maximum of every feature; returns the maximum (features,) float32."""
    n, feature, value = fires.n_features, fires.codes["feature"], fires.codes["value"]
    maximum = np.zeros(n, np.float32)
    np.maximum.at(maximum, fires.feature, fires.peak)
    n_fires = np.bincount(feature, minlength=n)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(feature, weights=value, minlength=n) / n_fires  # NaN for a feature that never fired
    at = feature.astype(np.int64) * HISTOGRAM_BINS + _bins(value, maximum[feature])
    histogram = np.bincount(at, minlength=n * HISTOGRAM_BINS).reshape(n, HISTOGRAM_BINS)
    columns.append("n_fires", n_fires)
    columns.append("n_contexts", np.bincount(fires.feature, minlength=n))
    columns.append("maximum", maximum)
    columns.append("mean", mean.astype(np.float32))
    columns.append("histogram", histogram)
    return maximum


def _write_top_tokens(fires: _Fires, tokens: np.ndarray, columns: Columns) -> None:
    """Sum and count of every (feature, token), of which the TOP_TOKENS largest sums of a feature are kept."""
    codes = fires.codes
    width = 1 << 32  # token ids are int32
    key = codes["feature"].astype(np.int64) * width + tokens[codes["context"], codes["position"]]
    order = np.argsort(key, kind="stable")
    key = key[order]
    start = np.flatnonzero(np.diff(key, prepend=-1))
    sums = np.add.reduceat(codes["value"][order], start, dtype=np.float64) if len(key) else np.empty(0)
    counts = np.diff(start, append=len(key))
    owner, token = np.divmod(key[start], width)
    kept = _first_per(owner, sums, TOP_TOKENS)
    row = owner[kept]
    rank = _rank(row)
    for name, values, empty in (
        ("ids", token.astype(np.int32), -1),
        ("sums", sums.astype(np.float32), 0),
        ("counts", counts, 0),
    ):
        table = np.full((fires.n_features, TOP_TOKENS), empty, dtype=values.dtype)
        table[row, rank] = values[kept]
        columns.append(f"top_token_{name}", table)


def _write_examples(fires: _Fires, kept: np.ndarray, group: np.ndarray, columns: Columns) -> None:
    """Rows for the kept groups of fires, by feature, then example group, then falling peak."""
    order = np.lexsort((-fires.peak[kept], group, fires.feature[kept]))
    kept = kept[order]
    columns.append("example_count", np.bincount(fires.feature[kept], minlength=fires.n_features))
    columns.append("example_group", group[order])
    columns.append("example_context", fires.context[kept])
    columns.append("example_peak", fires.position[kept])
    columns.append("example_value", fires.peak[kept])
    length = np.diff(fires.start)[kept]
    columns.append("activation_count", length)
    ends = np.cumsum(length)
    at = np.arange(int(length.sum())) + np.repeat(fires.start[kept] - (ends - length), length)
    columns.append("activation_position", fires.codes["position"][at])
    columns.append("activation_value", fires.codes["value"][at])
