"""The training step of ReLU, JumpReLU and gated SAEs on a CPU with bfloat16 products: all products in bfloat16, and the
work between them in as few passes over the (n, d_sae) matrices as there are products."""

from dataclasses import dataclass
from threading import get_ident
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saes.numerics.gated import GatedSAE
from saes.numerics.jumprelu import JumpReLUSAE
from saes.numerics.sae import SAE
from training.numerics.compiled import dense_kernels, update_kernels
from training.numerics.dead_features import dead_gradients
from training.numerics.losses import Outcome, Terms
from training.numerics.row_gradients import SummedGradients
from training.numerics.sparse import CHUNK_FEATURES, CHUNK_ROWS, bias_of, skip_gradient
from training.numerics.threads import Scratch, share
from training.numerics.transcoding import codes_goal, sides

DENSE_FEATURES = 768  # at once: a sixth less time in products than 256


def run_of(m: int) -> int:
    """How many of m features go through at once; fewer where there are few, so that all threads have some."""
    return max(CHUNK_FEATURES, min(DENSE_FEATURES, m // 6))


@dataclass(frozen=True)
class Penalty:
    """What the loss holds beside the reconstruction's error / scale^2.

    slope (d_sae,): weight of each code. weight(counts (n,)) -> (n,): what one more feature in a row costs. eps: width of
    the window in which thresholds learn, 0 without thresholds.
    """

    scale: float
    slope: Tensor
    target_l0: float | None = None
    l0: float = 0.0
    eps: float = 0.0

    def weight(self, counts: Tensor) -> Tensor:
        """d/d count of l0 * count, or of l0 * 2 / target * (count - target)^2."""
        if self.target_l0 is None:
            return torch.full(counts.shape, self.l0)
        return (self.l0 * 4 / self.target_l0) * (counts.float() - self.target_l0)


@dataclass(frozen=True)
class Step:
    """Gradients in the training layout, squares as in row_gradients.SummedGradients, squared_error as in losses.Outcome,
    residual (n, d), counts (n,) of features a row, fired (d_sae,) and sums (d_sae,) of each feature's codes. A gated SAE's
    sums and gate_error, which is squared_error of its gate's own reconstruction, are of relu(z + b_gate)."""

    grads: dict[str, Tensor]
    squares: float
    squared_error: float
    residual: Tensor
    counts: Tensor
    fired: Tensor
    sums: Tensor
    gate_error: float = 0.0


class Operands:
    """What the products of a step read, in bfloat16: centred (n, d_in), W_enc (m, d_in), W_dec (m, d_out), W_dec_t
    (d_out, m)."""

    def __init__(self, sae: SAE, rows: Tensor, scratch: Scratch) -> None:
        x, n, m, half = sides(sae, rows)[0], len(rows), sae.config.d_sae, torch.bfloat16
        self.centred = scratch("centred", n, sae.config.d_in, dtype=half)
        self.W_enc = scratch("W_enc", m, sae.config.d_in, dtype=half)
        self.W_dec = scratch("W_dec", m, sae.config.d_out, dtype=half)
        self.W_dec_t = scratch("W_dec_t", sae.config.d_out, m, dtype=half)
        subtracted = sae.b_dec.detach() if sae.config.apply_b_dec_to_input else None

        def inputs(i: int, j: int) -> None:
            self.centred[i:j].copy_(x[i:j] if subtracted is None else x[i:j] - subtracted)

        def features(i: int, j: int) -> None:
            self.W_enc[i:j].copy_(sae.W_enc.detach().t()[i:j])
            self.W_dec[i:j].copy_(sae.W_dec.detach()[i:j])
            self.W_dec_t[:, i:j].copy_(self.W_dec[i:j].t())

        share(inputs, n, CHUNK_ROWS)
        share(features, m, CHUNK_FEATURES)

    def z(self, run: slice, out: Tensor) -> Any:
        """centred @ W_enc of a run of features, feature-major, into `out`, the way the kernels take it."""
        return bits(torch.mm(self.W_enc[run], self.centred.t(), out=out))

    def decoded(self, acts: Tensor, run: slice) -> Tensor:
        """acts @ W_dec of a run of rows (rows, d_out), without b_dec."""
        return torch.mm(self.W_dec_t, acts[:, run]).t()

    def to_codes(self, close: Tensor, run: slice, name: str, scratch: Scratch) -> Tensor:
        """close @ W_dec^T of a run of features, feature-major, in memory of this thread's own."""
        out = scratch(f"{name} {get_ident()}", run_of(len(self.W_dec)), len(close), dtype=torch.bfloat16)
        return torch.mm(self.W_dec[run], close.t(), out=out[: run.stop - run.start])


@torch.no_grad()
def dense_gradients(sae: SAE, x: Tensor, terms: Terms, scratch: Scratch) -> Outcome:
    """The gradients of ReLU, JumpReLU and gated SAEs and JumpReLU transcoders, of training rows x."""
    if isinstance(sae, JumpReLUSAE):
        eps = terms.bandwidth * terms.scale
        penalty = Penalty(terms.scale, torch.zeros(sae.config.d_sae), terms.target_l0, terms.l0, eps)
    else:
        penalty = Penalty(terms.scale, row_norms(sae.W_dec.detach()) * (terms.l1 / (len(x) * terms.scale)))
    step = (gated_step if isinstance(sae, GatedSAE) else dense_step)(sae, x, penalty, scratch)
    parts = {"mse": step.squared_error / terms.scale**2}
    if penalty.eps:
        counts, target = step.counts.float(), terms.target_l0
        cost = counts if target is None else 2 / target * (counts - target).square()
        parts["l0"] = terms.l0 * float(cost.mean())
    else:
        parts["l1"] = float(penalty.slope @ step.sums)
    if isinstance(sae, GatedSAE):
        parts["gate"] = step.gate_error / terms.scale**2
    squares: float | None = step.squares
    if len(terms.dead) and terms.aux:
        dead, extra = dead_gradients(sae, sides(sae, x)[0], -step.residual, terms, scratch)
        parts, squares = parts | dead, None
        for name, grad in extra.items():
            step.grads[name].index_add_(0, terms.dead, grad)
    grads = step.grads | skip_gradient(sae, x, step.residual, 2 / (len(x) * terms.scale**2), scratch)
    return Outcome(SummedGradients(sae, grads, squares), parts, step.fired, step.squared_error)


def dense_step(sae: SAE, x: Tensor, penalty: Penalty, scratch: Scratch) -> Step:
    """The step's gradients for x (n, d), by runs of features but for x_hat: z and acts, then x_hat by runs of rows, then
    dL/dacts, dz and the weights' gradients of each run while it lies in the cache.

    Matrices are bfloat16 and feature-major, so that no product reads one against its grain; sums over rows and the
    residual are float32.
    """
    n, m, half = len(x), sae.config.d_sae, torch.bfloat16
    operands = Operands(sae, x, scratch)
    z, acts = (scratch(name, m, n, dtype=half) for name in ("z", "acts"))
    bias, slope = sae.b_enc.detach().numpy(), penalty.slope
    threshold = (sae.tensor("threshold").detach() if penalty.eps else torch.zeros(m)).numpy()
    fired, sums = torch.empty(m, dtype=torch.int64), torch.empty(m)

    def encode(first: int, last: int) -> np.ndarray:
        run, counts = slice(first, last), np.empty(n, np.int32)
        codes = bits(acts[run]), counts, fired[run].numpy(), sums[run].numpy()
        dense_kernels().cut(operands.z(run, z[run]), bias[run], threshold[run], *codes)
        return counts

    counts = torch.from_numpy(np.sum(share(encode, m, run_of(m)), axis=0, dtype=np.int64))
    decoded = _decode(sae, x, operands, [acts], scratch)
    weight = (penalty.weight(counts) / n).numpy()
    scale = 2 / (n * penalty.scale**2)
    to_bias, to_threshold = torch.empty(m), torch.empty(m)
    rows = _Rows(sae, scale, slope * sums, scratch)

    def features(first: int, last: int) -> tuple[float, Tensor]:
        run = slice(first, last)
        dz = operands.to_codes(decoded.close[0], run, "dz", scratch)
        dense_kernels().cut_backward(
            bits(z[run]), bias[run], threshold[run], bits(dz), scale, slope[run].numpy(), weight, penalty.eps,
            to_bias[run].numpy(), to_threshold[run].numpy(),
        )  # fmt: skip
        return rows.add(run, dz @ operands.centred, [acts[run] @ decoded.close[0]], to_bias[run])

    biases = {"b_enc": to_bias} | ({"threshold": to_threshold} if penalty.eps else {})
    grads, squares = rows.gathered(share(features, m, run_of(m)), decoded.total, biases)
    error = float(decoded.errors[0])
    return Step(grads, squares, error, decoded.residual, counts, fired, sums)


def gated_step(sae: SAE, x: Tensor, penalty: Penalty, scratch: Scratch) -> Step:
    """`dense_step` of a gated SAE, whose gate relu(z + b_gate) bears the penalty and reconstructs x by itself."""
    n, m, half = len(x), sae.config.d_sae, torch.bfloat16
    operands = Operands(sae, x, scratch)
    z, acts, gate = (scratch(name, m, n, dtype=half) for name in ("z", "acts", "gate"))
    biases = [sae.tensor(name).detach() for name in ("b_gate", "r_mag", "b_mag")]
    grown = biases[1].exp()
    given, slope = (biases[0].numpy(), grown.numpy(), biases[2].numpy()), penalty.slope
    fired, sums = torch.empty(m, dtype=torch.int64), torch.empty(m)

    def encode(first: int, last: int) -> np.ndarray:
        run, counts = slice(first, last), np.empty(n, np.int32)
        codes = bits(acts[run]), bits(gate[run]), counts, fired[run].numpy(), sums[run].numpy()
        dense_kernels().cut_gated(operands.z(run, z[run]), *(bias[run] for bias in given), *codes)
        return counts

    counts = torch.from_numpy(np.sum(share(encode, m, run_of(m)), axis=0, dtype=np.int64))
    decoded = _decode(sae, x, operands, [acts, gate], scratch)
    scale = 2 / (n * penalty.scale**2)
    to_biases = torch.empty(3, m)
    rows = _Rows(sae, scale, slope * sums, scratch)

    def features(first: int, last: int) -> tuple[float, Tensor]:
        run = slice(first, last)
        close, close_gate = decoded.close
        dz = operands.to_codes(close, run, "dz", scratch)
        to_gate = operands.to_codes(close_gate, run, "to gate", scratch)
        dense_kernels().gated_backward(
            bits(z[run]), *(bias[run] for bias in given), bits(dz), bits(to_gate), scale, slope[run].numpy(),
            *(part[run].numpy() for part in to_biases),
        )  # fmt: skip
        to_z = to_biases[0, run] + grown[run] * to_biases[1, run]
        return rows.add(run, dz @ operands.centred, [acts[run] @ close, gate[run] @ close_gate], to_z)

    named = dict(zip(("b_gate", "b_mag", "r_mag"), to_biases, strict=True))
    grads, squares = rows.gathered(share(features, m, run_of(m)), decoded.total, named)
    error, gate_error = decoded.errors.tolist()
    return Step(grads, squares, error, decoded.residual, counts, fired, sums, gate_error)


@dataclass(frozen=True)
class _Decoded:
    """Of each reconstruction (parts): its residual in bfloat16, close (parts, n, d), and errors (parts,), the mean over
    rows of its square; residual (n, d) of the first one in float32; total (d,): all residuals' sum."""

    residual: Tensor
    close: Tensor
    errors: Tensor
    total: Tensor


def _decode(sae: SAE, rows: Tensor, operands: Operands, codes: list[Tensor], scratch: Scratch) -> _Decoded:
    """The reconstructions of n training rows from each of `codes` (m, n)."""
    n, d, b_dec = len(rows), sae.config.d_out, sae.b_dec.detach()
    residual, close = scratch("residual", n, d), scratch("rounded", len(codes), n, d, dtype=torch.bfloat16)

    def task(first: int, last: int) -> tuple[Tensor, Tensor]:
        run = slice(first, last)
        target = codes_goal(sae, rows[run]) - b_dec
        torch.sub(operands.decoded(codes[0], run), target, out=residual[run])
        parts = [residual[run], *(operands.decoded(acts, run) - target for acts in codes[1:])]
        for q, part in enumerate(parts):
            close[q, run].copy_(part)
        errors = torch.stack([part.square().sum(dtype=torch.float64) for part in parts])
        return errors, torch.stack([part.sum(0) for part in parts]).sum(0)

    errors, totals = zip(*share(task, n, CHUNK_ROWS), strict=True)
    return _Decoded(residual, close, torch.stack(errors).sum(0) / n, torch.stack(totals).sum(0))


class _Rows:
    """The gradients of W_enc and W_dec while they are made. scale: of dL/dx_hat; along (m,): what the penalty adds to
    each decoder row, along that row."""

    def __init__(self, sae: SAE, scale: float, along: Tensor, scratch: Scratch) -> None:
        self.sae, self.scale, self.along = sae, scale, along.numpy()
        self.to_enc, self.to_dec = scratch("to_enc", *sae.W_enc.t().shape), scratch("to_dec", *sae.W_dec.shape)
        self.W_enc, self.W_dec = sae.W_enc.detach().t().contiguous(), sae.W_dec.detach()

    def add(self, run: slice, enc: Tensor, dec: list[Tensor], to_z: Tensor) -> tuple[float, Tensor]:
        """Those of a run of features from the products in bfloat16; the sum of their squares, and what to_z, the sums of
        dL/dz over rows, says through the encoder's input."""
        through = torch.empty(self.W_enc.shape[1])
        more = dec[1] if len(dec) > 1 else dec[0][:0]
        squares = update_kernels().widen_rows(
            bits(enc), bits(dec[0]), bits(more), to_z.numpy(), self.along[run], self.scale,
            *(tensor[run].numpy() for tensor in (self.W_enc, self.W_dec, self.to_enc, self.to_dec)), through.numpy(),
        )  # fmt: skip
        return squares, through

    def gathered(
        self, added: list[tuple[float, Tensor]], total: Tensor, biases: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], float]:
        """All gradients, and the sum of the squares of those with a row a feature: W_enc, W_dec and the first bias."""
        squares, through = zip(*added, strict=True)
        grads = {"W_enc": self.to_enc, "W_dec": self.to_dec, "b_dec": total * self.scale} | biases
        if self.sae.config.apply_b_dec_to_input:
            grads["b_dec"] = grads["b_dec"] - torch.stack(through).sum(0)
        return grads, sum(squares) + float(grads[bias_of(self.sae)].square().sum(dtype=torch.float64))


def row_norms(W: Tensor) -> Tensor:
    """|W[i]| of each row (m, d)."""
    return torch.cat(share(lambda i, j: W[i:j].norm(dim=-1), len(W), CHUNK_FEATURES))


def bits(tensor: Tensor) -> Any:
    """bfloat16 the way the kernels take it."""
    return tensor.view(torch.uint16).numpy()
