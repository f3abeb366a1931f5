"""The sparse training step on a CPU: torch for the products, numba for the rest.

A batch goes through in runs of rows, its features in runs of features; each run is one task of our own threads (threads.py).
"""

from dataclasses import dataclass
from threading import get_ident
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saes.numerics.sae import SAE
from saes.numerics.topk import ByNorm
from saes.numerics.transcoders import Skip
from training.numerics.compiled import arrays, as_both, kernels, topk_kernels
from training.numerics.ranks import ALONE, Ranks
from training.numerics.threads import Scratch, share
from training.numerics.transcoding import codes_goal, sides

CHUNK_ROWS = 256  # whose pre-activations stay in a core's second cache between the product and the choice
TOPK_ROWS = 512
CHUNK_FEATURES = 256
SKIP_ROWS = 128  # of W_skip
BELOW = 0.95  # of the last batch's smallest code: few batches end below it
ROOM = 4  # times the mean number of codes of a run of rows


def bias_of(sae: SAE) -> str:
    """The name of the bias that decides with W_enc whether a feature fires."""
    return "b_gate" if sae.config.architecture == "gated" else "b_enc"


def chosen_by_norm(sae: SAE) -> bool:
    """Whether its features are chosen by z |W_dec row| now, see topk.ByNorm."""
    return isinstance(sae, ByNorm) and sae.by_norm


def products_are_rounded() -> bool:
    """Whether float32 products are computed from inputs rounded to bfloat16 now, see optim.matmul_precision."""
    return bool(torch.backends.mkldnn.matmul.fp32_precision == "bf16")  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Pairs:
    """The codes of a batch, row by row: those of row b in slots starts[b] ... starts[b] + counts[b] of cols (int32, the
    features) and values (float32, above 0)."""

    starts: Tensor
    counts: Tensor
    cols: Tensor
    values: Tensor
    least: float | None = None  # the smallest value, where it is known


class Encoder:
    """z = centred @ W_enc in runs of rows: from bfloat16 copies of both when `fast`, else in float32.

    centred (n, d): x - b_dec or x itself, in that dtype. b_enc is left to the kernels. Where features are chosen by
    z |W_dec row| (see topk.ByNorm), z and the bias are those products, and `norms` the factors; else `norms` is None.
    """

    def __init__(self, sae: SAE, x: Tensor, fast: bool, scratch: Scratch) -> None:
        n, (d, d_sae) = len(x), sae.W_enc.shape
        self.fast, self.d_sae = fast, d_sae
        self.dtype = torch.bfloat16 if fast else torch.float32
        self.norms = torch.empty(d_sae) if chosen_by_norm(sae) else None
        self.centred = scratch("centred", n, d, dtype=self.dtype)
        self._x, self._b_dec = x, sae.b_dec.detach() if sae.config.apply_b_dec_to_input else None
        self._weights = rows = sae.W_enc.detach().t()
        if fast or self.norms is not None:
            self._weights = scratch("W_enc", d_sae, d, dtype=self.dtype)
            share(lambda i, j: self._copy(rows, sae.W_dec.detach(), i, j), d_sae, CHUNK_FEATURES)
        bias = sae.tensor(bias_of(sae)).detach()
        self.bias = (bias if self.norms is None else bias * self.norms).numpy()

    def _copy(self, rows: Tensor, W_dec: Tensor, first: int, last: int) -> None:
        run = slice(first, last)
        if self.norms is None:
            self._weights[run].copy_(rows[run])
        else:
            torch.linalg.vector_norm(W_dec[run], dim=-1, out=self.norms[run])
            torch.mul(rows[run], self.norms[run, None], out=self._weights[run])

    def __call__(self, first: int, last: int, out: Tensor) -> tuple[Any, ...]:
        """Rows first ... last into `out`; returns it the way the kernels take it: (bfloat16, float32, exact, b_enc)."""
        return self.as_arguments(torch.mm(self._rows(first, last), self._weights.t(), out=out))

    def by_feature(self, first: int, last: int, out: Tensor) -> tuple[Any, ...]:
        """The same feature-major, into `out` (d_sae, last - first)."""
        return self.as_arguments(torch.mm(self._weights, self._rows(first, last).t(), out=out))

    def _rows(self, first: int, last: int) -> Tensor:
        centred, x = self.centred[first:last], self._x[first:last]
        return centred.copy_(x) if self._b_dec is None else torch.sub(x, self._b_dec, out=centred)

    def as_arguments(self, z: Tensor) -> tuple[Any, ...]:
        return (*as_both(z), not self.fast, self.bias)


def choose(sae: SAE, encoder: Encoder, n: int, scratch: Scratch, ranks: Ranks = ALONE, positive: bool = True) -> Pairs:
    """The codes of n rows of a TopK or BatchTopK SAE; for the latter, of n rows of the batch that `ranks` share.

    `least` is in the units that they are chosen in. Without `positive`, TopK's before the relu.
    """
    if type(sae).row_by_row:
        pairs = topk_pairs(encoder, n, int(sae.config.k), scratch, positive)
    else:
        k = int(sae.config.k * ranks.total(n))
        pairs = batchtopk_pairs(encoder, n, min(k, n * encoder.d_sae), scratch)
        pairs = pairs if ranks.size == 1 else _of_all(pairs, k, ranks)
    if encoder.norms is not None:
        _unweigh(pairs, encoder.norms)
    return pairs


