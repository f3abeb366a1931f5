# mypy: allow-untyped-defs
"""The passes over (n, d_sae) matrices of the dense training steps, compiled by numba; see kernels.py, whose rules hold
here too. Matrices are bfloat16, as uint16."""

import numpy as np
from numba import njit

from training.numerics.kernels import _wide, kernel


@njit(inline="always")
def _narrow(x):
    """float32 -> bfloat16 as uint16, to the nearest, ties to even."""
    bits = np.float32(x).view(np.uint32)
    return np.uint16(np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@kernel("void(uint16[:,::1], float32[::1], float32[::1], uint16[:,::1], int64[::1], int64[::1], float32[::1])")
def cut(z, bias, threshold, acts, counts, fired, sums):
    """acts = (z + bias) [z + bias > threshold] of rows z (n, m), both bfloat16: ReLU with threshold 0, or JumpReLU.

    counts (n,): how many of each row; fired, sums (m,): how many of each feature, and what they add up to.
    """
    n, m = z.shape
    hits = np.zeros(m, np.int32)
    sums[:] = 0
    for b in range(n):
        count = np.int32(0)
        for i in range(m):
            f = _wide(z[b, i]) + bias[i]
            on = not f <= threshold[i]
            f = f if on else np.float32(0)
            acts[b, i] = _narrow(f)
            hits[i] += np.int32(on)
            count += np.int32(on)
            sums[i] += f
        counts[b] = count
    fired[:] = hits


@kernel(
    "void(uint16[:,::1], float32[::1], float32[::1], uint16[:,::1], float32, float32[::1], float32[::1], float32,"
    " float32[::1], float32[::1])"
)
def cut_backward(z, bias, threshold, grad, scale, slope, weight, eps, to_bias, to_threshold):
    """From grad = dL/dacts / scale (n, m), bfloat16, to dL/dz in its place; the loss also holds slope_i f_bi, and
    weight_b for each feature that fires in row b.

        dz = (scale grad + slope) [z + bias > threshold];   to_bias = sum of dz over rows
        to_threshold = sum of -(threshold scale grad + weight) / eps where |z + bias - threshold| < eps / 2
    """
    n, m = z.shape
    to_bias[:] = 0
    to_threshold[:] = 0
    for b in range(n):
        if eps > 0:
            for i in range(m):
                distance = abs(_wide(z[b, i]) + bias[i] - threshold[i])
                g = threshold[i] * scale * _wide(grad[b, i]) + weight[b]
                to_threshold[i] -= g / eps if distance < eps / np.float32(2) else np.float32(0)
        for i in range(m):
            f = _wide(z[b, i]) + bias[i]
            dz = scale * _wide(grad[b, i]) + slope[i] if f > threshold[i] else np.float32(0)
            to_bias[i] += dz
            grad[b, i] = _narrow(dz)


@kernel(
    "void(uint16[:,::1], float32[::1], float32[::1], float32[::1], uint16[:,::1], uint16[:,::1], int64[::1], int64[::1],"
    " float32[::1])"
)
def cut_gated(z, b_gate, grown, b_mag, acts, gate, counts, fired, sums):
    """gate = relu(z + b_gate) and acts = relu(z grown + b_mag) [gate > 0] of rows z (n, m), all bfloat16.

    grown (m,): exp(r_mag). counts (n,), fired (m,): how many acts are above 0; sums (m,): what gate adds up to.
    """
    n, m = z.shape
    hits = np.zeros(m, np.int32)
    sums[:] = 0
    for b in range(n):
        count = np.int32(0)
        for i in range(m):
            value = _wide(z[b, i])
            g = value + b_gate[i]
            on = not g <= 0
            g = g if on else np.float32(0)
            f = value * grown[i] + b_mag[i]
            fires = on and not f <= 0
            acts[b, i] = _narrow(f if fires else np.float32(0))
            gate[b, i] = _narrow(g)
            hits[i] += np.int32(fires)
            count += np.int32(fires)
            sums[i] += g
        counts[b] = count
    fired[:] = hits


@kernel(
    "void(uint16[:,::1], float32[::1], float32[::1], float32[::1], uint16[:,::1], uint16[:,::1], float32, float32[::1],"
    " float32[::1], float32[::1], float32[::1])"
)
def gated_backward(z, b_gate, grown, b_mag, to_acts, to_gate, scale, slope, to_b_gate, to_b_mag, to_r_mag):
    """From dL/dacts / scale and dL/dgate / scale (n, m) to dL/dz, in place of the first; the loss also holds slope_i
    gate_bi. With a = scale to_acts [acts > 0] and g = (scale to_gate + slope) [gate > 0]:

        dz = a grown + g;   to_b_gate = sum of g;   to_b_mag = sum of a;   to_r_mag = sum of a z grown, over rows
    """
    n, m = z.shape
    to_b_gate[:] = 0
    to_b_mag[:] = 0
    to_r_mag[:] = 0
    for b in range(n):
        for i in range(m):
            value = _wide(z[b, i])
            on = value + b_gate[i] > 0
            large = value * grown[i]
            g = scale * _wide(to_gate[b, i]) + slope[i] if on else np.float32(0)
            a = scale * _wide(to_acts[b, i]) if on and large + b_mag[i] > 0 else np.float32(0)
            to_b_gate[i] += g
            to_b_mag[i] += a
            to_r_mag[i] += a * large
            to_acts[b, i] = _narrow(a * grown[i] + g)
