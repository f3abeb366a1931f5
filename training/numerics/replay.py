"""Several passes over the same contexts that differ only from some block on: the blocks before it are computed once."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from saes.numerics.hooks import FAMILIES, HookPoint, decoder_blocks
from saes.numerics.lm import LM


class Prefix:
    """The blocks of a model before the first of some hook points: no change made there reaches them.

    Of models of FAMILIES only, whose blocks hand on nothing but their output; of others it holds no block, and every
    pass is whole. While replaying the blocks' own `forward` is covered, so the model belongs to the caller alone.
    """

    def __init__(self, lm: LM, hook_names: Sequence[str]) -> None:
        self.lm = lm
        self._path, blocks = decoder_blocks(lm.model)
        known = lm.model.config.model_type in FAMILIES
        n = min(_blocks_before(lm.resolve(name), self._path) for name in hook_names) if known else 0
        self.blocks: list[nn.Module] = list(blocks[:n])
        self._output: Any = None

    def ends_at(self, hook_name: str) -> bool:
        """Whether a hook point is the residual stream between the last of these blocks and what follows."""
        point, n = self.lm.resolve(hook_name), len(self.blocks)
        ends = {(f"{self._path}.{n - 1}", "out"), (f"{self._path}.{n}", "in")}
        return n > 0 and (point.module, point.side) in ends

    @property
    def hidden(self) -> Tensor:
        """The residual stream (b, t, d) that the recorded pass had there."""
        found: Tensor = self._output[0] if isinstance(self._output, tuple) else self._output
        return found

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
    def replayed(self, rows: Sequence[int] | None = None) -> Iterator[None]:
        """A pass within this block, over the contexts of the one recorded or some of them, begins after the prefix."""
        output = self._output
        if self.blocks and rows is not None:
            hidden = self.hidden[list(rows)]
            output = (hidden, *output[1:]) if isinstance(output, tuple) else hidden
        for block in self.blocks:  # those before the last may give anything: it looks at nothing
            block.forward = lambda *args, **kwargs: output
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
