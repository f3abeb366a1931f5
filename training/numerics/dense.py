"""The training step of ReLU, JumpReLU and gated SAEs on a CPU with bfloat16 products: all products in bfloat16, and the
work between them in as few passes over the (n, d_sae) matrices as there are products."""

from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from saes.numerics.sae import SAE
from training.numerics.sparse import (
    CHUNK_FEATURES,
    CHUNK_ROWS,
    Encoder,
    PairGradients,
    Scratch,
    bias_of,
    dense_kernels,
    share,
)


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
    """Gradients in the training layout, squared_error as in losses.Outcome, residual (n, d), counts (n,) of features a
    row, fired (d_sae,) and sums (d_sae,) of each feature's codes. A gated SAE's sums and gate_error, which is squared_error
    of its gate's own reconstruction, are of relu(z + b_gate)."""

    grads: dict[str, Tensor]
    squared_error: float
    residual: Tensor
    counts: Tensor
    fired: Tensor
    sums: Tensor
    gate_error: float = 0.0


def dense_step(sae: SAE, x: Tensor, penalty: Penalty, scratch: Scratch) -> Step:
    """The step's gradients for x (n, d): z, acts, x_hat, dL/dacts and dz run by run of rows, then dW = matrices^T @ rows
    by runs of features. Matrices are bfloat16, sums over rows and the residual float32."""
    (n, d), m = x.shape, sae.config.d_sae
    half = torch.bfloat16
    encoder = Encoder(sae, x, True, scratch)
    W_dec, b_dec = scratch("W_dec", m, d, dtype=half), sae.b_dec.detach()
    share(lambda i, j: W_dec[i:j].copy_(sae.W_dec.detach()[i:j]), m, 4 * CHUNK_FEATURES)
    z, acts, dz = (scratch(name, n, m, dtype=half) for name in ("z", "acts", "dz"))
    residual, close = scratch("residual", n, d), scratch("rounded", n, d, dtype=half)
    counts = scratch("counts", n, dtype=torch.int64)
    threshold = sae.tensor("threshold").detach() if penalty.eps else torch.zeros(m)
    scale = 2 / (n * penalty.scale**2)

    def rows(first: int, last: int) -> tuple[Tensor, ...]:
        run = slice(first, last)
        encoder(first, last, z[run])
        fired, sums, to_bias, to_threshold = torch.empty(m, dtype=torch.int64), *torch.empty(3, m)
        cut = z[run].view(torch.uint16).numpy(), encoder.bias, threshold.numpy()
        codes = acts[run].view(torch.uint16).numpy()
        dense_kernels().cut(*cut, codes, counts[run].numpy(), fired.numpy(), sums.numpy())
        torch.sub(acts[run] @ W_dec, x[run] - b_dec, out=residual[run])
        close[run].copy_(residual[run])
        torch.mm(close[run], W_dec.t(), out=dz[run])
        dense_kernels().cut_backward(
            *cut, dz[run].view(torch.uint16).numpy(), scale, penalty.slope.numpy(),
            (penalty.weight(counts[run]) / n).numpy(), penalty.eps, to_bias.numpy(), to_threshold.numpy(),
        )  # fmt: skip
        return fired, sums, to_bias, to_threshold, residual[run].sum(0), residual[run].square().sum(dtype=torch.float64)

    fired, sums, to_bias, to_threshold, total, error = (
        torch.stack(each).sum(0) for each in zip(*share(rows, n, CHUNK_ROWS), strict=True)
    )
    to_enc, to_dec = scratch("to_enc", m, d), scratch("to_dec", m, d)

    def features(first: int, last: int) -> Tensor:
        run = slice(first, last)
        to_enc[run] = dz[:, run].t() @ encoder.centred
        W = sae.W_dec.detach()[run]
        parallel = (penalty.slope * sums)[run, None] * W / W.square().sum(-1, keepdim=True)
        torch.add(parallel, (acts[:, run].t() @ close).float(), alpha=scale, out=to_dec[run])
        return to_bias[run] @ sae.W_enc.detach().t()[run]

    through = torch.stack(share(features, m, CHUNK_FEATURES)).sum(0)
    grads = {"W_enc": to_enc, "b_enc": to_bias, "W_dec": to_dec, "b_dec": total * scale}
    if sae.config.apply_b_dec_to_input:
        grads["b_dec"] = grads["b_dec"] - through
    if penalty.eps:
        grads["threshold"] = to_threshold
    return Step(grads, float(error) / n, residual, counts, fired, sums)


