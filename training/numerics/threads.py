"""Our own threads, and the arrays they work in: what the steps on a CPU run on.

Each task is one of a small pool of threads in which torch itself uses one thread. Two OpenMP runtimes (torch's and
numba's) would take the cores from each other, and threads of OpenMP that wait by spinning would take them from ours.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier
from typing import Any

import torch
from torch import Tensor


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """A pool of threads in which torch uses one thread; one a process, because threads do not survive a fork."""
    ready = Barrier(threads + 1)

    def start() -> None:
        torch.get_num_threads()  # torch reads the process's number once a thread, and not again after this
        torch.set_num_threads(1)
        ready.wait()

    pool = ThreadPoolExecutor(threads, "sparse")
    for _ in range(threads):
        pool.submit(start)
    ready.wait()
    torch.set_num_threads(threads)  # the line above set the number of threads yet to come, too
    return pool


def warm_up() -> None:
    """Make the pool of threads now: several threads that first need it at once would make several."""
    _pool(os.getpid(), torch.get_num_threads())


def share(task: Callable[[int, int], Any], total: int, size: int) -> list[Any]:
    """[task(start, stop), ...] for the runs of `size` that make up `total`, side by side on as many threads as torch
    has; in order, whichever thread did them."""
    runs = [(start, min(start + size, total)) for start in range(0, total, size)]
    results: list[Any] = [None] * len(runs)
    waiting = iter(range(len(runs)))  # each thread takes the next one itself: a future a run costs more than some runs

    def work(_: int) -> None:
        for i in waiting:
            results[i] = task(*runs[i])

    threads = torch.get_num_threads()
    for _ in _pool(os.getpid(), threads).map(work, range(min(threads, len(runs)))):
        pass  # raises what a task raised
    return results


class Scratch:
    """Arrays that a step needs and the next step uses again, by name: allocating them anew costs a page fault a page."""

    def __init__(self) -> None:
        self.bound: float | None = None  # where to look for the next batch's codes first, see batchtopk_pairs
        self._arrays: dict[str, Tensor] = {}
        self._others: dict[str, Scratch] = {}

    def of(self, name: str) -> "Scratch":
        """Another one, for arrays of the same names in another part of the step."""
        return self._others.setdefault(name, Scratch())

    def __call__(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialised tensor; the one of the last step when it had the same shape."""
        found = self._arrays.get(name)
        if found is None or found.shape != shape or found.dtype != dtype:
            found = self._arrays[name] = torch.empty(shape, dtype=dtype)
        return found
