# mypy: allow-untyped-defs, disable-error-code=assignment
"""The inner loops of the sparse training step, compiled by numba: choose, decode, sort (topk_kernels.py
and update_kernels.py have the rest).

A code is a *pair* (row b, feature i) with a value f > 0. Row b's pairs lie in slots starts[b] ... starts[b] + counts[b]
of `cols` (the features) and `values`; sorted by feature they lie in slots bounds[i] ... bounds[i + 1].

Every kernel is serial and gives up the interpreter's lock, so that threads of one process run it side by side on their
own rows or features (see threads.py). What a row or a feature becomes does not depend on how they are shared out: the
result is the same to the bit for any number of threads. Sums run in a fixed order, which `reassoc` lets the compiler
choose once, when it compiles.

Each kernel has one signature, compiled when this module is imported (about ten seconds) and kept on disk under the data
folder, by processor. Of several processes that import it at once, one compiles a kernel and the others wait for it; where
they cannot, each compiles it: numba replaces its files as a whole, and with one signature all write the same function.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
import numpy as np
from numba import njit


def _cache_folder() -> Path | None:
    """Where compiled kernels are kept: under the data folder, apart for each processor and version of numba."""
    data = Path(os.environ.get("SAEHUB_DATA") or Path(__file__).parents[2] / "data")
    folder = data / "kernels" / f"{llvmlite.binding.get_host_cpu_name()}-numba{numba.__version__}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None  # compiled anew in every process then
    return folder if os.access(folder, os.W_OK) else None


_FOLDER = _cache_folder()
if _FOLDER is not None and not numba.config.CACHE_DIR:  # type: ignore[attr-defined]
    numba.config.CACHE_DIR = str(_FOLDER)  # type: ignore[attr-defined]
_FAST: Any = {
    "nogil": True,
    "cache": _FOLDER is not None,
    "fastmath": {"reassoc", "contract", "nsz"},
    "error_model": "numpy",
}


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Among the processes that keep their kernels in this folder; one that dies holds nobody up."""
    with ExitStack() as stack:
        if _FOLDER is not None:
            with suppress(OSError):  # a file system without locks
                folder = Path(numba.config.CACHE_DIR)  # type: ignore[attr-defined]
                folder.mkdir(parents=True, exist_ok=True)
                fcntl.flock(stack.enter_context((folder / "compiling.lock").open("w")), fcntl.LOCK_EX)
        yield


def kernel(signature: str, **options: Any) -> Any:
    """Compile a function for one signature, or take it as another process compiled it."""

    def compiled(function: Any) -> Any:
        with _one_at_a_time():
            return njit(signature, **_FAST | options)(function)

    return compiled


@njit(inline="always")
def _key(x):
    """float32 -> int32 in the same order."""
    bits = np.float32(x).view(np.int32)
    return np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@njit(inline="always")
def _wide(bits):
    """bfloat16, as uint16 -> float32."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@njit(inline="always")
def _narrow(x):
    """float32 -> bfloat16 as uint16, to the nearest, ties to even."""
    bits = np.float32(x).view(np.uint32)
    return np.uint16(np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@njit(inline="always")
def _kth(keys, n, k, lowest_bit):
    """The largest t, a multiple of 2^lowest_bit, with at least k of keys[:n] >= t: the k-th largest, rounded down."""
    t = np.int64(-(2**31))
    for bit in range(31, lowest_bit - 1, -1):
        higher = t + (np.int64(1) << bit)
        bound = np.int32(higher)
        count = np.int32(0)
        for j in range(n):
            count += np.int32(keys[j] >= bound)
        if count >= k:
            t = higher
    return np.int32(t)


@njit(inline="always")
def _read_row(z16, z32, exact, bias, b, row):
    """row = z_b + bias, from float32 when `exact`, else from bfloat16."""
    if exact:
        for j in range(len(row)):
            row[j] = z32[b, j] + bias[j]
    else:
        for j in range(len(row)):
            row[j] = _wide(z16[b, j]) + bias[j]


@njit(inline="always")
def _maxima(row, best):
    """best[g] = the largest of row[g], row[g + groups], row[g + 2 groups], ..."""
    groups = len(best)
    for g in range(groups):
        best[g] = row[g]
    for base in range(groups, len(row), groups):
        for g in range(min(groups, len(row) - base)):
            best[g] = max(best[g], row[base + g])


@kernel("void(uint16[:,::1], float32[:,::1], boolean, float32[::1], float32[:,::1], int64[::1])")
def group_maxima(z16, z32, exact, bias, best, histogram):
    """best (n, groups): the largest z + bias of every groups-th column of each row; and how many of them, where above
    0, begin with each 16 bits (32768 bins, in the order of the values). The bins of BatchTopK's first look."""
    n, m = z32.shape if exact else z16.shape
    groups = best.shape[1]
    row = np.empty(m, np.float32)
    histogram[:] = 0
    for b in range(n):
        _read_row(z16, z32, exact, bias, b, row)
        _maxima(row, best[b])
        for g in range(groups):
            if not best[b, g] <= 0:
                histogram[(np.float32(best[b, g]).view(np.int32) >> np.int32(16)) & np.int32(0x7FFF)] += 1


