"""All codes above 0 of many rows, fast: the same numbers as `SAE.encode`, without its dense matrix where that is possible.

TopK, ReLU and JumpReLU on a CPU with bfloat16 instructions: rows x = (x', 1) / s of length 1 (x' the encoder's input) and
w = (W_enc[:, j], b_enc[j]) are rounded, x = x~ + dx and w = w~ + dw, and their product, which takes a fraction of the time,
gives upper bounds of z_j / s,

  x.w_j <= x~.w~_j + |dx| |w_j| + |x~| |dw_j|   (and 2^-8 of the product, which is rounded too).

Only columns that their bounds do not rule out are computed again in float32: those that may lie above their threshold, or
above the k-th largest of the values of the largest bounds. So the choice and the values are those of float32.
"""

from threading import get_ident
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saes.numerics.jumprelu import JumpReLUSAE
from saes.numerics.sae import SAE, encodes_as
from saes.numerics.standard import StandardSAE
from saes.numerics.topk import TopKSAE
from training.numerics.compiled import arrays, as_both, kernels
from training.numerics.threads import Scratch, share
from training.numerics.topk_plain import topk_codes

CHUNK_ROWS = 4096  # rows encoded at once, at most
CHUNK_NUMBERS = 2**21  # codes made at once by an SAE that makes them all
RUN_ROWS = 256  # whose bounds stay near a core between the product and the loop that reads them
PROBE_ROWS = 64
DENSE = 1 / 5  # of all codes; where bounds leave more open, making them all is faster

Fires = tuple[np.ndarray, np.ndarray, np.ndarray]  # row, feature, value


