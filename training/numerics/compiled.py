"""The compiled kernels where numba is installed, and how tensors are given to them.

They are imported when they are first asked for: numba takes a second, and there may be none.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor


@cache
def kernels() -> Any:
    """The compiled kernels, or None where numba is not installed."""
    try:
        from training.numerics import kernels
    except ImportError:
        return None
    return kernels


@cache
def dense_kernels() -> Any:
    """The compiled passes of the dense steps; only where `kernels` are."""
    from training.numerics import dense_kernels

    return dense_kernels


@cache
def topk_kernels() -> Any:
    """The compiled choice of TopK; only where `kernels` are."""
    from training.numerics import topk_kernels

    return topk_kernels


@cache
def update_kernels() -> Any:
    """The compiled sums of gradients and Adam's steps; only where `kernels` are."""
    from training.numerics import update_kernels

    return update_kernels


def arrays(*tensors: Tensor) -> list[Any]:
    """The tensors as the kernels take them: numpy arrays on the same memory."""
    return [tensor.numpy() for tensor in tensors]


def as_both(*tensors: Tensor) -> Iterator[Any]:
    """The tensors as bfloat16 arrays (uint16 to numpy), then as float32 ones; empty where they are not."""
    for dtype in (torch.bfloat16, torch.float32):
        for tensor in tensors:
            if tensor.dtype == dtype:
                yield (tensor.view(torch.uint16) if dtype == torch.bfloat16 else tensor).numpy()
            else:
                yield np.empty((0,) * tensor.ndim, np.uint16 if dtype == torch.bfloat16 else np.float32)
