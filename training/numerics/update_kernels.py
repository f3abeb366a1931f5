# mypy: allow-untyped-defs, disable-error-code=assignment
"""The second half of the sparse training step, compiled by numba: from pairs sorted by feature to gradients and Adam's
step; see kernels.py, whose words and rules hold here too."""

import numpy as np
from numba import njit

from training.numerics.kernels import _add_rows, _wide, kernel

PAIRS = (  # bounds, rows, values, dz; x and residual as bfloat16 and as float32; exact, scale, widths
    "int64[::1], int32[::1], float32[::1], float32[::1], uint16[:,::1], uint16[:,:,::1], float32[:,::1],"
    " float32[:,:,::1], boolean, float32, int64[::1]"
)
ADDED = "int32[::1], float32[:,::1], float32[::1], float32[:,::1]"  # place, add_W_enc, add_b_enc, add_W_dec
STATE = (  # weights and both moments of W_enc, b_enc and W_dec
    "float32[:,::1], float32[:,::1], float32[:,::1], float32[::1], float32[::1], float32[::1], float32[:,::1],"
    " float32[:,::1], float32[:,::1]"
)
RATES = "float32, float32, float32, float32, float32, float32"  # lr, lr_bias, beta1, beta2, root, eps


@njit(inline="always")
def _part(widths, i):
    """Which residual feature i learns from."""
    q = 0
    while i >= widths[q]:
        q += 1
    return q


@njit(inline="always")
def _add_bfloat16_rows(first, last, rows, factors, matrix, out):
    """kernels._add_rows of a matrix in bfloat16."""
    p = first
    while p + 4 <= last:
        f0, f1, f2, f3 = factors[p], factors[p + 1], factors[p + 2], factors[p + 3]
        w0, w1, w2, w3 = matrix[rows[p]], matrix[rows[p + 1]], matrix[rows[p + 2]], matrix[rows[p + 3]]
        for c in range(len(out)):
            out[c] += f0 * _wide(w0[c]) + f1 * _wide(w1[c]) + f2 * _wide(w2[c]) + f3 * _wide(w3[c])
        p += 4
    for q in range(p, last):
        f0, w0 = factors[q], matrix[rows[q]]
        for c in range(len(out)):
            out[c] += f0 * _wide(w0[c])


@njit(inline="always")
def _sum_pairs(first, last, rows, values, dz, x16, r16, x32, r32, exact, q, to_enc, to_dec):
    """to_enc = sum of dz x_b, to_dec = sum of f residual_qb over the pairs of one feature; returns sum of dz."""
    for c in range(len(to_enc)):
        to_enc[c] = 0
    for c in range(len(to_dec)):
        to_dec[c] = 0
    if exact:
        _add_rows(first, last, rows, dz, x32, to_enc)
        _add_rows(first, last, rows, values, r32[q], to_dec)
    else:
        _add_bfloat16_rows(first, last, rows, dz, x16, to_enc)
        _add_bfloat16_rows(first, last, rows, values, r16[q], to_dec)
    total = np.float32(0)
    for p in range(first, last):
        total += dz[p]
    return total


@njit(inline="always")
def _remove_parallel(g, w):
    """g -= (g . w) w."""
    along = np.float32(0)
    for c in range(len(w)):
        along += g[c] * w[c]
    for c in range(len(w)):
        g[c] -= along * w[c]


@njit(inline="always")
def _gradient(
    i, bounds, rows, values, dz, x16, r16, x32, r32, exact, scale, widths, place, add_W_enc, add_b_enc, add_W_dec, W_enc,
    W_dec, unit, to_enc, to_dec, through,
):  # fmt: skip
    """The gradients of feature i: to_enc and to_dec, and b_enc's, which is returned."""
    q = _part(widths, i)
    bias = _sum_pairs(bounds[i], bounds[i + 1], rows, values, dz, x16, r16, x32, r32, exact, q, to_enc, to_dec)
    for c in range(len(to_enc)):
        through[c] += bias * W_enc[i, c]
    for c in range(len(to_dec)):
        to_dec[c] *= scale
    if place[i] >= 0:
        bias += add_b_enc[place[i]]
        for c in range(len(to_enc)):
            to_enc[c] += add_W_enc[place[i], c]
        for c in range(len(to_dec)):
            to_dec[c] += add_W_dec[place[i], c]
    if unit:
        _remove_parallel(to_dec, W_dec[i])
    return bias