def gated_step(sae: SAE, x: Tensor, penalty: Penalty, scratch: Scratch) -> Step:
    """`dense_step` of a gated SAE, whose gate relu(z + b_gate) bears the penalty and reconstructs x by itself."""
    (n, d), m = x.shape, sae.config.d_sae
    half = torch.bfloat16
    encoder = Encoder(sae, x, True, scratch)
    W_dec, b_dec = scratch("W_dec", m, d, dtype=half), sae.b_dec.detach()
    share(lambda i, j: W_dec[i:j].copy_(sae.W_dec.detach()[i:j]), m, 4 * CHUNK_FEATURES)
    z, acts, gate, to_acts = (scratch(name, n, m, dtype=half) for name in ("z", "acts", "gate", "dz"))
    residual, counts = scratch("residual", n, d), scratch("counts", n, dtype=torch.int64)
    close, close_gate = (scratch(name, n, d, dtype=half) for name in ("rounded", "rounded gate"))
    biases = [sae.tensor(name).detach() for name in ("b_gate", "r_mag", "b_mag")]
    b_gate, grown, b_mag = biases[0].numpy(), biases[1].exp().numpy(), biases[2].numpy()
    scale = 2 / (n * penalty.scale**2)

    def rows(first: int, last: int) -> tuple[Tensor, ...]:
        run = slice(first, last)
        encoder(first, last, z[run])
        to_gate = scratch(f"to gate {get_ident()}", CHUNK_ROWS, m, dtype=half)[: last - first]
        fired, sums, to_biases = torch.empty(m, dtype=torch.int64), torch.empty(m), torch.empty(3, m)
        cut, codes = (_bits(z[run]), b_gate, grown, b_mag), (_bits(acts[run]), _bits(gate[run]))
        dense_kernels().cut_gated(*cut, *codes, counts[run].numpy(), fired.numpy(), sums.numpy())
        target = x[run] - b_dec
        torch.sub(acts[run] @ W_dec, target, out=residual[run])
        residual_gate = gate[run] @ W_dec - target
        close[run].copy_(residual[run])
        close_gate[run].copy_(residual_gate)
        torch.mm(close[run], W_dec.t(), out=to_acts[run])
        torch.mm(close_gate[run], W_dec.t(), out=to_gate)
        dense_kernels().gated_backward(
            *cut, _bits(to_acts[run]), _bits(to_gate), scale, penalty.slope.numpy(), *to_biases.numpy()
        )
        errors = torch.stack([part.square().sum(dtype=torch.float64) for part in (residual[run], residual_gate)])
        return fired, sums, to_biases, residual[run].sum(0) + residual_gate.sum(0), errors

    fired, sums, to_biases, total, errors = (
        torch.stack(each).sum(0) for each in zip(*share(rows, n, CHUNK_ROWS), strict=True)
    )
    to_enc, to_dec = scratch("to_enc", m, d), scratch("to_dec", m, d)
    to_z = to_biases[0] + torch.from_numpy(grown) * to_biases[1]

    def features(first: int, last: int) -> Tensor:
        run = slice(first, last)
        to_enc[run] = to_acts[:, run].t() @ encoder.centred
        W = sae.W_dec.detach()[run]
        parallel = (penalty.slope * sums)[run, None] * W / W.square().sum(-1, keepdim=True)
        both = (acts[:, run].t() @ close).float() + gate[:, run].t() @ close_gate
        torch.add(parallel, both, alpha=scale, out=to_dec[run])
        return to_z[run] @ sae.W_enc.detach().t()[run]

    through = torch.stack(share(features, m, CHUNK_FEATURES)).sum(0)
    grads = {"W_enc": to_enc, "W_dec": to_dec, "b_dec": total * scale}
    grads |= dict(zip(("b_gate", "b_mag", "r_mag"), to_biases, strict=True))
    if sae.config.apply_b_dec_to_input:
        grads["b_dec"] = grads["b_dec"] - through
    error, gate_error = (errors / n).tolist()
    return Step(grads, error, residual, counts, fired, sums, gate_error)


def _bits(tensor: Tensor) -> Any:
    """bfloat16 the way the kernels take it."""
    return tensor.view(torch.uint16).numpy()


def as_rows(sae: SAE, grads: dict[str, Tensor]) -> PairGradients:
    """Summed gradients in the form that the optimiser applies feature by feature."""
    m, d = sae.W_dec.shape
    nothing = torch.zeros(m + 1, dtype=torch.int64), torch.empty(0, dtype=torch.int32), torch.empty(0), torch.empty(0)
    extra = {name: grads[name] for name in ("W_enc", bias_of(sae), "W_dec")}
    others = {name: grad for name, grad in grads.items() if name not in (*extra, "b_dec")}
    empty = torch.empty(0, d), torch.empty(1, 0, d)
    return PairGradients(sae, nothing, *empty, 1.0, [m], grads["b_dec"], torch.arange(m), extra, others)
