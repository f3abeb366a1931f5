"""The optimiser of all SAEs: Adam, features first, decoder rows at norm 1; and its schedules."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from saes.numerics.sae import SAE
from training.numerics.losses import trained
from training.numerics.sparse import PairGradients, Rates

ADAM_STATE = ("exp_avg", "exp_avg_sq", "step")


class Optimizer:
    """Adam on the tensors of an SAE, held feature by feature while training.

    W_enc keeps its shape (d_in, d_sae) but is laid out with one feature's weights side by side, because gradients,
    Adam and the decoder's constraint all work on rows of features; `release` restores the ordinary layout.

    After each step every decoder row has norm 1; the component of its gradient along the row, which that would undo, is
    removed before Adam sees it (Bricken et al. 2023; dictionary_learning's ConstrainedAdam).
    `bias_scale` multiplies the learning rate of the biases: they live in units of the activations, weights do not, so
    with it a step does what it would do on activations scaled to mean norm sqrt(d_in).
    """

    def __init__(self, sae: SAE, betas: tuple[float, float], bias_scale: float) -> None:
        self.sae = sae
        sae.W_enc.data = sae.W_enc.data.t().contiguous().t()
        self.tensors = {name: tensor.data for name, tensor in sae.named_parameters()}
        self.tensors["W_enc"] = sae.W_enc.data.t()
        self.leaves = {name: nn.Parameter(self.tensors[name]) for name in trained(sae)}
        self.bias_scale = bias_scale
        groups = [
            {"params": [leaf for leaf in self.leaves.values() if (leaf.ndim == 1) == is_bias]}
            for is_bias in (False, True)
        ]
        self.betas = betas
        self.adam = torch.optim.Adam(groups, betas=betas, fused=True)

    @torch.no_grad()
    def step(self, grads: Mapping[str, Tensor], lr: float, clip: float | None = None) -> None:
        """One update from gradients in the training layout (see losses.Outcome). `clip` bounds their common L2 norm."""
        if isinstance(grads, PairGradients) and clip is None:
            grads = {"b_dec": self._update_features(grads, lr), **grads.others}
        else:
            remove_parallel(grads["W_dec"], self.tensors["W_dec"])
        for name, leaf in self.leaves.items():
            leaf.grad = grads.get(name)
        if clip is not None:
            nn.utils.clip_grad_norm_(list(self.leaves.values()), clip)
        for group, factor in zip(self.adam.param_groups, (1.0, self.bias_scale), strict=True):
            group["lr"] = lr * factor
        self.adam.step()
        if "W_dec" in grads:
            self.tensors["W_dec"].div_(self.tensors["W_dec"].norm(dim=-1, keepdim=True))
        if "threshold" in self.leaves:  # below 0 a JumpReLU would let negative pre-activations through
            self.tensors["threshold"].clamp_(min=0)

    def _update_features(self, grads: PairGradients, lr: float) -> Tensor:
        """The same for W_enc, b_enc and W_dec by the kernels, with torch's own moments; returns the gradient of b_dec."""
        moments = {name: self._moments(name) for name in ("W_enc", "b_enc", "W_dec")}
        for kept in moments.values():
            kept["step"] += 1
        step = float(moments["W_enc"]["step"])
        beta1, beta2 = self.betas
        rate = lr / (1 - beta1**step)
        rates = Rates(rate, rate * self.bias_scale, beta1, beta2, (1 - beta2**step) ** -0.5)
        return grads.update(self.tensors, moments, rates)

    def _moments(self, name: str) -> dict[str, Tensor]:
        """torch's Adam's state of a tensor, as it makes it at its first step."""
        leaf = self.leaves[name]
        if not self.adam.state[leaf]:
            zeros = {key: torch.zeros_like(leaf) for key in ("exp_avg", "exp_avg_sq")}
            self.adam.state[leaf] = {"step": torch.zeros(())} | zeros
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
        """Put back what `state` returned."""
        for name, leaf in self.leaves.items():
            found = {key: tensors[f"adam.{name}.{key}"] for key in ADAM_STATE if f"adam.{name}.{key}" in tensors}
            self.adam.state[leaf] = {key: tensor.to(leaf.device).clone() for key, tensor in found.items()}

    def release(self) -> None:
        """Give the SAE its ordinary, contiguous layout back."""
        self.sae.W_enc.data = self.sae.W_enc.data.contiguous()


def remove_parallel(grad: Tensor, W_dec: Tensor) -> Tensor:
    """grad_i -= (grad_i . w_i) w_i for rows w_i of norm 1, in place; both (d_sae, d_out)."""
    return grad.addcmul_(torch.linalg.vecdot(grad, W_dec).unsqueeze(1), W_dec, value=-1)


def ramp(step: int, total: int, warmup: float, decay: float = 0.0) -> float:
    """A factor from 0 to 1 over the first `warmup` share of the steps, and back to 0 over the last `decay` share."""
    up = (step + 1) / max(warmup * total, 1)
    down = (total - step) / max(decay * total, 1)
    return min(up, down, 1.0)


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Within this block, how float32 products are computed: "float32" exactly; "fast" through bfloat16 on a CPU that
    has the instructions and TF32 on a GPU (inputs rounded; sums and results in float32).

    A setting of the process, not of a thread. Measured (layer 9 of SmolLM2-135M, 131k tokens, TopK 4,608): held-out FVU
    0.2309 fast, 0.2310 float32.
    """
    if precision != "fast":
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