@njit(inline="always")
def _adam(w, g, factor, m, v, lr, beta1, beta2, root, eps):
    """torch's Adam on one row, of the gradient factor * g: m += (1 - beta1) (g - m), v = beta2 v + (1 - beta2) g^2,
    w -= lr m / (root sqrt(v) + eps).

    lr includes 1 / (1 - beta1^t); root = 1 / sqrt(1 - beta2^t).
    """
    for c in range(len(w)):
        grad = factor * g[c]
        m[c] += (np.float32(1) - beta1) * (grad - m[c])
        v[c] = beta2 * v[c] + (np.float32(1) - beta2) * grad * grad
        w[c] -= lr * m[c] / (np.sqrt(v[c]) * root + eps)


@njit(inline="always")
def _step(
    i, to_enc, to_bias, to_dec, factor, W_enc, m_enc, v_enc, b_enc, m_bias, v_bias, W_dec, m_dec, v_dec, unit, lr, lr_bias,
    beta1, beta2, root, eps,
):  # fmt: skip
    """Adam on the three tensors of feature i; with `unit` W_dec[i] is brought to norm 1 afterwards."""
    _adam(W_enc[i], to_enc, factor, m_enc[i], v_enc[i], lr, beta1, beta2, root, eps)
    _adam(W_dec[i], to_dec, factor, m_dec[i], v_dec[i], lr, beta1, beta2, root, eps)
    _adam(b_enc[i : i + 1], to_bias, factor, m_bias[i : i + 1], v_bias[i : i + 1], lr_bias, beta1, beta2, root, eps)
    if unit:
        size = np.float32(0)
        for c in range(len(to_dec)):
            size += W_dec[i, c] * W_dec[i, c]
        size = np.float32(1) / np.sqrt(size)
        for c in range(len(to_dec)):
            W_dec[i, c] *= size


@njit(inline="always")
def _square(row):
    """sum of row^2."""
    size = np.float32(0)
    for c in range(len(row)):
        size += row[c] * row[c]
    return size


@kernel(
    f"float64(int64, int64, {PAIRS}, {ADDED}, float32[:,::1], float32[:,::1], boolean, float32[:,::1], float32[::1],"
    " float32[:,::1], float32[::1])"
)
def sum_features(
    first, last, bounds, rows, values, dz, x16, r16, x32, r32, exact, scale, widths, place, add_W_enc, add_b_enc,
    add_W_dec, W_enc, W_dec, unit, to_W_enc, to_b_enc, to_W_dec, through,
):  # fmt: skip
    """The gradients of features first ... last, over the pairs of each; returns the sum of their squares:

        dW_enc[i] = sum of dz x_b;   db_enc[i] = sum of dz;   dW_dec[i] = scale * sum of f residual_qb

    q is the part of `widths` that i is in. x and residual are read as float32 when `exact`, else as bfloat16. Gradients of
    dead features are added where place[i] >= 0 (a row of add_*). With `unit` the part of dW_dec[i] along W_dec[i] is
    removed. `through` becomes the sum of db_enc[i] W_enc[i], without the dead features' part: what reaches b_dec through
    the encoder's input.
    """
    squares = np.float64(0)
    through[:] = 0
    for i in range(first, last):
        bias = _gradient(
            i, bounds, rows, values, dz, x16, r16, x32, r32, exact, scale, widths, place, add_W_enc, add_b_enc,
            add_W_dec, W_enc, W_dec, unit, to_W_enc[i], to_W_dec[i], through,
        )  # fmt: skip
        to_b_enc[i] = bias
        squares += np.float64(_square(to_W_enc[i])) + np.float64(_square(to_W_dec[i])) + np.float64(bias * bias)
    return squares


