# mypy: allow-untyped-defs, disable-error-code=assignment
"""Compiled loops of the harvest's encoder, for a CPU. Import through `sparse_encode`, which does without numba too.

All take the rows x (n, d) of the encoder's input, the encoder as rows (m, d) and bias (m,), and upper bounds of the
pre-activations x . w_j + bias_j: scale_b (1 + 2^-8) (z_bj + slack_j), where z (n, m) is z32 when `exact`, else z16 (bfloat16).
Only what its bound does not rule out is computed, in float32 and by one loop, so that no value depends on the other rows.
"""

import numpy as np
from numba import njit

from training.numerics.kernels import _key, _kth, _narrow, _read_row, _wide, kernel

_GIVEN = (
    "uint16[:,::1], float32[:,::1], boolean, float32[::1], float32[:,::1], float32[:,::1], float32[::1], float32[::1]"
)
_MADE = "int64[::1], int32[::1], float32[::1]"
_ROUNDED = np.float32(1 + 2.0**-8)
_RUN = 16  # columns looked at together
_TILE = 256  # columns of which every 16th make a group
_NEAR = np.float32(4 / 5)  # of the first look's lowest bound: few rows have to go below it


@kernel("void(float32[:,::1], float32[::1], int64, int64, uint16[:,::1], float32[:,::1], float32[::1], float32[::1])")
def round_encoder(W_enc, b_enc, first, last, factors, rows, lengths, lost):
    """For columns `first` to `last` of W_enc (d, m): factors (d + 1, m), it and b_enc in bfloat16; rows (m, d), it in
    float32; the lengths of its columns with the bias, and of what rounding took away from them."""
    d, width = W_enc.shape[0], last - first
    kept, taken = lengths[first:last], lost[first:last]
    kept[:], taken[:] = 0, 0
    for i in range(d + 1):
        given = b_enc[first:last] if i == d else W_enc[i, first:last]
        out = factors[i, first:last]
        for j in range(width):
            bits = _narrow(given[j])
            out[j] = bits
            gone = given[j] - _wide(bits)
            kept[j] += given[j] * given[j]
            taken[j] += gone * gone
    for j in range(width):
        kept[j], taken[j] = np.sqrt(kept[j]), np.sqrt(taken[j])
    for begin in range(0, d, _RUN):  # a line of W_enc's cache holds that many columns, one of rows as many of its own
        for j in range(first, last):
            for i in range(begin, min(begin + _RUN, d)):
                rows[j, i] = W_enc[i, j]


@kernel("void(float32[:,::1], uint16[:,::1], float32[::1], float32[::1])")
def scale_rows(x, rounded, scale, largest):
    """(x_b, 1) / s_b in bfloat16 (n, d + 1), s_b its length; `largest` of the lengths of what rounding took away, and of
    what it left. Rows that are no numbers count for nothing in these."""
    n, d = x.shape
    largest[:] = 0
    for b in range(n):
        row, out = x[b], rounded[b]
        square = np.float32(1)
        for j in range(d):
            square += row[j] * row[j]
        scale[b] = np.sqrt(square)
        factor = np.float32(1) / scale[b]
        out[d] = _narrow(factor)
        kept = _wide(out[d]) * _wide(out[d])
        lost = (factor - _wide(out[d])) * (factor - _wide(out[d]))
        for j in range(d):
            whole = row[j] * factor
            bits = _narrow(whole)
            out[j] = bits
            again = _wide(bits)
            kept += again * again
            lost += (whole - again) * (whole - again)
        largest[0] = max(largest[0], np.sqrt(lost)) if lost > 0 else largest[0]
        largest[1] = max(largest[1], np.sqrt(kept)) if kept > 0 else largest[1]


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


@njit(inline="always")
def _as_it_is(x):
    return x


