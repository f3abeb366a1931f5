# mypy: allow-untyped-defs
"""The passes over (n, d_sae) matrices of the dense training steps, compiled by numba; see kernels.py, whose rules hold
here too. Matrices are bfloat16, as uint16, and
feature-major: (features, n), one feature's values of all rows of the batch side by side."""

import numpy as np

from training.numerics.kernels import _narrow, _wide, kernel


@kernel("void(uint16[:,::1], float32[::1], float32[::1], uint16[:,::1], int32[::1], int64[::1], float32[::1])")
def cut(z, bias, threshold, acts, counts, fired, sums):
    """acts = (z + bias) [z + bias > threshold] of some features' z (m, n): ReLU with threshold 0, or JumpReLU.

    counts (n,): how many of each row; fired, sums (m,): how many of each feature, and what they add up to.
    """
    m, n = z.shape
    counts[:] = 0
    for i in range(m):
        own, least = bias[i], threshold[i]
        hits = np.int32(0)
        total = np.float32(0)
        for b in range(n):
            f = _wide(z[i, b]) + own
            on = not f <= least
            f = f if on else np.float32(0)
            acts[i, b] = _narrow(f)
            counts[b] += np.int32(on)
            hits += np.int32(on)
            total += f
        fired[i] = hits
        sums[i] = total


@kernel(
    "void(uint16[:,::1], float32[::1], float32[::1], uint16[:,::1], float32, float32[::1], float32[::1], float32,"
    " float32[::1], float32[::1])"
)
def cut_backward(z, bias, threshold, grad, scale, slope, weight, eps, to_bias, to_threshold):
    """From grad = dL/dacts / scale (m, n) of some features to dL/dz in its place; the loss also holds slope_i f_bi, and
    weight_b for each feature that fires in row b.

        dz = (scale grad + slope) [z + bias > threshold];   to_bias = sum of dz over rows
        to_threshold = sum of -(threshold scale grad + weight) / eps where |z + bias - threshold| < eps / 2
    """
    m, n = z.shape
    for i in range(m):
        own, least, rise = bias[i], threshold[i], slope[i]
        near = np.float32(0)
        if eps > 0:
            for b in range(n):
                distance = abs(_wide(z[i, b]) + own - least)
                g = least * scale * _wide(grad[i, b]) + weight[b]
                near += g if distance < eps / np.float32(2) else np.float32(0)
            near /= -eps
        total = np.float32(0)
        for b in range(n):
            f = _wide(z[i, b]) + own
            dz = scale * _wide(grad[i, b]) + rise if f > least else np.float32(0)
            total += dz
            grad[i, b] = _narrow(dz)
        to_bias[i] = total
        to_threshold[i] = near


@kernel(
    "void(uint16[:,::1], float32[::1], float32[::1], float32[::1], uint16[:,::1], uint16[:,::1], int32[::1], int64[::1],"
    " float32[::1])"
)
def cut_gated(z, b_gate, grown, b_mag, acts, gate, counts, fired, sums):
    """gate = relu(z + b_gate) and acts = relu(z grown + b_mag) [gate > 0] of some features' z (m, n).

    grown (m,): exp(r_mag). counts (n,), fired (m,): how many acts are above 0; sums (m,): what gate adds up to.
    """
    m, n = z.shape
    counts[:] = 0
    for i in range(m):
        low, growth, high = b_gate[i], grown[i], b_mag[i]
        hits = np.int32(0)
        total = np.float32(0)
        for b in range(n):
            value = _wide(z[i, b])
            g = value + low
            on = not g <= 0
            g = g if on else np.float32(0)
            f = value * growth + high
            fires = on and not f <= 0
            acts[i, b] = _narrow(f if fires else np.float32(0))
            gate[i, b] = _narrow(g)
            counts[b] += np.int32(fires)
            hits += np.int32(fires)
            total += g
        fired[i] = hits
        sums[i] = total


@kernel(
    "void(uint16[:,::1], float32[::1], float32[::1], float32[::1], uint16[:,::1], uint16[:,::1], float32, float32[::1],"
    " float32[::1], float32[::1], float32[::1])"
)
def gated_backward(z, b_gate, grown, b_mag, to_acts, to_gate, scale, slope, to_b_gate, to_b_mag, to_r_mag):
    """From dL/dacts / scale and dL/dgate / scale (m, n) of some features to dL/dz, in place of the first; the loss also
    holds slope_i gate_bi. With a = scale to_acts [acts > 0] and g = (scale to_gate + slope) [gate > 0]:

        dz = a grown + g;   to_b_gate = sum of g;   to_b_mag = sum of a;   to_r_mag = sum of a z grown, over rows
    """
    m, n = z.shape
    for i in range(m):
        low, growth, high, rise = b_gate[i], grown[i], b_mag[i], slope[i]
        gates, acts, grows = np.float32(0), np.float32(0), np.float32(0)
        for b in range(n):
            value = _wide(z[i, b])
            on = value + low > 0
            large = value * growth
            g = scale * _wide(to_gate[i, b]) + rise if on else np.float32(0)
            a = scale * _wide(to_acts[i, b]) if on and large + high > 0 else np.float32(0)
            gates += g
            acts += a
            grows += a * large
            to_acts[i, b] = _narrow(a * growth + g)
        to_b_gate[i], to_b_mag[i], to_r_mag[i] = gates, acts, grows
