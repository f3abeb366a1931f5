"""A capture whose activations are not stored: its model computes them again, shard by shard, when they are asked for.

The tokens are on disk (12 bytes each), so contexts, the held-out split and the shuffled order are what they are for a
stored capture: whole shards in a shuffled order, and all rows of a window of eight of them (65,536 rows) shuffled
together. Training on it therefore resumes exactly (the window in which the next row lies is computed again), and with
float32 storage gives the same SAE to the bit as training on the same shards stored.

Mixing: a batch of B rows is drawn from a window of W = 65,536 without replacement, so a row's context fellows make up
about (t - 1) / W of it, whatever B is: 0.2 % for contexts of 128 tokens, and half of the batch if nothing were shuffled.
"""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saes.numerics.lm import LM, load_lm
from training.numerics.forward import outliers, precision, stored_rows
from training.numerics.shards import Capture, CaptureError, Hooks

SHARDS_KEPT = 16  # a window, and the shards that the next one begins with


class StreamedCapture(Capture):
    """A capture that computes what it is asked for. `lm`: the model; None loads the one that the manifest names.

    Rows whose norm is above the capture's limit are replaced by ordinary rows of the same shard, in turn: leaving them
    out would move every later row to another place, which only a pass over all of them could tell.
    """

    SHARDS_KEPT = SHARDS_KEPT

    def __init__(self, path: Path, manifest: dict[str, Any], lm: LM | None = None) -> None:
        super().__init__(path, manifest)
        self.dtype = torch.float32
        self._lm = lm
        self._asked: list[str] = []
        self._shard = functools.lru_cache(self.SHARDS_KEPT)(self._compute)

    @property
    def lm(self) -> LM:
        """The model, loaded at the first use. Raises LMError when it cannot be had."""
        if self._lm is None:
            facts = self.manifest["model"]
            self._lm = load_lm(facts["name"], revision=facts["revision"])
        return self._lm

    def _map(self, i: int, hook: str) -> Tensor:
        if hook not in self._asked:  # from now on one forward pass serves all that were ever asked for
            self._asked.append(hook)
        return self._shard(i, tuple(self._asked))[hook]

    def _compute(self, i: int, hooks: tuple[str, ...]) -> dict[str, Tensor]:
        facts = self.manifest
        ids, lengths = self.shard_contexts(i), self.shard_lengths(i)
        stored = np.zeros(ids.shape, dtype=bool)
        context, position = self._row_tokens(i)
        stored[context - self.shards[i]["first_context"], position] = True
        with precision(self.lm, hooks, facts["autocast"]):
            x = stored_rows(self.lm, ids, stored, hooks, lengths=lengths, batch_contexts=facts["batch_contexts"])
        if len(next(iter(x.values()))) != self._rows_of[i][0]:
            raise CaptureError(f"{self.shards[i]['file']} of the capture {self.path.name} does not fit its manifest.")
        return {hook: self._ordinary(hook, values).float().cpu() for hook, values in x.items()}

    def _check(self, hook: Hooks, split: str) -> None:
        super()._check(hook, split)
        if not isinstance(hook, str) and self.manifest["max_norm_ratio"]:
            raise CaptureError(
                f"The capture {self.path.name} is streamed and replaces outliers at each hook point by itself, so that its "
                "rows at two of them are not of the same tokens; store it, or set no limit on norms."
            )

    def _ordinary(self, hook: str, x: Tensor) -> Tensor:
        ratio = self.manifest["max_norm_ratio"]
        if not ratio:
            return x
        over = outliers({hook: x}, {hook: ratio * self.manifest["sample"]["median_norms"][hook]})
        bad, good = over.nonzero().flatten(), (~over).nonzero().flatten()
        if len(good):
            x = x.clone()
            x[bad] = x[good[torch.arange(len(bad), device=good.device) % len(good)]]
        return x
