"""The optimiser of all SAEs: Adam, features first, decoder rows at norm 1 or free; and its schedules."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from saes.numerics.sae import SAE
from saes.numerics.topk import BatchTopKSAE, ByNorm
from training.numerics.compiled import update_kernels
from training.numerics.losses import trained
from training.numerics.row_gradients import Rates, RowGradients, Targets, remove_parallel
from training.numerics.threads import share

IN_UNITS_OF_X = ("b_enc", "b_dec", "b_gate", "b_mag", "threshold")
# Adam's usual 1e-8 is not small beside the gradients of a loss of about 1 spread over millions of weights: features that
# fire rarely learn more slowly with it. Measured: see docs/decisions.md.
ADAM_EPS = 1e-15
ADAM_STATE = ("exp_avg", "exp_avg_sq", "step")
CHUNK_NUMBERS = 2**16  # that one thread updates at once


class Optimizer:
    """Adam on the tensors of an SAE, held feature by feature while training.

    W_enc keeps its shape (d_in, d_sae) but is laid out with one feature's weights side by side, because gradients,
    Adam and the decoder's constraint all work on rows of features; `release` restores the ordinary layout.

    With `unit`, every decoder row has norm 1 after each step; the component of its gradient along the row, which that
    would undo, is removed before Adam sees it (Bricken et al. 2023; dictionary_learning's ConstrainedAdam). Without, rows
    have the norms they learn (Anthropic, April 2024; SAELens), TopK and BatchTopK choose features by z |W_dec row|, and
    `release` folds the norms into the encoder, which changes no output.
    `bias_scale` multiplies the learning rate of the biases: they live in units of the activations, weights do not, so
    with it a step does what it would do on activations scaled to mean norm sqrt(d_in).
    """

    def __init__(self, sae: SAE, betas: tuple[float, float], bias_scale: float, unit: bool = True) -> None:
        self.sae, self.unit = sae, unit
        if isinstance(sae, ByNorm):
            sae.by_norm = not unit
        sae.W_enc.data = sae.W_enc.data.t().contiguous().t()
        self.tensors = {name: tensor.data for name, tensor in sae.named_parameters()}
        self.tensors["W_enc"] = sae.W_enc.data.t()
        self.leaves = {name: nn.Parameter(self.tensors[name]) for name in trained(sae)}
        self.bias_scale = bias_scale
        groups = [
            {"params": [leaf for name, leaf in self.leaves.items() if (name in IN_UNITS_OF_X) == is_bias]}
            for is_bias in (False, True)
        ]
        self.betas = betas
        self.adam = torch.optim.Adam(groups, betas=betas, eps=ADAM_EPS, fused=True)

    @torch.no_grad()
    def step(self, grads: Mapping[str, Tensor], lr: float, clip: float | None = None) -> None:
        """One update from gradients in the training layout (see losses.Outcome). `clip` bounds their common L2 norm."""
        if isinstance(grads, RowGradients):
            self._update_rows(grads, lr, clip)
        else:
            self._update_plainly(grads, lr, clip)
        if "threshold" in self.leaves:  # below 0 a JumpReLU would let negative pre-activations through
            self.tensors["threshold"].clamp_(min=0)

    def _update_plainly(self, grads: Mapping[str, Tensor], lr: float, clip: float | None) -> None:
        """By torch, of any gradients on any device."""
        if self.unit:
            remove_parallel(grads["W_dec"], self.tensors["W_dec"])
        for name, leaf in self.leaves.items():
            leaf.grad = grads.get(name)
        if clip is not None:
            nn.utils.clip_grad_norm_(list(self.leaves.values()), clip)
        for group, factor in zip(self.adam.param_groups, (1.0, self.bias_scale), strict=True):
            group["lr"] = lr * factor
        self.adam.step()
        if self.unit:
            self.tensors["W_dec"].div_(self.tensors["W_dec"].norm(dim=-1, keepdim=True))

    def _update_rows(self, grads: RowGradients, lr: float, clip: float | None) -> None:
        """By the kernels, with torch's own moments. Not by torch for the vectors either: its fused Adam wakes a team of
        OpenMP threads even for a few numbers, which then spin on the cores that the next step's threads want."""
        targets = Targets(self.tensors, {name: self._moments(name) for name in self.leaves}, self.unit)
        for kept in targets.moments.values():
            kept["step"] += 1
        step = float(targets.moments["W_enc"]["step"])
        beta1, beta2 = self.betas
        rate = lr / (1 - beta1**step)
        rates = Rates(rate, rate * self.bias_scale, beta1, beta2, (1 - beta2**step) ** -0.5, ADAM_EPS)
        others, factor = grads.update(targets, rates, clip)
        for name, grad in others.items():
            own = rates.biases if name in IN_UNITS_OF_X else rates.weights
            _update_whole(grad, targets.arrays((name,)), factor, own, rates)

    def _moments(self, name: str) -> dict[str, Tensor]:
        """torch's Adam's state of a tensor, as its fused one makes it at its first step."""
        leaf = self.leaves[name]
        if not self.adam.state[leaf]:
            zeros = {key: torch.zeros_like(leaf) for key in ("exp_avg", "exp_avg_sq")}
            self.adam.state[leaf] = {"step": torch.zeros((), device=leaf.device)} | zeros
        found: dict[str, Tensor] = self.adam.state[leaf]
        return found

    def state(self) -> dict[str, Tensor]:
        """Adam's moments and step counts as plain tensors, for a checkpoint."""
        return {
            f"adam.{name}.{key}": self.adam.state[leaf][key]
            for name, leaf in self.leaves.items()
            if self.adam.state[leaf]
            for key in ADAM_STATE
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `state` returned; what is not among it begins at zero."""
        for name, leaf in self.leaves.items():
            found = {key: tensors[f"adam.{name}.{key}"] for key in ADAM_STATE if f"adam.{name}.{key}" in tensors}
            self.adam.state[leaf] = {key: tensor.to(leaf.device).clone() for key, tensor in found.items()}
            self._moments(name)  # now: who halves a batch for want of memory has to know what is left for it

    def release(self) -> None:
        """Give the SAE its ordinary, contiguous layout back, and decoder rows of norm 1."""
        self.sae.W_enc.data = self.sae.W_enc.data.contiguous()
        if not self.unit:
            fold_norms(self.sae)


def _update_whole(grad: Tensor, state: list[Any], factor: float, rate: float, rates: Rates) -> None:
    """Adam's step of a tensor without rows of features: a vector, or W_skip."""
    w, m, v = (array.reshape(-1) for array in state)
    g = grad.contiguous().view(-1).numpy()

    def task(first: int, last: int) -> None:
        run = slice(first, last)
        update_kernels().update_vector(w[run], g[run], factor, m[run], v[run], rate, *rates[2:])

    share(task, len(w), CHUNK_NUMBERS)


@torch.no_grad()
def fold_norms(sae: SAE) -> None:
    """Decoder rows to norm 1 and the encoder by as much larger, in place: x_hat is the same, codes are in other units.

    A BatchTopK SAE's threshold is in the units of z |W_dec row| already.
    """
    norms = sae.W_dec.norm(dim=-1).clamp_min(torch.finfo(sae.W_dec.dtype).tiny)
    sae.W_dec.div_(norms[:, None])
    sae.W_enc.mul_(norms)
    for name in {"b_enc", "b_gate", "b_mag", "threshold"} & dict(sae.named_parameters()).keys():
        if not (name == "threshold" and isinstance(sae, BatchTopKSAE)):
            sae.tensor(name).mul_(norms)
    if isinstance(sae, ByNorm):
        sae.by_norm = False


def ramp(step: int, total: int, warmup: float, decay: float = 0.0) -> float:
    """A factor from 0 to 1 over the first `warmup` share of the steps, and back to 0 over the last `decay` share."""
    up = (step + 1) / max(warmup * total, 1)
    down = (total - step) / max(decay * total, 1)
    return min(up, down, 1.0)


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Within this block, how float32 products are computed: "float32" exactly; "fast" through bfloat16 on a CPU that
    has the instructions and TF32 on a GPU (inputs rounded; sums and results in float32). "bfloat16" is that
    and more, see losses.Terms.autocast.

    A setting of the process, not of a thread. Measured (layer 9 of SmolLM2-135M, 131k tokens, TopK 4,608): held-out FVU
    0.2309 fast, 0.2310 float32.
    """
    if precision == "float32":
        yield
        return
    cpu: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # missing from torch's annotations
    gpu: Any = torch.backends.cuda.matmul
    before = cpu.fp32_precision, gpu.fp32_precision
    cpu.fp32_precision = "bf16" if torch.cpu.get_capabilities().get("avx512_bf16") else before[0]
    gpu.fp32_precision = "tf32"
    try:
        yield
    finally:
        cpu.fp32_precision, gpu.fp32_precision = before
