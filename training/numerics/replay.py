"""Several passes over the same contexts that differ only from some block on: the blocks before it are computed once."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from saes.numerics.hooks import FAMILIES, HookPoint, decoder_blocks
from saes.numerics.lm import LM


class Prefix:
    """The blocks of a model before the first of some hook points: no change made there reaches them.

    Of models of FAMILIES only, whose blocks hand on nothing but their output; of others it holds no block, and every
    pass is whole. While replaying the blocks' own `forward` is covered, so the model belongs to the caller alone.
    """

    def __init__(self, lm: LM, hook_names: Sequence[str]) -> None:
        path, blocks = decoder_blocks(lm.model)
        known = lm.model.config.model_type in FAMILIES
        n = min(_blocks_before(lm.resolve(name), path) for name in hook_names) if known else 0
        self.blocks: list[nn.Module] = list(blocks[:n])
        self._output: Any = None

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """A whole pass within this block is the one that others begin from."""
        if not self.blocks:
            yield
            return

        def record(block: nn.Module, args: Any, output: Any) -> None:
            self._output = output

        handle = self.blocks[-1].register_forward_hook(record)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """A pass within this block, over the contexts of the one recorded, begins after the prefix."""
        for block in self.blocks:  # those before the last may give anything: it looks at nothing
            block.forward = lambda *args, **kwargs: self._output
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward


def _blocks_before(point: HookPoint, path: str) -> int:
    """How many blocks are done when a hook point is reached; a block's output is changed after it is done."""
    if point.layer is None:
        return 0
    return point.layer + ((point.module, point.side) == (f"{path}.{point.layer}", "out"))
