# mypy: allow-untyped-defs, disable-error-code=assignment
"""TopK's choice, compiled by numba; see kernels.py, whose words and rules hold here too. Pre-activations are
feature-major here, z (m, n): one feature's values of all rows side by side, so that one instruction compares several
rows, and the product that makes them reads no operand against its grain.

Each look is a function of its own, because the compiler makes better loops of few. Indices are unsigned where they are
innermost: numba lets signed ones count from the end, which costs a test each.
"""

import numpy as np
from numba import njit

from training.numerics.kernels import _key, _wide, kernel

GROUP = 16  # features
MOST_GROUPS = 2**15 - 1  # which 16 bits count; fewer groups than k have no bound, which is right and slow
LANES = 32  # keys that are compared at a time
_LOWEST = np.int32(-(2**31))


@njit(inline="always")
def _best_of(z16, z32, exact, bias, first, last, best):
    """best[b] = the largest z + bias of features first ... last."""
    n = len(best)
    for b in range(n):
        best[b] = np.float32(-np.inf)
    i = first
    while i + 4 <= last:
        a0, a1, a2, a3 = bias[i], bias[i + 1], bias[i + 2], bias[i + 3]
        if exact:
            x0, x1, x2, x3 = z32[i], z32[i + 1], z32[i + 2], z32[i + 3]
            for b in range(n):
                most = max(max(x0[b] + a0, x1[b] + a1), max(x2[b] + a2, x3[b] + a3))
                best[b] = max(most, best[b])
        else:
            y0, y1, y2, y3 = z16[i], z16[i + 1], z16[i + 2], z16[i + 3]
            for b in range(n):
                most = max(max(_wide(y0[b]) + a0, _wide(y1[b]) + a1), max(_wide(y2[b]) + a2, _wide(y3[b]) + a3))
                best[b] = max(most, best[b])
        i += 4
    for j in range(i, last):
        for b in range(n):
            best[b] = max(best[b], (z32[j, b] if exact else _wide(z16[j, b])) + bias[j])


@kernel("void(uint16[:,::1], float32[:,::1], boolean, float32[::1], int64, float32[:,::1], int16[:,::1])")
def _group_maxima(z16, z32, exact, bias, size, best, keys):
    """best (groups, n): the largest z + bias of each `size` features in a row; keys: its first 16 bits, in order."""
    m, n = z32.shape if exact else z16.shape
    for g in range(len(best)):
        _best_of(z16, z32, exact, bias, g * size, min((g + 1) * size, m), best[g])
        for b in range(n):
            keys[g, b] = np.int16(_key(best[g, b]) >> np.int32(16))


