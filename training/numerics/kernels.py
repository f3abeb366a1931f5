# mypy: allow-untyped-defs, disable-error-code=assignment
"""The inner loops of the sparse training step, compiled by numba: choose, decode, gather, update.

A code is a *pair* (row b, feature i) with a value f > 0. Row b's pairs lie in slots starts[b] ... starts[b] + counts[b]
of `cols` (the features) and `values`; sorted by feature they lie in slots bounds[i] ... bounds[i + 1].

Every kernel is serial and gives up the interpreter's lock, so that threads of one process run it side by side on their
own rows or features (see sparse.py). What a row or a feature becomes does not depend on how they are shared out: the
result is the same to the bit for any number of threads. Sums run in a fixed order, which `reassoc` lets the compiler
choose once, when it compiles.

Each kernel has one signature, compiled when this module is imported (about ten seconds) and kept on disk under the data
folder, by processor. Several processes may compile at once: numba replaces its files as a whole, and with one signature
a file they all write holds the same function.
"""

import os
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


def kernel(signature: str) -> Any:
    """Compile a function for one signature."""
    return njit(signature, **_FAST)


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


@kernel(
    "void(uint16[:,::1], float32[:,::1], boolean, float32[::1], int64, boolean, int64[::1], int32[::1], float32[::1])"
)
def choose_topk(z16, z32, exact, bias, k, positive, counts, cols, values):
    """The k largest z + bias of each row, with `positive` those above 0: pairs in slots b * k ... b * k + counts[b].

    z (n, m) is z32 when `exact`, else z16 (bfloat16). Columns are dealt into groups; the k-th largest of the groups'
    maxima is a lower bound of the k-th largest value, so that few columns are looked at twice.
    """
    n, m = z32.shape if exact else z16.shape
    groups = max(m // 16, k)
    row = np.empty(m, np.float32)
    best = np.empty(groups, np.float32)
    keys = np.empty(max(groups, m), np.int32)
    found = np.empty(m, np.int32)
    for b in range(n):
        _read_row(z16, z32, exact, bias, b, row)
        _maxima(row, best)
        for g in range(groups):
            keys[g] = _key(best[g])
        bound = _kth(keys, groups, k, 16)
        candidates = 0
        for g in range(groups):
            if _key(best[g]) >= bound:
                for j in range(g, m, groups):
                    if _key(row[j]) >= bound:
                        found[candidates] = j
                        candidates += 1
        for c in range(candidates):
            keys[c] = _key(row[found[c]])
        bound = _kth(keys, candidates, k, 0)
        above = 0
        for c in range(candidates):
            above += keys[c] > bound
        ties = k - above
        slot = b * k
        for c in range(candidates):
            chosen = keys[c] > bound
            if keys[c] == bound and ties > 0:
                ties -= 1
                chosen = True
            if chosen and not (
                positive and row[found[c]] <= 0
            ):  # a value that is not a number stays, so that the loss shows it
                cols[slot] = found[c]
                values[slot] = row[found[c]]
                slot += 1
        counts[b] = slot - b * k


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


@kernel("float32(int64[::1], int64[::1], int32[::1], float32[::1], int64)")
def keep_largest(starts, counts, cols, values, k):
    """Keep the k largest of all pairs, closing the gaps; of equal ones the first. Returns the smallest kept."""
    keys = np.empty(len(values), np.int32)
    for p in range(len(values)):
        keys[p] = _key(values[p])
    bound = _kth(keys, len(values), k, 0)
    above = 0
    for p in range(len(values)):
        above += keys[p] > bound
    ties = k - above
    slot = 0
    least = np.float32(np.inf)
    for b in range(len(starts)):
        first, last = starts[b], starts[b] + counts[b]
        starts[b] = slot
        for p in range(first, last):
            chosen = keys[p] > bound
            if keys[p] == bound and ties > 0:
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


@njit(inline="always")
def _part(widths, i):
    """Which residual feature i learns from."""
    q = 0
    while i >= widths[q]:
        q += 1
    return q


@njit(inline="always")
def _sum_pairs(first, last, rows, values, dz, x16, r16, x32, r32, exact, q, to_enc, to_dec):
    """to_enc = sum of dz x_b, to_dec = sum of f residual_qb over the pairs of one feature; returns sum of dz."""
    d = len(to_enc)
    for c in range(d):
        to_enc[c] = 0
        to_dec[c] = 0
    total = np.float32(0)
    p = first
    while p + 2 <= last:
        f0, f1, d0, d1 = values[p], values[p + 1], dz[p], dz[p + 1]
        b0, b1 = rows[p], rows[p + 1]
        total += d0 + d1
        if exact:
            for c in range(d):
                to_enc[c] += d0 * x32[b0, c] + d1 * x32[b1, c]
                to_dec[c] += f0 * r32[q, b0, c] + f1 * r32[q, b1, c]
        else:
            for c in range(d):
                to_enc[c] += d0 * _wide(x16[b0, c]) + d1 * _wide(x16[b1, c])
                to_dec[c] += f0 * _wide(r16[q, b0, c]) + f1 * _wide(r16[q, b1, c])
        p += 2
    if p < last:
        f0, d0, b0 = values[p], dz[p], rows[p]
        total += d0
        if exact:
            for c in range(d):
                to_enc[c] += d0 * x32[b0, c]
                to_dec[c] += f0 * r32[q, b0, c]
        else:
            for c in range(d):
                to_enc[c] += d0 * _wide(x16[b0, c])
                to_dec[c] += f0 * _wide(r16[q, b0, c])
    return total


@kernel(
    "void(int64, int64, int64[::1], int32[::1], float32[::1], float32[::1], uint16[:,::1], uint16[:,:,::1],"
    " float32[:,::1], float32[:,:,::1], boolean, float32, int64[::1], float32[:,::1], float32[::1], float32[:,::1])"
)
def sum_features(
    first, last, bounds, rows, values, dz, x16, r16, x32, r32, exact, scale, widths, to_W_enc, to_b_enc, to_W_dec
):
    """The gradients of features first ... last, over the pairs of each:

        dW_enc[i] = sum of dz x_b;   db_enc[i] = sum of dz;   dW_dec[i] = scale * sum of f residual_qb

    q is the part of `widths` that i is in. x and residual are read as float32 when `exact`, else as bfloat16.
    """
    for i in range(first, last):
        q = _part(widths, i)
        to_b_enc[i] = _sum_pairs(
            bounds[i], bounds[i + 1], rows, values, dz, x16, r16, x32, r32, exact, q, to_W_enc[i], to_W_dec[i]
        )
        for c in range(to_W_dec.shape[1]):
            to_W_dec[i, c] *= scale


@njit(inline="always")
def _adam(w, g, m, v, lr, beta1, beta2, root, eps):
    """torch's Adam on one row: m += (1 - beta1) (g - m), v = beta2 v + (1 - beta2) g^2, w -= lr m / (root sqrt(v) + eps).

    lr includes 1 / (1 - beta1^t); root = 1 / sqrt(1 - beta2^t).
    """
    for c in range(len(w)):
        m[c] += (np.float32(1) - beta1) * (g[c] - m[c])
        v[c] = beta2 * v[c] + (np.float32(1) - beta2) * g[c] * g[c]
        w[c] -= lr * m[c] / (np.sqrt(v[c]) * root + eps)


@kernel(
    "void(int64, int64, int64[::1], int32[::1], float32[::1], float32[::1], uint16[:,::1], uint16[:,:,::1],"
    " float32[:,::1], float32[:,:,::1], boolean, float32, int64[::1], int32[::1], float32[:,::1], float32[::1], float32[:,::1],"
    " float32[:,::1], float32[:,::1], float32[:,::1], float32[::1], float32[::1], float32[::1],"
    " float32[:,::1], float32[:,::1], float32[:,::1], boolean, float32, float32, float32, float32, float32, float32, float32[::1])"
)
def update_features(
    first,
    last,
    bounds,
    rows,
    values,
    dz,
    x16,
    r16,
    x32,
    r32,
    exact,
    scale,
    widths,
    place,
    add_W_enc,
    add_b_enc,
    add_W_dec,
    W_enc,
    m_enc,
    v_enc,
    b_enc,
    m_bias,
    v_bias,
    W_dec,
    m_dec,
    v_dec,
    unit,
    lr,
    lr_bias,
    beta1,
    beta2,
    root,
    eps,
    through,
):
    """`sum_features` and the whole update of each feature in one go: the gradients of one feature never leave the
    processor's first cache.

    Gradients of dead features are added where place[i] >= 0 (a row of add_*). Then, as optim.Optimizer.step: Adam on all
    three; with `unit`, before it the part of dW_dec[i] along W_dec[i] is removed, and after it W_dec[i] brought to norm 1.
    `through` becomes the sum of db_enc[i] W_enc[i], without the dead features' part: what reaches b_dec through the
    encoder's input.
    """
    d = W_enc.shape[1]
    to_enc, to_dec = np.empty(d, np.float32), np.empty(d, np.float32)
    to_bias = np.empty(1, np.float32)
    through[:] = 0
    for i in range(first, last):
        q = _part(widths, i)
        bias = _sum_pairs(bounds[i], bounds[i + 1], rows, values, dz, x16, r16, x32, r32, exact, q, to_enc, to_dec)
        for c in range(d):
            to_dec[c] *= scale
            through[c] += bias * W_enc[i, c]
        if place[i] >= 0:
            bias += add_b_enc[place[i]]
            for c in range(d):
                to_enc[c] += add_W_enc[place[i], c]
                to_dec[c] += add_W_dec[place[i], c]
        to_bias[0] = bias
        if unit:
            along = np.float32(0)
            for c in range(d):
                along += to_dec[c] * W_dec[i, c]
            for c in range(d):
                to_dec[c] -= along * W_dec[i, c]
        _adam(W_enc[i], to_enc, m_enc[i], v_enc[i], lr, beta1, beta2, root, eps)
        _adam(W_dec[i], to_dec, m_dec[i], v_dec[i], lr, beta1, beta2, root, eps)
        _adam(b_enc[i : i + 1], to_bias, m_bias[i : i + 1], v_bias[i : i + 1], lr_bias, beta1, beta2, root, eps)
        if unit:
            size = np.float32(0)
            for c in range(d):
                size += W_dec[i, c] * W_dec[i, c]
            size = np.float32(1) / np.sqrt(size)
            for c in range(d):
                W_dec[i, c] *= size
