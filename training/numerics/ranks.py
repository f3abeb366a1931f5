"""Several processes that train one SAE: each computes on its share of every batch, and gradients are summed.

Every rank reads the same batches and holds the same weights; what differs is which rows it computes on. Whatever is not
a sum over rows (BatchTopK's choice, the dead features' term) is settled over the whole batch, so that N ranks take the
step that one process would take, up to the order of sums. The processes are those of torch.distributed: NCCL between
GPUs, gloo between CPU processes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch import distributed as dist

if TYPE_CHECKING:
    from training.numerics.losses import Outcome

PATIENCE = timedelta(minutes=30)  # how long a rank waits for the others; one that ends is noticed at once


class Ranks:
    """One rank among `size`. With a size of 1, which needs no torch.distributed, every method gives back what it got.

    `rows` is how many rows the batch has in which this rank's share is being computed; 0 before the first.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.size = rank, size
        self.device = device or torch.device("cpu")
        self.rows = 0
        self.weight = 1.0

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and reports."""
        return self.rank == 0

    @property
    def copied(self) -> bool:
        """Whether the batch has fewer rows than there are ranks, so that all of them compute the whole of it."""
        return self.rows < self.size

    def total(self, n: int) -> int:
        """How many rows the batch has of which n are this rank's."""
        return n if self.size == 1 else self.rows

    def share(self, x: Tensor) -> Tensor:
        """This rank's rows of a batch (n, ...)."""
        self.rows, self.weight = len(x), 1 / self.size
        if self.size == 1 or self.copied:
            return x
        bounds = [len(x) * rank // self.size for rank in (self.rank, self.rank + 1)]
        self.weight = (bounds[1] - bounds[0]) / len(x)
        return x[bounds[0] : bounds[1]]

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the batch's rows of a scalar that is a mean over this rank's share of them."""
        return value if self.size == 1 else self._sum(value.detach() * self.weight)

    def keep(self, values: Tensor, k: int) -> int:
        """How many of the k largest of all ranks' values (m,) are this rank's: its own largest so many."""
        if self.size == 1 or self.copied:
            return min(k, len(values))
        own = values.new_full((k,), -math.inf)
        largest = values.topk(min(k, len(values)), sorted=False).values
        own[: len(largest)] = largest
        everyone = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(everyone, own)
        chosen = torch.cat(everyone).topk(k, sorted=False)
        mine = (chosen.indices // k == self.rank) & (chosen.values > -math.inf)
        return int(mine.sum())

    def sum(self, outcome: Outcome) -> Outcome:
        """The whole batch's Outcome from that of this rank's share: gradients and loss are means over its rows."""
        if self.size == 1:
            return outcome
        grads = {name: outcome.grads[name] for name in sorted(outcome.grads)}
        large = {name: self._sum(grad * self.weight) for name, grad in grads.items() if grad.ndim > 1}
        names = sorted(outcome.parts)
        numbers = [*(outcome.parts[name] for name in names), outcome.squared_error]
        least = [0.0] * self.size
        least[self.rank] = math.inf if outcome.least is None else outcome.least
        device = outcome.fired.device
        small = {
            **{name: grad * self.weight for name, grad in grads.items() if name not in large},
            "numbers": torch.tensor(numbers, dtype=torch.float64, device=device) * self.weight,
            "least": torch.tensor(least, dtype=torch.float64, device=device),
            "fired": outcome.fired,
        }
        added = self._sum_together(small)
        parts = dict(zip(names, added["numbers"].tolist(), strict=False))
        smallest = float(added["least"].min())
        return replace(
            outcome,
            grads={name: large[name] if name in large else added[name].to(grad.dtype) for name, grad in grads.items()},
            parts=parts,
            fired=outcome.fired if self.copied else added["fired"].to(torch.int64),
            squared_error=float(added["numbers"][-1]),
            least=None if math.isinf(smallest) else smallest,
        )

    def _sum_together(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sums of several small vectors in one go, which costs one wait: in float64."""
        sizes = [len(tensor) for tensor in tensors.values()]
        flat = self._sum(torch.cat([tensor.double() for tensor in tensors.values()]))
        return dict(zip(tensors, flat.split(sizes), strict=True))

    def told(self, flag: bool) -> bool:
        """What the first rank says; the others' own answer does not count."""
        if self.size == 1:
            return flag
        word = torch.tensor([int(flag)], device=self.device)
        dist.broadcast(word, 0)
        return bool(word.item())

    def equal(self, tensors: Mapping[str, Tensor]) -> None:
        """Give every rank the first one's tensors, in place."""
        if self.size > 1:
            for name in sorted(tensors):
                dist.broadcast(tensors[name], 0)

    def _sum(self, tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        dist.all_reduce(tensor)
        return tensor


ALONE = Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """Within this block, this process is one of those that torchrun started (see its environment variables): each on a
    GPU of its own where there are enough of them, else all on the CPU."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu")
    if torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", size)):
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device.type == "cpu" else "nccl", timeout=PATIENCE)
    try:
        yield Ranks(rank, size, device)
    finally:
        dist.destroy_process_group()
