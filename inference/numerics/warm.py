"""What is kept between jobs: models and SAEs, under one budget of bytes. No Django."""

import gc
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class TooLarge(ValueError):
    """Something that does not fit even alone; the message is one sentence that says what fits."""


@dataclass(frozen=True)
class Kept:
    key: Any
    name: str
    thing: Any
    n_bytes: int


class Warm:
    """The most recently used things that fit into `budget()` bytes together. One is loaded at a time, whoever asks.

    Room is made before something is loaded, by what it is expected to take, so that memory never holds both; afterwards
    by what it does take. Nothing that a running job holds is taken from it: it goes when that job lets go.
    """

    def __init__(self, budget: Callable[[], int]) -> None:
        self.budget = budget
        self._kept: OrderedDict[Hashable, Kept] = OrderedDict()
        self._lock = threading.RLock()

    def get(self, key: Hashable, load: Callable[[], T], *, name: str = "", expected: int = 0) -> T:
        """What is kept under `key`, or what `load` gives. Raises TooLarge before loading what cannot fit."""
        with self._lock:
            if key not in self._kept:
                if expected > self.budget():
                    raise TooLarge(
                        f"{name or 'This'} takes about {gigabytes(expected)}, and the live worker may keep "
                        f"{gigabytes(self.budget())} in memory."
                    )
                self._make_room(expected)
                thing = load()
                self._kept[key] = Kept(key, name, thing, size_of(thing))
                self._make_room(0, but=key)
            self._kept.move_to_end(key)
            return self._kept[key].thing

    def clear(self) -> None:
        """Let go of everything that no running job holds."""
        with self._lock:
            self._kept.clear()
        _give_back()

    def held(self) -> list[Kept]:
        """What is kept, least recently used first."""
        with self._lock:
            return list(self._kept.values())

    def _make_room(self, wanted: int, but: Hashable = None) -> None:
        gone = 0
        while self._kept and self._taken() + wanted > self.budget():
            oldest = next(iter(self._kept))
            if oldest == but:
                break
            del self._kept[oldest]
            gone += 1
        if gone:
            _give_back()

    def _taken(self) -> int:
        return sum(kept.n_bytes for kept in self._kept.values())


def _give_back() -> None:
    gc.collect()  # models hold cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def size_of(thing: Any) -> int:
    """Bytes of the tensors of a module, or of an LM's model; 0 for what holds none."""
    module = getattr(thing, "model", thing)
    if not isinstance(module, torch.nn.Module):
        return 0
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))


def gigabytes(n: int) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"
