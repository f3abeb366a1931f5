"""Sparse autoencoders once more in plain numpy, from the formats' descriptions; and random files to hold them against."""

from typing import Any

import numpy as np
import torch

from saes.numerics.sae import SAE

Arrays = dict[str, np.ndarray]


def arrays(seed: int, **shapes: tuple[int, ...]) -> Arrays:
    """Random float32 arrays; biases and thresholds small, thresholds above 0."""
    rng = np.random.default_rng(seed)
    made = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for name in made:
        if "threshold" in name:
            made[name] = np.abs(made[name]) * np.float32(0.5) + np.float32(0.05)
        elif name.lower().startswith("b"):
            made[name] *= np.float32(0.2)
    return made


def inputs(d: int, rows: int = 32, seed: int = 99) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, d)).astype(np.float32)


def relu(z: np.ndarray) -> np.ndarray:
    return np.maximum(z, 0)


def jumprelu(z: np.ndarray, threshold: Any) -> np.ndarray:
    return relu(z) * (z > threshold)


def topk(z: np.ndarray, k: int, by: np.ndarray | None = None) -> np.ndarray:
    """relu(z) where `by` (z itself) is among the k largest of its row."""
    by = z if by is None else by
    kept = np.zeros_like(z)
    for row in np.ndindex(z.shape[:-1]):
        best = np.argsort(-by[row], kind="stable")[:k]
        kept[row][best] = relu(z[row][best])
    return kept


def norms(W: np.ndarray) -> np.ndarray:
    return np.linalg.norm(W, axis=-1)


def tensors(made: Arrays, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array).to(dtype).contiguous() for name, array in made.items()}


def rounded(made: Arrays, dtype: torch.dtype) -> Arrays:
    """What is left of the arrays once stored as `dtype`."""
    return {name: torch.from_numpy(array).to(dtype).float().numpy() for name, array in made.items()}


def assert_gives(sae: SAE, x: np.ndarray, acts: np.ndarray, x_hat: np.ndarray) -> None:
    """encode and forward, the active features exactly."""
    with torch.no_grad():
        ours, back = sae.encode(torch.from_numpy(x)).numpy(), sae(torch.from_numpy(x)).numpy()
    assert (acts != 0).any() and (acts == 0).any(), "a case that can tell something"
    np.testing.assert_array_equal(ours != 0, acts != 0)
    np.testing.assert_allclose(ours, acts, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(back, x_hat, rtol=1e-4, atol=5e-5)