@kernel(
    "void(uint16[:,::1], float32[:,::1], boolean, float32[::1], float32[:,::1], float32, boolean, int64[::1],"
    " int64[::1], int32[::1], float32[::1])"
)
def collect(z16, z32, exact, bias, best, bound, fill, starts, counts, cols, values):
    """The pairs with z + bias >= bound and > 0, looked for in the groups whose maximum is: counted, or when `fill` is
    set written to their slots."""
    n, m = z32.shape if exact else z16.shape
    groups = best.shape[1]
    for b in range(n):
        slot = starts[b]
        for g in range(groups):
            if not best[b, g] < bound:
                for j in range(g, m, groups):
                    value = (z32[b, j] if exact else _wide(z16[b, j])) + bias[j]
                    if not value < bound and not value <= 0:
                        if fill:
                            cols[slot] = j
                            values[slot] = value
                        slot += 1
        counts[b] = slot - starts[b]


@kernel(
    "int64(uint16[:,::1], float32[:,::1], boolean, float32[::1], float32, int64, int64[::1], int32[::1], float32[::1])"
)
def collect_above(z16, z32, exact, bias, bound, groups, counts, cols, values):
    """`collect` with z + bias still in the cache, into slots from 0 on; returns how many, or -1 where they are too many."""
    n, m = z32.shape if exact else z16.shape
    row, best = np.empty(m, np.float32), np.empty(groups, np.float32)
    slot = 0
    for b in range(n):
        _read_row(z16, z32, exact, bias, b, row)
        _maxima(row, best)
        first = slot
        if slot + m > len(cols):
            return -1
        for g in range(groups):
            if not best[g] < bound:
                for j in range(g, m, groups):
                    value = row[j]
                    if not value < bound and not value <= 0:
                        cols[slot] = j
                        values[slot] = value
                        slot += 1
        counts[b] = slot - first
    return slot


@kernel("float32(int64[::1], int64[::1], int32[::1], float32[::1], int64)")
def keep_largest(starts, counts, cols, values, k):
    """Keep the k largest of all pairs, closing the gaps; of equal ones the first. Returns the smallest kept."""
    keys = np.empty(len(values), np.int32)
    total = 0
    for b in range(len(starts)):
        for p in range(starts[b], starts[b] + counts[b]):
            keys[total] = _key(values[p])
            total += 1
    bound = _kth(keys, total, k, 0)
    above = 0
    for p in range(total):
        above += keys[p] > bound
    ties = k - above
    slot = 0
    least = np.float32(np.inf)
    for b in range(len(starts)):
        first, last = starts[b], starts[b] + counts[b]
        starts[b] = slot
        for p in range(first, last):
            key = _key(values[p])
            chosen = key > bound
            if key == bound and ties > 0:
                ties -= 1
                chosen = True
            if chosen:
                cols[slot] = cols[p]
                values[slot] = values[p]
                least = min(least, values[p])
                slot += 1
        counts[b] = slot - starts[b]
    return least


@kernel("void(int64[::1], int64[::1], int32[::1], float32[::1])")
def sort_rows(starts, counts, cols, values):
    """Bring each row's pairs into the order of their features."""
    for b in range(len(starts)):
        for p in range(starts[b] + 1, starts[b] + counts[b]):
            i, f = cols[p], values[p]
            q = p - 1
            while q >= starts[b] and cols[q] > i:
                cols[q + 1], values[q + 1] = cols[q], values[q]
                q -= 1
            cols[q + 1], values[q + 1] = i, f


@kernel("void(int64[::1], int64[::1], int32[::1], float32[::1], float32[::1])")
def unweigh(starts, counts, cols, values, norms):
    """values / norms[cols]: codes that were chosen by what they add to x_hat, in their own units again."""
    for b in range(len(starts)):
        for p in range(starts[b], starts[b] + counts[b]):
            values[p] /= norms[cols[p]]