class SparseEncoder:
    """(row, feature, value) of every code above 0, and of NaN, of rows x (m, d_in); in the order of the rows.

    `rows` is how many it takes at once. `dense`: whether all codes are made and then looked at, because many fire or the
    architecture is not one of those above. ReLU and JumpReLU decide it (None before) by the first rows they see; who goes
    on where another encoder stopped sets it to the same, since the two ways round differently.
    """

    def __init__(self, sae: SAE) -> None:
        self.sae = sae
        self.k = int(sae.config.k) if _is_topk(sae) else 0
        threshold = None if self.k else _threshold(sae)
        chosen = (self.k or threshold is not None) and sae.W_enc.device.type == "cpu"
        self._kernels: Any = _kernels() if chosen and sae.W_enc.dtype == torch.float32 else None
        if self._kernels is not None and not self._prepare():
            self._kernels = None
        self.dense = None if self._kernels is not None and not self.k else not self.k
        few = min(max(64, CHUNK_NUMBERS // sae.config.d_sae), CHUNK_ROWS)
        self.rows = few if self.dense else CHUNK_ROWS
        self._threshold = torch.empty(0) if threshold is None else threshold

    def _prepare(self) -> bool:
        """Copies of the encoder: rows (d_sae, d_in) in float32, and in bfloat16 where the processor multiplies those.

        Whether its numbers are finite, without which there are no bounds.
        """
        self._factors = self.sae.W_enc.detach().contiguous()
        self._bias = self.sae.b_enc.detach().contiguous()
        self._half = bool(torch.cpu.get_capabilities().get("avx512_bf16"))
        self._scratch = Scratch()
        if not self._half:
            self._weights = self._factors.t().contiguous()
            return bool(self._factors.isfinite().all())
        d_in, d_sae = self._factors.shape
        weights, given = torch.empty(d_sae, d_in), arrays(self._factors, self._bias)
        factors, lengths, lost = torch.empty(d_in + 1, d_sae, dtype=torch.bfloat16), *torch.empty(2, d_sae)
        made = arrays(factors.view(torch.uint16), weights, lengths, lost)
        share(lambda i, j: self._kernels.round_encoder(*given, i, j, *made), d_sae, RUN_ROWS)
        self._factors, self._weights, self._lengths, self._lost = factors, weights, lengths, lost
        return bool(lengths.isfinite().all())

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> Fires:
        if self.dense is None:
            self.dense = self._leaves_many_open(self._inputs(x[:PROBE_ROWS]))
        if self.dense:
            return self._densely(x)
        return self._plainly(self._inputs(x)) if self._kernels is None else self._quickly(x)

    def _inputs(self, x: Tensor) -> Tensor:
        return self.sae.encoder_input(x).contiguous()

    def _densely(self, x: Tensor) -> Fires:
        d_sae, found, first = self.sae.config.d_sae, [], 0
        for part in x.split(max(1, CHUNK_NUMBERS // d_sae)):
            value = self.sae.encode(part).float().cpu().numpy().reshape(-1)
            at = np.flatnonzero(~(value <= 0))
            found.append((first + at // d_sae, at % d_sae, value[at]))
            first += len(part)
        row, feature, values = (np.concatenate(part) for part in zip(*found, strict=True))
        return row, feature, values

    def _plainly(self, inputs: Tensor) -> Fires:
        values, indices = topk_codes(inputs, self.sae.W_enc, self.sae.b_enc, self.k)
        value = values.relu().float().cpu().numpy().reshape(-1)
        at = np.flatnonzero(~(value <= 0))
        return at // self.k, indices.cpu().numpy().reshape(-1)[at], value[at]

    def _quickly(self, x: Tensor) -> Fires:
        d_sae = self.sae.config.d_sae
        room = RUN_ROWS * (self.k or d_sae)  # virtual memory: only what is used is ever touched

        @torch.inference_mode()  # which holds for one thread alone
        def task(first: int, last: int) -> Fires:
            rows = self._inputs(x[first:last])
            factors, slack, scale = self._bounding(rows)
            place = f"{get_ident()}"
            z = self._scratch(f"z {place}", RUN_ROWS, d_sae, dtype=factors.dtype)[: len(rows)]
            torch.mm(factors, self._factors, out=z)
            given = *as_both(z), not self._half, *arrays(slack, rows, self._weights, self._bias, scale)
            counts = np.empty(len(rows), np.int64)
            cols = self._scratch(f"cols {place}", room, dtype=torch.int32).numpy()
            values = self._scratch(f"values {place}", room).numpy()
            if self.k:
                n = self._kernels.encode_topk(*given, self.k, counts, cols, values)
            else:
                n = self._kernels.encode_above(*given, self._threshold.numpy(), counts, cols, values)
            return counts, cols[:n].copy(), values[:n].copy()

        found = share(task, len(x), RUN_ROWS)
        counts, cols, values = (np.concatenate(part) for part in zip(*found, strict=True))
        return np.repeat(np.arange(len(x)), counts), cols, values

    def _bounding(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What to multiply with `_factors`, what is added to the products to bound those of all rows, and the units."""
        if not self._half:
            return rows, self._bias, torch.ones(len(rows))
        rounded = torch.empty(len(rows), rows.shape[1] + 1, dtype=torch.bfloat16)
        scale, largest = torch.empty(len(rows)), torch.empty(2)
        self._kernels.scale_rows(*arrays(rows, rounded.view(torch.uint16), scale, largest))
        return rounded, self._lengths * largest[0] + self._lost * largest[1], scale

    def _leaves_many_open(self, rows: Tensor) -> bool:
        factors, slack, scale = self._bounding(rows)
        bounds = ((factors @ self._factors).float() + slack) * scale[:, None]
        return bool((bounds > self._threshold).float().mean() > DENSE)


def _is_topk(sae: SAE) -> bool:
    return encodes_as(sae, TopKSAE) and type(sae).chosen is TopKSAE.chosen and not sae.by_norm  # type: ignore[attr-defined]


def _threshold(sae: SAE) -> Tensor | None:
    """(d_sae,): what a pre-activation must be above to fire as it is; None for an SAE of another kind."""
    if encodes_as(sae, StandardSAE):
        return torch.zeros(sae.config.d_sae)
    return sae.tensor("threshold").detach().clamp_min(0).contiguous() if encodes_as(sae, JumpReLUSAE) else None


def _kernels() -> Any:
    """The compiled loops, or None where numba is not installed."""
    if kernels() is None:
        return None
    from concepts.numerics import kernels as loops

    return loops
