# mypy: allow-untyped-defs, disable-error-code=assignment
"""Compiled loops over the codes of a harvest. Import through `code_files.compiled`; the numpy functions beside its
callers, which do without numba, compute the same, and say what is meant here by each column.

A code is (feature, context, position, value); codes lie in the order of the tokens, sorted ones by feature first. The
kernels of features work on those from `first` to `last`, so that threads can share them. A *group* is the codes of one
feature in one context.
"""

import numpy as np
from numba import njit

from training.numerics.kernels import kernel

_CODES = "int64[::1], int32[::1], int32[::1], float32[::1]"  # bounds, context, position, value


@kernel("void(int64[::1], int32[::1], float32[::1], int32[::1], int32[::1], int32[::1], int64[::1], int32[:,::1])")
def by_block(row, feature, value, context, position, block_of, ends, codes):
    """codes (n, 4) as code_files.CODE, sorted by the block of their feature: those of block b end at ends[b]."""
    bits, place = value.view(np.int32), np.zeros(len(ends) + 1, np.int64)
    for c in range(len(row)):
        place[block_of[feature[c]] + 1] += 1
    for block in range(len(ends)):
        place[block + 1] += place[block]
        ends[block] = place[block + 1]
    for c in range(len(row)):
        block = block_of[feature[c]]
        slot = place[block]
        place[block] = slot + 1
        out = codes[slot]
        out[0], out[1], out[2], out[3] = feature[c], context[row[c]], position[row[c]], bits[c]


@kernel("void(int32[:,::1], int64, int32[:,::1], int64[::1], int32[::1], int32[::1], float32[::1], int32[::1])")
def by_feature(codes, first, tokens, bounds, context, position, value, token):
    """Sort codes (n, 4) by feature: those of feature first + i in slots bounds[i] to bounds[i + 1], and their tokens."""
    n_features, bits = len(bounds) - 1, value.view(np.int32)
    bounds[:] = 0
    for c in range(len(codes)):
        bounds[codes[c, 0] - first + 1] += 1
    for i in range(n_features):
        bounds[i + 1] += bounds[i]
    place = bounds[:-1].copy()
    for c in range(len(codes)):
        code = codes[c]
        i = code[0] - first
        slot = place[i]
        place[i] = slot + 1
        context[slot], position[slot], bits[slot] = code[1], code[2], code[3]
        token[slot] = tokens[code[1], code[2]]


@njit(inline="always")
def _bin(value, maximum, bins):
    return min(np.int64(value / maximum * np.float32(bins)), bins - 1)


# without fast mathematics: bins and sums are rounded as numpy rounds them
@kernel(
    f"void(int64, int64, {_CODES}, int64[::1], float32[::1], float32[::1], int64[:,::1], int64[::1])", fastmath=False
)
def statistics(first, last, bounds, context, position, value, contexts, maximum, mean, histogram, fires):
    """Counts of codes and of groups, maximum, mean and histogram of each feature."""
    bins = histogram.shape[1]
    for i in range(first, last):
        begin, end = bounds[i], bounds[i + 1]
        total, most, groups, before = 0.0, np.float32(0), 0, np.int32(-1)
        for c in range(begin, end):
            total += value[c]
            most = value[c] if value[c] > most else most
            groups += context[c] != before
            before = context[c]
        fires[i], contexts[i], maximum[i] = end - begin, groups, most
        mean[i] = total / (end - begin)
        counts = histogram[i]
        counts[:] = 0
        for c in range(begin, end):
            counts[_bin(value[c], most, bins)] += 1


@njit(inline="always")
def _insert(best, which, held, room, key, item):
    """Keep (key, item) in best and which, largest key first and of equal ones the first to come; returns how many."""
    if held == room and not key > best[room - 1]:
        return held
    at = min(held, room - 1)
    while at > 0 and key > best[at - 1]:
        best[at], which[at] = best[at - 1], which[at - 1]
        at -= 1
    best[at], which[at] = key, item
    return min(held + 1, room)


@kernel(
    f"void(int64, int64, {_CODES}, float32[::1], int64[::1], float32[::1], int64, int64, int64, int64, int64[:,::1],"
    " uint8[:,::1], int64[::1], int32[::1], float32[::1])",
    fastmath=False,
)
def examples(
    first, last, bounds, context, position, value, maximum, group_bounds, draws, k, intervals, per_interval, bins,
    chosen, tags, starts, peak_at, peaks,
):  # fmt: skip
    """The groups with the k largest peaks (tag 0), and of each interval j the `per_interval` with the largest draws (tag
    j + 1), by falling peak: chosen (features, k + intervals * per_interval), -1 at the end of a row.

    The groups of feature i are group_bounds[i] to group_bounds[i + 1]; starts, peak_at and peaks are theirs: the first
    code, the position of the largest, and it.
    """
    best, which = np.empty(max(k, per_interval), np.float32), np.empty(max(k, per_interval), np.int64)
    drawn, sampled = np.empty((intervals, per_interval), np.float32), np.empty((intervals, per_interval), np.int64)
    held = np.empty(intervals, np.int64)
    width = bins // intervals
    for i in range(first, last):
        group, before = group_bounds[i] - 1, np.int32(-1)
        for c in range(bounds[i], bounds[i + 1]):
            if context[c] != before:
                group, before = group + 1, context[c]
                starts[group], peak_at[group], peaks[group] = c, position[c], value[c]
            elif value[c] > peaks[group]:
                peak_at[group], peaks[group] = position[c], value[c]
        top, slot = 0, 0
        held[:] = 0
        for g in range(group_bounds[i], group_bounds[i + 1]):
            top = _insert(best, which, top, k, peaks[g], g)
            if per_interval > 0:
                j = _bin(peaks[g], maximum[i], bins) // width
                held[j] = _insert(drawn[j], sampled[j], held[j], per_interval, draws[g], g)
        for c in range(top):
            chosen[i, slot], tags[i, slot] = which[c], 0
            slot += 1
        for j in range(intervals):
            count = 0
            for c in range(held[j]):
                count = _insert(best, which, count, per_interval, peaks[sampled[j, c]], sampled[j, c])
            for c in range(count):
                chosen[i, slot], tags[i, slot] = which[c], j + 1
                slot += 1
        chosen[i, slot:] = -1