@kernel("void(int16[:,::1], int64, float32[::1])")
def _bounds(keys, k, bound):
    """bound[b] = the largest number of 16 bits with at least k of keys[:, b] >= it, as the float32 that begins so."""
    groups, n = keys.shape
    reached, higher, count = np.empty(n, np.int16), np.empty(n, np.int16), np.empty(n, np.int16)
    reached[:] = -(2**15)
    for bit in range(15, -1, -1):
        step = np.int16(1 << bit) if bit < 15 else np.int16(-(2**15))
        for b in range(n):
            higher[b] = np.int16(reached[b] + step)
            count[b] = 0
        for g in range(groups):
            own = keys[g]
            for b in range(n):
                count[b] += np.int16(own[b] >= higher[b])
        for b in range(n):
            if count[b] >= k:
                reached[b] = higher[b]
    for b in range(n):
        key = np.int32(np.int32(reached[b]) << np.int32(16))
        bound[b] = np.int32(key ^ ((key >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32)


@njit(inline="always")
def _append_bfloat16(z, bias, first, last, b, bound, found, values, held):
    """The features first ... last of row b that are not below the bound; returns how many are held then. One function
    for both kinds of z takes two and a half times as long."""
    for i in range(first, last):
        value = _wide(z[i, b]) + bias[i]
        found[held] = i
        values[held] = value
        held += np.uint64(not value < bound)
    return held


@njit(inline="always")
def _append_float32(z, bias, first, last, b, bound, found, values, held):
    for i in range(first, last):
        value = z[i, b] + bias[i]
        found[held] = i
        values[held] = value
        held += np.uint64(not value < bound)
    return held


@kernel(
    "void(uint16[:,::1], float32[:,::1], boolean, float32[::1], int64, float32[:,::1], float32[::1], int32[:,::1],"
    " float32[:,::1], uint64[::1])"
)
def _sift(z16, z32, exact, bias, size, best, bound, found, values, held):
    """The features of each row that are not below its bound, looked for in the groups whose maximum is not. Once more
    than `room` are held, the rest is left."""
    (groups, n), m = best.shape, len(bias)
    room, hits = np.uint64(found.shape[1] - size), np.empty(n + 1, np.uint32)
    held[:] = 0
    for g in range(groups):
        own, hit = best[g], np.uint64(0)
        first, last = np.uint64(g * size), np.uint64(min((g + 1) * size, m))
        for b in range(np.uint64(n)):
            hits[hit] = b
            hit += np.uint64(not own[b] < bound[b])
        for q in range(hit):
            b = hits[q]
            if held[b] <= room:
                if exact:
                    held[b] = _append_float32(z32, bias, first, last, b, bound[b], found[b], values[b], held[b])
                else:
                    held[b] = _append_bfloat16(z16, bias, first, last, b, bound[b], found[b], values[b], held[b])


@kernel("int64(int32[::1], float32[::1], int64, int64, boolean, int32[::1], int32[::1], float32[::1])")
def _largest(found, values, total, k, positive, keys, cols_out, values_out):
    """The k largest of `total` candidates, of equal ones the first; with `positive` those above 0. Returns how many."""
    for c in range(total):
        keys[c] = _key(values[c])
    runs = (total + LANES - 1) // LANES
    for c in range(total, runs * LANES):
        keys[c] = _LOWEST
    reached = np.int64(-(2**31))
    for bit in range(31, -1, -1):
        higher = reached + (np.int64(1) << bit)
        edge = np.int32(higher)
        count = np.int32(0)
        for run in range(runs):
            for c in range(LANES):
                count += np.int32(keys[run * LANES + c] >= edge)
        if count >= k:
            reached = higher
    edge = np.int32(reached)
    ties = k
    for c in range(total):
        ties -= keys[c] > edge
    slot = 0
    for c in range(total):
        tie = keys[c] == edge and ties > 0
        ties -= tie
        chosen = (keys[c] > edge or tie) and not (positive and values[c] <= 0)  # a value that is not a number stays, so
        if slot < k:  # that the loss shows it
            cols_out[slot] = found[c]
            values_out[slot] = values[c]
        slot += chosen
    return slot


@kernel(
    "void(uint16[:,::1], float32[:,::1], boolean, float32[::1], int64, boolean, float32[:,::1], int16[:,::1],"
    " int32[:,::1], float32[:,::1], int64[::1], int32[::1], float32[::1])"
)
def choose_topk(z16, z32, exact, bias, k, positive, best, keys, found, found_values, counts, cols, values):
    """The k largest z + bias of each row, with `positive` those above 0: pairs in slots b * k ... b * k + counts[b].

    z (m, n) is z32 when `exact`, else z16 (bfloat16). best (groups, n), keys (groups, n), found (n, room) and
    found_values (n, room) are room to work in, see `sizes`. The k-th largest of the maxima of groups of features is a
    lower bound of the k-th largest value; features are looked at twice only in groups that reach it. Rows in which more
    than `room` do (equal values) are looked through as a whole.
    """
    m, n = z32.shape if exact else z16.shape
    size = (m + len(best) - 1) // len(best)
    bound, held = np.empty(n, np.float32), np.empty(n, np.uint64)
    _group_maxima(z16, z32, exact, bias, size, best, keys)
    _bounds(keys, k, bound)
    _sift(z16, z32, exact, bias, size, best, bound, found, found_values, held)
    room = found.shape[1] - size
    order = np.empty(max(m, found.shape[1]) + LANES, np.int32)
    columns, row = np.arange(m).astype(np.int32), np.empty(m, np.float32)
    for b in range(n):
        out, total = slice(b * k, (b + 1) * k), np.int64(held[b])
        if total <= room:
            counts[b] = _largest(found[b], found_values[b], total, k, positive, order, cols[out], values[out])
        else:
            for i in range(m):
                row[i] = (z32[i, b] if exact else _wide(z16[i, b])) + bias[i]
            counts[b] = _largest(columns, row, m, k, positive, order, cols[out], values[out])


def sizes(m: int, k: int) -> tuple[int, int]:
    """(groups, room) of `choose_topk`."""
    size = max(1, min(GROUP, m // k), -(-m // MOST_GROUPS))
    groups = -(-m // size)
    size = -(-m // groups)
    return -(-m // size), 4 * k + size