def _unweigh(pairs: Pairs, norms: Tensor) -> None:
    def task(first: int, last: int) -> None:
        rows = slice(first, last)
        kernels().unweigh(*arrays(pairs.starts[rows], pairs.counts[rows], pairs.cols, pairs.values, norms))

    share(task, len(pairs.starts), CHUNK_ROWS)


def _of_all(pairs: Pairs, k: int, ranks: Ranks) -> Pairs:
    """Those of this rank's pairs that are among the k largest of all ranks'."""
    total = int(pairs.counts.sum())
    cols, values = pairs.cols[:total], pairs.values[:total]
    kept = ranks.keep(values, k)
    if kept == total:
        return pairs
    if not kept:
        return Pairs(torch.zeros_like(pairs.starts), torch.zeros_like(pairs.counts), cols, values)
    least = kernels().keep_largest(*arrays(pairs.starts, pairs.counts, cols, values), kept)
    return Pairs(pairs.starts, pairs.counts, cols, values, float(least))


def topk_pairs(encoder: Encoder, n: int, k: int, scratch: Scratch, positive: bool = True) -> Pairs:
    """The codes of TopK: the k largest of each row, with `positive` their relu."""
    starts = torch.arange(0, n * k, k)
    counts = scratch("counts", n, dtype=torch.int64)
    cols, values = scratch("cols", n * k, dtype=torch.int32), scratch("values", n * k)
    groups, room = topk_kernels().sizes(encoder.d_sae, k)

    def task(first: int, last: int) -> None:
        own, rows = scratch.of(f"rows {get_ident()} {last - first}"), last - first
        z = encoder.by_feature(first, last, own("z", encoder.d_sae, rows, dtype=encoder.dtype))
        best, keys = own("best", groups, rows), own("keys", groups, rows, dtype=torch.int16)
        found = own("found", rows, room, dtype=torch.int32), own("found values", rows, room)
        slots = slice(first * k, last * k)
        into = counts[first:last], cols[slots], values[slots]
        topk_kernels().choose_topk(*z, k, positive, *arrays(best, keys, *found, *into))

    share(task, n, TOPK_ROWS)
    return Pairs(starts, counts, cols, values)