@njit(inline="always")
def _group_maxima(row, slack, read, best):
    """best[16 t + l] = the largest bound of columns 256 t + l, 256 t + l + 16, ..., for whole and for the last tile."""
    tiles = len(row) // _TILE
    for t in range(tiles):
        z, s = row[t * _TILE : (t + 1) * _TILE], slack[t * _TILE : (t + 1) * _TILE]
        out = best[t * _RUN : (t + 1) * _RUN]
        for lane in range(_RUN):
            most = read(z[lane]) + s[lane]
            for step in range(1, _TILE // _RUN):
                bound = read(z[step * _RUN + lane]) + s[step * _RUN + lane]
                most = most if most > bound else bound
            out[lane] = most
    for g in range(tiles * _RUN, len(best)):
        first = tiles * _TILE + g - tiles * _RUN
        best[g] = read(row[first]) + slack[first]
        for j in range(first + _RUN, len(row), _RUN):
            best[g] = max(best[g], read(row[j]) + slack[j])


@njit(inline="always")
def _first_look(row, slack, read, k, best, keys, found, bounds, later):
    """Columns with the k largest bounds, and a few more, in `found`; those with bounds not far below in `later`.

    Returns the lowest bound of each, and how many there are: (low, near, held, waiting). Columns are looked at without
    branches, which could not be foreseen.
    """
    groups, m = len(best), len(row)
    _group_maxima(row, slack, read, best)
    if k <= groups:
        for g in range(groups):
            keys[g] = _key(best[g])
        low = _of_key(_kth(keys, groups, k, 16))
    else:
        for j in range(m):
            keys[j] = _key(read(row[j]) + slack[j])
        low = _of_key(_kth(keys, m, k, 16))
    near = low * _NEAR if low > 0 else low
    seen = 0
    for g in range(groups):
        if not best[g] < near:
            first, lane = g // _RUN * _TILE, g % _RUN
            if first + _TILE <= m:
                z, s = row[first : first + _TILE], slack[first : first + _TILE]
                for step in range(_TILE // _RUN):
                    at = step * _RUN + lane
                    bound = read(z[at]) + s[at]
                    later[seen], bounds[seen] = first + at, bound
                    seen += not bound < near
            else:
                for j in range(first + lane, m, _RUN):
                    bound = read(row[j]) + slack[j]
                    later[seen], bounds[seen] = j, bound
                    seen += not bound < near
    held, waiting = 0, 0
    for c in range(seen):
        j, bound = later[c], bounds[c]
        found[held] = j
        later[waiting], bounds[waiting] = j, bound
        held += not bound < low
        waiting += bound < low
    return low, near, held, waiting


@njit(inline="always")
def _second_look(row, slack, read, low, high, best, found, held):
    """The columns with bounds from `low` to below `high` go to `found` too; returns how many there are then."""
    for g in range(len(best)):
        if not best[g] < low:
            first = g // _RUN * _TILE + g % _RUN
            for j in range(first, min(first + _TILE, len(row)), _RUN):
                bound = read(row[j]) + slack[j]
                found[held] = j
                held += bound < high and not bound < low
    return held


@kernel(f"int64({_GIVEN}, int64, {_MADE})")
def encode_topk(z16, z32, exact, slack, x, rows, bias, scale, k, counts, cols, values):
    """relu of the k largest of each row, those above 0, one row after another: counts (n,), cols and values (n * k,).

    The k-th largest of the values of the largest bounds is at most the k-th largest of all, so that no column with a
    bound below it belongs to them. Returns how many there are in all.
    """
    n, m = z32.shape if exact else z16.shape
    best, bounds = np.empty(m // _TILE * _RUN + min(m % _TILE, _RUN), np.float32), np.empty(m + 3, np.float32)
    found, later = np.empty(m + 3, np.int32), np.empty(m + 3, np.int32)
    value, keys = np.empty(m + 3, np.float32), np.empty(m, np.int32)
    slot = 0
    for b in range(n):
        if exact:
            low, near, held, waiting = _first_look(z32[b], slack, _as_it_is, k, best, keys, found, bounds, later)
        else:
            low, near, held, waiting = _first_look(z16[b], slack, _wide, k, best, keys, found, bounds, later)
        _products(x[b], rows, bias, found, 0, held, value)
        for c in range(held):
            keys[c] = _key(value[c])
        least, before = _kth(keys, held, k, 0), held
        below = _of_key(max(least, 0)) / (scale[b] * _ROUNDED)
        if not below < near:
            for c in range(waiting):
                found[held] = later[c]
                held += not bounds[c] < below
        elif exact:
            held = _second_look(z32[b], slack, _as_it_is, below, low, best, found, held)
        else:
            held = _second_look(z16[b], slack, _wide, below, low, best, found, held)
        if held > before:
            _products(x[b], rows, bias, found, before, held, value)
            for c in range(before, held):
                keys[c] = _key(value[c])
            least = _kth(keys, held, k, 0)
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
