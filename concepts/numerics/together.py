"""Which features fire on the same tokens: counted over evenly spaced rows of what a harvest encodes.

Of features i and j that fire on n_i and n_j of n rows, and on n_ij of them both,

  correlation  phi_ij = (n n_ij - n_i n_j) / sqrt(n_i (n - n_i) n_j (n - n_j)),

Pearson's of the two indicators "fires". Pairs that met on fewer than LEAST rows are left out: two features that fired once,
on the same token, have phi 1. What it costs is the pairs of codes within a row, of which at most MOST_PAIRS are looked at:
where more would be (many fire at once), fewer rows are taken.
"""

from pathlib import Path
from typing import Any

import numpy as np

from training.numerics.threads import share

SAMPLE = "sample"  # rows one after the other, each as the number of its codes and their features, int32
MOST_ROWS = 2**16
MOST_PAIRS = 2**27
LEAST = 3
KEPT = 10
RUNS, MIN_FEATURES = 16, 64  # shares of the features, and the least of one


def sampled(first: int, n: int, n_rows: int, row: np.ndarray, feature: np.ndarray) -> np.ndarray:
    """What goes into the sample of rows first to first + n of n_rows, int32; their codes are (row, feature), by row."""
    step = -(-n_rows // MOST_ROWS)
    counts = np.bincount(row, minlength=n)
    chosen = (first + np.arange(n)) % step == 0
    spent = np.cumsum(np.where(chosen, counts.astype(np.float64) ** 2, 0))
    chosen &= spent <= MOST_PAIRS * n / n_rows
    kept, counts = feature[chosen[row]], counts[chosen]
    return np.insert(kept.astype(np.int32), np.cumsum(counts) - counts, counts)


def write_companions(folder: Path, n_features: int, loops: Any) -> dict[str, int]:
    """Read the sample, write the columns `together_*`, and return on how many rows they rest.

    loops: column_kernels, or None to do without numba.
    """
    starts, feature = _rows(np.fromfile(folder / SAMPLE, np.int32))
    n = len(starts) - 1
    narrow = feature.astype(np.uint16) if n_features <= 2**16 else feature  # 16 bits are sorted by radix, 8 x faster
    order = np.argsort(narrow, kind="stable")
    row = np.repeat(np.arange(n, dtype=np.int32), np.diff(starts))[order]
    bounds = np.concatenate([[0], np.cumsum(np.bincount(feature, minlength=n_features))]).astype(np.int64)
    ids = np.full((n_features, KEPT), -1, np.int32)
    correlation, counts = np.zeros((n_features, KEPT), np.float32), np.zeros((n_features, KEPT), np.int32)
    made = starts, feature, bounds, row, LEAST, ids, correlation, counts
    way = _plainly if loops is None else loops.together
    share(lambda first, last: way(first, last, *made), n_features, max(MIN_FEATURES, -(-n_features // RUNS)))
    for name, column in (("ids", ids), ("correlations", correlation), ("counts", counts)):
        np.save(folder / f"together_{name}.npy", column)
    np.save(folder / "together_fires.npy", np.diff(bounds).astype(np.int32))
    return {"n_tokens": n, "least": LEAST}


def _rows(sample: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each row's codes begin (n + 1,) int64, and the features of all codes."""
    heads, at = [], 0
    while at < len(sample):
        heads.append(at)
        at += int(sample[at]) + 1
    head = np.array(heads, np.int64)
    starts = np.concatenate([head - np.arange(len(head)), [len(sample) - len(head)]])
    return starts, np.ascontiguousarray(np.delete(sample, head))


def _plainly(
    first: int,
    last: int,
    starts: np.ndarray,
    feature: np.ndarray,
    bounds: np.ndarray,
    row: np.ndarray,
    least: int,
    ids: np.ndarray,
    correlation: np.ndarray,
    counts: np.ndarray,
) -> None:
    """Companions of features first to last; the compiled loop gives the same."""
    n, n_fires = float(len(starts) - 1), np.diff(bounds).astype(np.float64)
    for i in range(first, last):
        rows = row[bounds[i] : bounds[i + 1]]
        near = [feature[starts[r] : starts[r + 1]] for r in rows.tolist()]
        other, met = (
            np.unique(np.concatenate(near), return_counts=True) if near else (feature[:0], np.zeros(0, np.int64))
        )
        kept = (met >= least) & (other != i)
        other, met = other[kept], met[kept]
        mine, theirs = n_fires[i], n_fires[other]
        with np.errstate(invalid="ignore", divide="ignore"):
            found = (n * met - mine * theirs) / np.sqrt(mine * (n - mine) * theirs * (n - theirs))
        found = np.where(np.isfinite(found), found, 0.0).astype(np.float32)
        best = np.lexsort((other, -found))[:KEPT]
        best = best[found[best] > 0]
        ids[i, : len(best)], correlation[i, : len(best)], counts[i, : len(best)] = other[best], found[best], met[best]