@kernel(
    "void(int64, int64, int64[::1], float32[::1], int32[::1], int64, int32[:,::1], float32[:,::1], int64[:,::1])",
    fastmath=False,
)
def top_tokens(first, last, bounds, value, token, vocabulary, ids, sums, counts):
    """The tokens with the largest sums of each feature (of equal sums the lowest id), and on how many codes they lie."""
    slot_of = np.full(vocabulary, -1, np.int32)
    longest = 0
    for i in range(first, last):
        longest = max(longest, bounds[i + 1] - bounds[i])
    seen, total, count = np.empty(longest, np.int32), np.empty(longest), np.empty(longest, np.int64)
    room = ids.shape[1]
    for i in range(first, last):
        n, held = 0, 0
        for c in range(bounds[i], bounds[i + 1]):
            s = slot_of[token[c]]
            if s < 0:
                s = n
                slot_of[token[c]], seen[n], total[n], count[n] = n, token[c], 0, 0
                n += 1
            total[s] += value[c]
            count[s] += 1
        for s in range(n):
            slot_of[seen[s]] = -1
            size = np.float32(total[s])
            at = held if held < room else room - 1
            if held == room and not (size > sums[i, at] or (size == sums[i, at] and seen[s] < ids[i, at])):
                continue
            while at > 0 and (size > sums[i, at - 1] or (size == sums[i, at - 1] and seen[s] < ids[i, at - 1])):
                ids[i, at], sums[i, at], counts[i, at] = ids[i, at - 1], sums[i, at - 1], counts[i, at - 1]
                at -= 1
            ids[i, at], sums[i, at], counts[i, at] = seen[s], size, count[s]
            held = min(held + 1, room)
        for at in range(held, room):
            ids[i, at], sums[i, at], counts[i, at] = -1, 0, 0


@kernel("void(int64[::1], int64[::1], int32[::1], float32[::1], int32[::1], float32[::1])")
def pick(starts, lengths, position, value, positions, values):
    """position and value from starts[e] on, lengths[e] of them, one e after another."""
    slot = 0
    for e in range(len(starts)):
        for c in range(starts[e], starts[e] + lengths[e]):
            positions[slot], values[slot] = position[c], value[c]
            slot += 1


@kernel(
    "void(int64, int64, int64[::1], int32[::1], int64[::1], int32[::1], int64, int32[:,::1], float32[:,::1], int32[:,::1])",
    fastmath=False,
)
def together(first, last, starts, feature, bounds, row, least, ids, correlation, counts):
    """Companions of features first to last: see together._plainly."""
    n, most = float(len(starts) - 1), ids.shape[1]
    met, seen = np.zeros(len(bounds) - 1, np.int32), np.empty(len(bounds), np.int32)
    for i in range(first, last):
        n_seen = 0
        for c in range(bounds[i], bounds[i + 1]):
            for s in range(starts[row[c]], starts[row[c] + 1]):
                j = feature[s]
                seen[n_seen] = j  # stays where it is the first time; no branch, which could not be foretold
                n_seen += met[j] == 0
                met[j] += 1
        mine, kept = float(bounds[i + 1] - bounds[i]), 0
        for t in range(n_seen):
            j = seen[t]
            n_met = met[j]
            met[j] = 0
            theirs = float(bounds[j + 1] - bounds[j])
            spread = mine * (n - mine) * theirs * (n - theirs)
            if j == i or n_met < least or spread <= 0:
                continue
            found = np.float32((n * n_met - mine * theirs) / np.sqrt(spread))
            if found <= 0:
                continue
            place = kept
            while place > 0 and (
                found > correlation[i, place - 1] or (found == correlation[i, place - 1] and j < ids[i, place - 1])
            ):
                place -= 1
            if place == most:
                continue
            for p in range(min(kept, most - 1), place, -1):
                ids[i, p], correlation[i, p], counts[i, p] = ids[i, p - 1], correlation[i, p - 1], counts[i, p - 1]
            ids[i, place], correlation[i, place], counts[i, place] = j, found, n_met
            kept = min(kept + 1, most)
