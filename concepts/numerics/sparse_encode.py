"""All codes above 0 of many rows, fast: the same numbers as `SAE.encode`, without its dense matrix where that is possible.

TopK on a CPU with bfloat16 instructions: rows x = (centred, 1) / s of length 1 and w = (W_enc[:, j], b_enc[j]) are rounded,
x = x' + dx and w = w' + dw, and their product, which takes a fraction of the time, gives upper bounds of z_j / s,

  x.w_j <= x'.w'_j + |dx| |w_j| + |x'| |dw_j|   (and 2^-8 of the product, which is rounded too).

The columns of the largest bounds are computed again in float32, by falling bound, until the k-th largest value found lies
above the next bound: no other column can then belong to the k largest. The few rows of which WIDER k columns do not
say so begin anew with more. So the choice and the values are those of float32.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from saes.numerics.sae import SAE
from saes.numerics.topk import TopKSAE
from training.numerics import sparse
from training.numerics.losses import topk_codes

CHUNK_ROWS = 4096  # rows encoded at once, at most
CHUNK_NUMBERS = 2**21  # codes made at once by an SAE that makes them all
WIDER = 3  # candidates of a row / k, at first
TILE = 64  # numbers in a row of the products in bfloat16, a multiple of this

Fires = tuple[np.ndarray, np.ndarray, np.ndarray]  # row, feature, value


class SparseEncoder:
    """(row, feature, value) of every code above 0, and of NaN, of rows x (m, d_in); in no order within a row.

    `rows` is how many it takes at once. `unsure` counts the rows that had to be encoded twice.
    """

    def __init__(self, sae: SAE) -> None:
        self.sae = sae
        self.unsure = 0
        topk = type(sae) is TopKSAE
        self.k = int(sae.config.k or 0) if topk else 0
        self.rows = CHUNK_ROWS if topk else min(max(64, CHUNK_NUMBERS // sae.config.d_sae), CHUNK_ROWS)
        self._compiled: Any = (
            _kernels() if topk and sae.W_enc.device.type == "cpu" and sae.W_enc.dtype == torch.float32 else None
        )
        if self._compiled is not None:
            self._prepare()

    def _prepare(self) -> None:
        """Copies of the encoder: rows (d_sae, d_in) in float32, and in bfloat16 where the processor multiplies those."""
        d_sae = self.sae.config.d_sae
        self._weights = self.sae.W_enc.detach().t().contiguous()
        self._bias = self.sae.b_enc.detach().contiguous()
        self._half = bool(torch.cpu.get_capabilities().get("avx512_bf16")) and d_sae >= 8 * self.k
        self._wide = WIDER * self.k if self._half else self.k
        self._factors = self._weights
        if self._half:
            whole = self._padded(self._weights, self._bias)
            self._factors = whole.to(torch.bfloat16)
            self._lengths = whole.norm(dim=1)
            self._lost = (whole - self._factors.float()).norm(dim=1)
        self._scratch = sparse.Scratch()

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> Fires:
        if type(self.sae) is not TopKSAE:
            value = self.sae.encode(x).float().cpu().numpy().reshape(-1)
            at = np.flatnonzero(~(value <= 0))
            return at // self.sae.config.d_sae, at % self.sae.config.d_sae, value[at]
        centred = self.sae.normalise(x)
        centred = centred - self.sae.b_dec if self.sae.config.apply_b_dec_to_input else centred
        if self._compiled is None:
            return self._plainly(centred)
        return self._quickly(centred.float().contiguous(), self._wide)

    def _plainly(self, centred: Tensor) -> Fires:
        k = self.k
        values, indices = topk_codes(centred, self.sae.W_enc, self.sae.b_enc, k)
        value = values.relu().float().cpu().numpy().reshape(-1)
        at = np.flatnonzero(~(value <= 0))
        return at // k, indices.cpu().numpy().reshape(-1)[at], value[at]

    def _quickly(self, centred: Tensor, wide: int) -> Fires:
        n = len(centred)
        counts, cols = np.empty(n, np.int64), np.empty(n * wide, np.int32)
        values, sure = np.empty(n * wide, np.float32), np.ones(n, bool)

        def task(first: int, last: int) -> None:
            rows, slots = centred[first:last], slice(first * wide, last * wide)
            inputs, bias, scale = self._bounding(rows) if self._half else (rows, self._bias, rows)
            out = self._scratch(f"z {sparse.get_ident()}", sparse.CHUNK_ROWS, self.sae.config.d_sae, dtype=inputs.dtype)
            z = torch.mm(inputs, self._factors.t(), out=out[: last - first])
            found = counts[first:last], cols[slots], values[slots]
            sparse.kernels().choose_topk(*sparse._as_both(z), not self._half, bias.numpy(), wide, True, *found)
            if self._half:
                self._compiled.settle(
                    rows.numpy(), self._weights.numpy(), self._bias.numpy(), scale.numpy(), self.k, wide, *found,
                    sure[first:last],
                )  # fmt: skip

        sparse.share(task, n, sparse.CHUNK_ROWS)
        row = np.repeat(np.arange(n), counts)
        at = row * wide + _ranks(counts)
        return self._with_unsure(centred, (row, cols[at], values[at]), sure, wide)

    @staticmethod
    def _padded(rows: Tensor, last: Tensor) -> Tensor:
        """(rows, last, zeros), as wide as the processor's tiles like it."""
        n, d = rows.shape
        whole = rows.new_zeros(n, -(-(d + 1) // TILE) * TILE)
        whole[:, :d], whole[:, d] = rows, last
        return whole

    def _bounding(self, centred: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rounded rows of length 1, what is added to their products to bound those of all of them, and their lengths."""
        whole = self._padded(centred, torch.ones(len(centred)))
        scale = whole.norm(dim=1)
        whole /= scale[:, None]
        rounded = whole.to(torch.bfloat16)
        lost = (whole - rounded.float()).norm(dim=1).max()
        return rounded, self._lengths * lost + self._lost * rounded.float().norm(dim=1).max(), scale

    def _wholly(self, centred: Tensor) -> Fires:
        """Chosen by a float32 product, and valued by the loop that values all others: no number depends on the chunks."""
        n, k = len(centred), self.k
        _, cols = topk_codes(centred, self.sae.W_enc, self.sae.b_enc, k)
        columns, values = cols.to(torch.int32).numpy().reshape(-1), np.full(n * k, np.inf, np.float32)
        counts, sure = np.full(n, k), np.empty(n, bool)
        self._compiled.settle(
            centred.numpy(), self._weights.numpy(), self._bias.numpy(), np.ones(n, np.float32), k, k, counts, columns, values,
            sure,
        )  # fmt: skip
        row = np.repeat(np.arange(n), counts)
        at = row * k + _ranks(counts)
        return row, columns[at], values[at]

    def _with_unsure(self, centred: Tensor, found: Fires, sure: np.ndarray, wide: int) -> Fires:
        """What was found, with the rows that are not sure encoded again: from more candidates, in the end from all."""
        if sure.all():
            return found
        again = np.flatnonzero(~sure)
        self.unsure += len(again)
        few, more = centred[torch.from_numpy(again)], 8 * wide
        row, feature, value = self._quickly(few, more) if 2 * more < self.sae.config.d_sae else self._wholly(few)
        kept = sure[found[0]]
        parts = (again[row], feature.astype(np.int32), value)
        row, feature, value = (np.concatenate([old[kept], new]) for old, new in zip(found, parts, strict=True))
        order = np.argsort(row, kind="stable")
        return row[order], feature[order], value[order]


def _ranks(counts: np.ndarray) -> np.ndarray:
    """0, 1, ... within each of the groups of these sizes."""
    ends = counts.cumsum()
    return np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - counts, counts)


def _kernels() -> Any:
    """The compiled loops, or None where numba is not installed."""
    if sparse.kernels() is None:
        return None
    from concepts.numerics import kernels

    return kernels