def batchtopk_pairs(encoder: Encoder, n: int, k: int, scratch: Scratch) -> Pairs:
    """The codes of BatchTopK: the k largest of all of relu(z).

    The smallest code of the last batch says about where this one's will end: what is above a bound below it is collected
    while a run's z lies in the cache, and the k largest of it kept. Where that were too few, or too many to hold, or
    there was no batch, the bound is found from this one (`_bounded_pairs`). The codes are the same either way.
    """
    groups = min(encoder.d_sae, max(encoder.d_sae // 16, -(-k // n)))
    pairs = _guessed_pairs(encoder, n, k, groups, scratch) if scratch.bound else None
    pairs = pairs or _bounded_pairs(encoder, n, k, groups, scratch)
    full = int(pairs.counts.sum()) == k and pairs.least is not None
    scratch.bound = BELOW * pairs.least if full and pairs.least else None
    return pairs


def _guessed_pairs(encoder: Encoder, n: int, k: int, groups: int, scratch: Scratch) -> Pairs | None:
    """All above scratch.bound, the k largest kept; None where they are fewer, or many more."""
    room = ROOM * -(-k // n) * CHUNK_ROWS + encoder.d_sae
    counts, runs = scratch("counts", n, dtype=torch.int64), -(-n // CHUNK_ROWS)
    cols, values = scratch("cols", runs, room, dtype=torch.int32), scratch("values", runs, room)

    def task(first: int, last: int) -> int:
        out = scratch(f"z {get_ident()}", CHUNK_ROWS, encoder.d_sae, dtype=encoder.dtype)[: last - first]
        arguments, run = encoder(first, last, out), first // CHUNK_ROWS
        into = arrays(counts[first:last], cols[run], values[run])
        return int(kernels().collect_above(*arguments, scratch.bound, groups, *into))

    found = share(task, n, CHUNK_ROWS)
    if min(found) < 0 or sum(found) < k:
        return None
    starts = counts.cumsum(0) - counts
    for run, before in enumerate(np.cumsum([0, *found[:-1]])):
        starts[run * CHUNK_ROWS : (run + 1) * CHUNK_ROWS] += run * room - int(before)
    least = kernels().keep_largest(*arrays(starts, counts, cols.view(-1), values.view(-1)), k)
    return Pairs(starts, counts, cols.view(-1)[:k], values.view(-1)[:k], float(least))


def _bounded_pairs(encoder: Encoder, n: int, k: int, groups: int, scratch: Scratch) -> Pairs:
    """The same in two looks at the whole batch.

    The k-th largest of the maxima of groups of columns is a lower bound of the k-th largest value, and a histogram of
    their first 16 bits gives a bound just below it. What is above that bound is collected, the k largest of it kept.
    """
    m = encoder.d_sae
    z, best = scratch("z", n, m, dtype=encoder.dtype), scratch("best", n, groups)
    starts, counts = torch.zeros(n, dtype=torch.int64), scratch("counts", n, dtype=torch.int64)

    def look(first: int, last: int) -> Tensor:
        histogram = torch.empty(2**15, dtype=torch.int64)
        kernels().group_maxima(*encoder(first, last, z[first:last]), *arrays(best[first:last], histogram))
        return histogram

    def collect(fill: bool, cols: Tensor, values: Tensor) -> None:
        def task(first: int, last: int) -> None:
            rows = slice(first, last)
            arguments = *encoder.as_arguments(z[rows]), best[rows].numpy(), bound, fill
            kernels().collect(*arguments, *arrays(starts[rows], counts[rows], cols, values))

        share(task, n, CHUNK_ROWS)

    at_least = torch.stack(share(look, n, CHUNK_ROWS)).sum(0).flip(0).cumsum(0)
    reached = int((at_least < k).sum())  # in the flipped order; all bins when fewer than k maxima are above 0
    bound = (
        float(torch.tensor((2**15 - 1 - reached) << 16, dtype=torch.int32).view(torch.float32))
        if reached < 2**15
        else 0.0
    )
    collect(False, torch.empty(0, dtype=torch.int32), torch.empty(0))
    total = int(counts.sum())
    starts.copy_(counts.cumsum(0) - counts)
    cols, values = torch.empty(total, dtype=torch.int32), torch.empty(total)
    collect(True, cols, values)
    least = (
        kernels().keep_largest(*arrays(starts, counts, cols, values), k)
        if total > k
        else values.min().item()
        if total
        else None
    )
    return Pairs(starts, counts, cols, values, least)


class Decoded(NamedTuple):
    """residual (parts, n, d) float32, see kernels.decode; close, what gradients are summed from: the same, or rounded to
    bfloat16; its sums over the rows (parts, d); the mean over rows of the squared norm of each reconstruction's error
    (parts,); dz of each pair."""

    residual: Tensor
    close: Tensor
    totals: Tensor
    errors: Tensor
    dz: Tensor


def decode(
    sae: SAE, rows: Tensor, pairs: Pairs, widths: list[int], scale: float, fast: bool, scratch: Scratch
) -> Decoded:
    """The reconstructions of n training rows by the first w features for each of `widths`, and what each pair's code gets
    of them: dz = scale * residual . W_dec[i]. When `fast`, `close` is rounded."""
    parts, n, d = len(widths), len(rows), sae.config.d_out
    residual, dz = scratch("residual", parts, n, d), scratch("dz", len(pairs.values))
    close = scratch("rounded", parts, n, d, dtype=torch.bfloat16) if fast else residual
    weights = arrays(sae.W_dec.detach(), sae.b_dec.detach(), torch.tensor(widths))

    def task(first: int, last: int) -> tuple[Tensor, Tensor]:
        run = slice(first, last)
        goal = codes_goal(sae, rows[run]).contiguous().numpy()
        slots = arrays(pairs.starts[run], pairs.counts[run], pairs.cols, pairs.values)
        errors = torch.empty(parts, dtype=torch.float64)
        if parts > 1:
            kernels().sort_rows(*slots)
        kernels().decode(goal, *weights, *slots, scale, first, *arrays(residual, dz, errors))
        if fast:
            close[:, run].copy_(residual[:, run])
        return errors, residual[:, run].sum(1)

    errors, totals = zip(*share(task, n, CHUNK_ROWS), strict=True)
    return Decoded(residual, close, torch.stack(totals).sum(0), torch.stack(errors).sum(0) / n, dz)


def skip_gradient(sae: SAE, rows: Tensor, residual: Tensor, scale: float, scratch: Scratch) -> dict[str, Tensor]:
    """{"W_skip": scale * residual^T @ x (d_out, d_in)} of training rows, where x_hat - goal is residual (n, d_out) and
    dL/dx_hat is scale times that; {} without a skip."""
    if not isinstance(sae, Skip):
        return {}
    x, grad = sides(sae, rows)[0], scratch("W_skip", *sae.W_skip.shape)
    share(lambda i, j: torch.mm(residual[:, i:j].t(), x, out=grad[i:j]).mul_(scale), len(grad), SKIP_ROWS)
    return {"W_skip": grad}


def by_feature(pairs: Pairs, dz: Tensor, d_sae: int, scratch: Scratch) -> tuple[Tensor, ...]:
    """The pairs sorted by feature: bounds (d_sae + 1,), rows, values, dz."""
    size = len(pairs.values)
    bounds, rows = torch.empty(d_sae + 1, dtype=torch.int64), scratch("rows", size, dtype=torch.int32)
    made = (bounds, rows, scratch("sorted values", size), scratch("sorted dz", size))
    kernels().sort_by_feature(*arrays(pairs.starts, pairs.counts, pairs.cols, pairs.values, dz), *arrays(*made))
    return made
