# mypy: allow-untyped-defs, disable-error-code=assignment
"""Compiled loops of the harvest's encoder, for a CPU. Import through `sparse_encode`, which does without numba too.

Both take the rows x (n, d) of the encoder's input, the encoder as rows (m, d) and bias (m,), and upper bounds of the
pre-activations x . w_j + bias_j: scale_b (1 + 2^-8) (z_bj + slack_j), where z (n, m) is z32 when `exact`, else z16. Only
what its bound does not rule out is computed, in float32 and by one loop, so that no value depends on the other rows.
"""

import numpy as np
from numba import njit

from training.numerics.kernels import _key, _kth, _maxima, _read_row, kernel

_GIVEN = (
    "uint16[:,::1], float32[:,::1], boolean, float32[::1], float32[:,::1], float32[:,::1], float32[::1], float32[::1]"
)
_MADE = "int64[::1], int32[::1], float32[::1]"
_ROUNDED = np.float32(1 + 2.0**-8)
_RUN = 16  # columns looked at together


@njit(inline="always")
def _products(x, rows, bias, cols, first, last, values):
    """values[c] = x . rows[cols[c]] + bias[cols[c]] for c from `first` to `last`; there is room for three more in both.

    Four at a time, because the rows come from a cache that answers late, and always four, so that each is summed alike.
    """
    for c in range(last, last + 3):
        cols[c] = cols[last - 1]
    for c in range(first, last, 4):
        w0, w1, w2, w3 = rows[cols[c]], rows[cols[c + 1]], rows[cols[c + 2]], rows[cols[c + 3]]
        s0, s1, s2, s3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        for j in range(len(x)):
            s0 += x[j] * w0[j]
            s1 += x[j] * w1[j]
            s2 += x[j] * w2[j]
            s3 += x[j] * w3[j]
        values[c], values[c + 1] = s0 + bias[cols[c]], s1 + bias[cols[c + 1]]
        values[c + 2], values[c + 3] = s2 + bias[cols[c + 2]], s3 + bias[cols[c + 3]]


@njit(inline="always")
def _of_key(key):
    """The float32 of a key, see `_key`, which is its own inverse."""
    return np.int32(key ^ ((key >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32)


@kernel(f"int64({_GIVEN}, int64, {_MADE})")
def encode_topk(z16, z32, exact, slack, x, rows, bias, scale, k, counts, cols, values):
    """relu of the k largest of each row, those above 0, one row after another: counts (n,), cols and values (n * k,).

    The k-th largest of the values of the largest bounds is at most the k-th largest of all, so that no column with a
    bound below it belongs to them. Returns how many there are in all.
    """
    n, m = z32.shape if exact else z16.shape
    groups = max(m // 16, k)
    bounds, best = np.empty(m, np.float32), np.empty(groups, np.float32)
    found, value, keys = np.empty(m + 3, np.int32), np.empty(m + 3, np.float32), np.empty(m, np.int32)
    slot = 0
    for b in range(n):
        _read_row(z16, z32, exact, slack, b, bounds)
        _maxima(bounds, best)
        for g in range(groups):
            keys[g] = _key(best[g])
        low, high = _of_key(_kth(keys, groups, k, 16)), np.float32(np.inf)  # at least k bounds are as large as low
        held, least = 0, 0
        for look in range(2):
            before = held
            for g in range(groups):
                if not best[g] < low:
                    for j in range(g, m, groups):
                        if not bounds[j] < low and (look == 0 or bounds[j] < high):
                            found[held] = j
                            held += 1
            if held > before:
                _products(x[b], rows, bias, found, before, held, value)
                for c in range(before, held):
                    keys[c] = _key(value[c])
                least = _kth(keys, held, k, 0)
            high, low = low, _of_key(max(least, 0)) / (scale[b] * _ROUNDED)
        ties = k
        for c in range(held):
            ties -= keys[c] > least
        start = slot
        for c in range(held):
            chosen = keys[c] > least
            if keys[c] == least and ties > 0:
                ties -= 1
                chosen = True
            if chosen and not value[c] <= 0:  # a value that is not a number stays, so that the harvest says so
                cols[slot], values[slot] = found[c], value[c]
                slot += 1
        counts[b] = slot - start
    return slot


@kernel(f"int64({_GIVEN}, float32[::1], {_MADE})")
def encode_above(z16, z32, exact, slack, x, rows, bias, scale, threshold, counts, cols, values):
    """The values above their column's threshold (m,), none below 0, one row after another, as many as there are.

    cols and values have room for them all. Returns how many there are.
    """
    n, m = z32.shape if exact else z16.shape
    bounds, found, value = np.empty(m, np.float32), np.empty(m + 3, np.int32), np.empty(m + 3, np.float32)
    slot = 0
    for b in range(n):
        _read_row(z16, z32, exact, slack, b, bounds)
        factor, held, start = scale[b] * _ROUNDED, 0, slot
        for first in range(0, m, _RUN):
            last = min(first + _RUN, m)
            possible = 0
            for j in range(first, last):
                possible += not bounds[j] * factor < threshold[j]
            if possible == 0:
                continue
            for j in range(first, last):
                if not bounds[j] * factor < threshold[j]:
                    found[held] = j
                    held += 1
        if held:
            _products(x[b], rows, bias, found, 0, held, value)
        for c in range(held):
            if not value[c] <= threshold[found[c]]:
                cols[slot], values[slot] = found[c], value[c]
                slot += 1
        counts[b] = slot - start
    return slot