@kernel(f"void(int64, int64, {PAIRS}, {ADDED}, {STATE}, boolean, {RATES}, float32[::1])")
def update_features(
    first, last, bounds, rows, values, dz, x16, r16, x32, r32, exact, scale, widths, place, add_W_enc, add_b_enc,
    add_W_dec, W_enc, m_enc, v_enc, b_enc, m_bias, v_bias, W_dec, m_dec, v_dec, unit, lr, lr_bias, beta1, beta2, root,
    eps, through,
):  # fmt: skip
    """`sum_features` and Adam's step of each feature in one go: the gradients of one feature never leave the processor's
    first cache. As optim.Optimizer.step; `unit` as in `_step`."""
    to_enc, to_dec = np.empty(W_enc.shape[1], np.float32), np.empty(W_dec.shape[1], np.float32)
    to_bias = np.empty(1, np.float32)
    through[:] = 0
    for i in range(first, last):
        to_bias[0] = _gradient(
            i, bounds, rows, values, dz, x16, r16, x32, r32, exact, scale, widths, place, add_W_enc, add_b_enc,
            add_W_dec, W_enc, W_dec, unit, to_enc, to_dec, through,
        )  # fmt: skip
        _step(
            i, to_enc, to_bias, to_dec, np.float32(1), W_enc, m_enc, v_enc, b_enc, m_bias, v_bias, W_dec, m_dec, v_dec,
            unit, lr, lr_bias, beta1, beta2, root, eps,
        )  # fmt: skip


@kernel(
    f"void(int64, int64, float32[:,::1], float32[::1], float32[:,::1], float32, {STATE}, boolean, {RATES})",
)
def update_rows(
    first, last, to_W_enc, to_b_enc, to_W_dec, factor, W_enc, m_enc, v_enc, b_enc, m_bias, v_bias, W_dec, m_dec, v_dec,
    unit, lr, lr_bias, beta1, beta2, root, eps,
):  # fmt: skip
    """Adam's step of features first ... last from gradients that are summed already, times `factor`. With `unit` they lose
    what lies along decoder rows."""
    for i in range(first, last):
        if unit:
            _remove_parallel(to_W_dec[i], W_dec[i])
        _step(
            i, to_W_enc[i], to_b_enc[i : i + 1], to_W_dec[i], factor, W_enc, m_enc, v_enc, b_enc, m_bias, v_bias, W_dec,
            m_dec, v_dec, unit, lr, lr_bias, beta1, beta2, root, eps,
        )  # fmt: skip


@kernel(
    "void(float32[::1], float32[::1], float32, float32[::1], float32[::1], float32, float32, float32, float32, float32)"
)
def update_vector(w, g, factor, m, v, lr, beta1, beta2, root, eps):
    """Adam's step of a vector."""
    _adam(w, g, factor, m, v, lr, beta1, beta2, root, eps)


@kernel("float64(float32[::1])")
def square_sum(vector):
    """The sum of the squares of a vector."""
    total = np.float64(0)
    for c in range(len(vector)):
        total += np.float64(vector[c]) * np.float64(vector[c])
    return total


@kernel(
    "float64(uint16[:,::1], uint16[:,::1], uint16[:,::1], float32[::1], float32[::1], float32, float32[:,::1],"
    " float32[:,::1], float32[:,::1], float32[:,::1], float32[::1])"
)
def widen_rows(enc16, dec16, more16, to_z, along, scale, W_enc, W_dec, to_W_enc, to_W_dec, through):
    """Some features' gradients of a dense step from products in bfloat16; returns the sum of their squares.

        to_W_enc = enc16;   to_W_dec[i] = scale * (dec16[i] + more16[i]) + along[i] W_dec[i] / |W_dec[i]|^2

    more16 may be empty. `through` becomes the sum of to_z[i] W_enc[i].
    """
    total = np.float64(0)
    through[:] = 0
    for i in range(len(to_z)):
        weight = along[i] / _square(W_dec[i]) if along[i] != 0 else np.float32(0)
        for c in range(len(through)):
            to_W_enc[i, c] = _wide(enc16[i, c])
            through[c] += to_z[i] * W_enc[i, c]
        for c in range(W_dec.shape[1]):
            to_W_dec[i, c] = scale * _wide(dec16[i, c]) + weight * W_dec[i, c]
        if len(more16):
            for c in range(W_dec.shape[1]):
                to_W_dec[i, c] += scale * _wide(more16[i, c])
        total += np.float64(_square(to_W_enc[i])) + np.float64(_square(to_W_dec[i]))
    return total
