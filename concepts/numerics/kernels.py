# mypy: allow-untyped-defs, disable-error-code=assignment
"""Compiled loops of the harvest's encoder, for a CPU. Import through `sparse_encode`, which does without numba too."""

import numpy as np

from training.numerics.kernels import kernel


@kernel(
    "void(float32[:,::1], float32[:,::1], float32[::1], float32[::1], int64, int64, int64[::1], int32[::1], float32[::1],"
    " boolean[::1])"
)
def settle(x, rows, bias, scale, k, wide, counts, cols, values, sure):
    """Of the candidates of each row of x, those that the float32 values x . w + b choose: relu of the k largest.

    Candidates of row b are the counts[b] of slots b * wide ..., with upper bounds of their values / scale[b], the largest
    there are; what is chosen takes their place from slot b * wide on. They are computed by falling bound, until the k-th
    largest value lies above the next bound; sure[b] says that this happened, so that no other column can belong to them.
    """
    best, at = np.empty(k, np.float32), np.empty(k, np.int32)
    bounds, columns = np.empty(wide, np.float32), np.empty(wide, np.int32)
    for b in range(len(x)):
        first, n = b * wide, counts[b]
        for c in range(n):  # by falling bound
            bound, column = values[first + c], cols[first + c]
            j = c
            while j > 0 and bounds[j - 1] < bound:
                bounds[j], columns[j] = bounds[j - 1], columns[j - 1]
                j -= 1
            bounds[j], columns[j] = bound, column
        slack = scale[b] * np.float32(1 + 2.0**-8)  # the bounds' product was rounded too
        least, held, done = 0, 0, False
        for c in range(n):
            if held == k and best[least] > bounds[c] * slack:
                done = True
                break
            w = rows[columns[c]]
            total = np.float32(0)
            for j in range(x.shape[1]):
                total += x[b, j] * w[j]
            total += bias[columns[c]]
            if held < k:
                best[held], at[held] = total, columns[c]
                held += 1
            elif total > best[least] or total != total:
                best[least], at[least] = total, columns[c]
            else:
                continue
            if held == k:
                least = 0
                for j in range(1, k):
                    if best[j] < best[least]:
                        least = j
        if not done and n == wide and held == k:
            done = best[least] > bounds[n - 1] * slack
        sure[b] = done
        slot = first
        for j in range(held):
            if not best[j] <= 0:  # a value that is not a number stays, so that the harvest says so
                cols[slot], values[slot] = at[j], best[j]
                slot += 1
        counts[b] = slot - first