@njit(inline="always")
def _add_rows(first, last, cols, values, W_dec, r):
    """r += sum of f W_dec[i] over the pairs first ... last."""
    p = first
    while p + 4 <= last:
        f0, f1, f2, f3 = values[p], values[p + 1], values[p + 2], values[p + 3]
        w0, w1, w2, w3 = W_dec[cols[p]], W_dec[cols[p + 1]], W_dec[cols[p + 2]], W_dec[cols[p + 3]]
        for c in range(len(r)):
            r[c] += f0 * w0[c] + f1 * w1[c] + f2 * w2[c] + f3 * w3[c]
        p += 4
    for q in range(p, last):
        f0, w0 = values[q], W_dec[cols[q]]
        for c in range(len(r)):
            r[c] += f0 * w0[c]


@njit(inline="always")
def _project(first, last, cols, scale, W_dec, r, dz):
    """dz = scale * r . W_dec[i] of the pairs first ... last."""
    p = first
    while p + 4 <= last:
        w0, w1, w2, w3 = W_dec[cols[p]], W_dec[cols[p + 1]], W_dec[cols[p + 2]], W_dec[cols[p + 3]]
        s0 = s1 = s2 = s3 = np.float32(0)
        for c in range(len(r)):
            s0 += r[c] * w0[c]
            s1 += r[c] * w1[c]
            s2 += r[c] * w2[c]
            s3 += r[c] * w3[c]
        dz[p], dz[p + 1], dz[p + 2], dz[p + 3] = s0 * scale, s1 * scale, s2 * scale, s3 * scale
        p += 4
    for q in range(p, last):
        w0 = W_dec[cols[q]]
        s0 = np.float32(0)
        for c in range(len(r)):
            s0 += r[c] * w0[c]
        dz[q] = s0 * scale


@kernel(
    "void(float32[:,::1], float32[:,::1], float32[::1], int64[::1], int64[::1], int64[::1], int32[::1], float32[::1],"
    " float32, int64, float32[:,:,::1], float32[::1], float64[::1])"
)
def decode(x, W_dec, b_dec, widths, starts, counts, cols, values, scale, row, residual, dz, errors):
    """Reconstructions of rows x (n, d) by the first widths[q] features each; residual_q = sum of f W_dec[i] + b_dec - x.

    errors[q] = sum of residual_q^2. Afterwards residual (q, all rows, d), of which these begin at `row`, holds
    residual_q + residual_(q + 1) + ...: what all reconstructions with a feature of the q-th part say about it, and
    dz = scale * that . W_dec[i]. With more than one width a row's pairs must be in the order of their features.
    """
    n, d = x.shape
    parts = len(widths)
    errors[:] = 0
    for b in range(n):
        first, last = starts[b], starts[b] + counts[b]
        p = first
        for q in range(parts):
            r = residual[q, row + b]
            if q == 0:
                for c in range(d):
                    r[c] = b_dec[c] - x[b, c]
            else:
                r[:] = residual[q - 1, row + b]
            end = last
            if q < parts - 1:
                end = p
                while end < last and cols[end] < widths[q]:
                    end += 1
            _add_rows(p, end, cols, values, W_dec, r)
            p = end
            size = np.float32(0)
            for c in range(d):
                size += r[c] * r[c]
            errors[q] += size
        p = last
        for q in range(parts - 1, -1, -1):
            r = residual[q, row + b]
            if q < parts - 1:
                for c in range(d):
                    r[c] += residual[q + 1, row + b, c]
            end = p
            while q > 0 and p > first and cols[p - 1] >= widths[q - 1]:
                p -= 1
            if q == 0:
                p = first
            _project(p, end, cols, scale, W_dec, r, dz)


@kernel(
    "void(int64[::1], int64[::1], int32[::1], float32[::1], float32[::1], int64[::1], int32[::1], float32[::1],"
    " float32[::1])"
)
def sort_by_feature(starts, counts, cols, values, dz, bounds, rows, values_out, dz_out):
    """Counting sort of the pairs by feature, rows in order: bounds (d_sae + 1,), rows, values and dz of each slot."""
    bounds[:] = 0
    for b in range(len(starts)):
        for p in range(starts[b], starts[b] + counts[b]):
            bounds[cols[p] + 1] += 1
    for i in range(1, len(bounds)):
        bounds[i] += bounds[i - 1]
    place = bounds[:-1].copy()
    for b in range(len(starts)):
        for p in range(starts[b], starts[b] + counts[b]):
            slot = place[cols[p]]
            place[cols[p]] += 1
            rows[slot] = b
            values_out[slot] = values[p]
            dz_out[slot] = dz[p]
