"""The compiled kernels that an SAE's training step needs, loaded before its first one; says so where they have to be compiled."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from saes.numerics.sae import SAE
from saes.numerics.topk import BatchTopKSAE, TopKSAE
from training.numerics.compiled import dense_kernels, kernels, topk_kernels, update_kernels
from training.numerics.optim import matmul_precision
from training.numerics.sparse import products_are_rounded
from training.numerics.train_config import TrainConfig


def load_kernels(sae: SAE, config: TrainConfig, tell: Callable[[], None]) -> None:
    """Load them from the data folder, or compile them; `tell` is called once, before the first that is compiled.

    Other devices, and machines without numba, need none.
    """
    if sae.W_dec.device.type != "cpu":
        return
    with tells_of_compiling(tell), matmul_precision(config.precision):
        if kernels() is None:
            return
        update_kernels()
        if isinstance(sae, TopKSAE | BatchTopKSAE):
            topk_kernels()
        elif products_are_rounded():
            dense_kernels()


@contextmanager
def tells_of_compiling(tell: Callable[[], None]) -> Iterator[None]:
    """Calls `tell` within it when numba compiles what no cache holds, the first time only."""
    try:
        from numba.core import event
    except ImportError:
        yield
        return

    class Listener(event.Listener):  # type: ignore[misc]
        told = False

        def on_start(self, _: Any) -> None:
            if not self.told:
                self.told = True
                tell()

        def on_end(self, _: Any) -> None:
            pass

    with event.install_listener("numba:compile", Listener()):
        yield
