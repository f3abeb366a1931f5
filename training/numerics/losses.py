"""What training minimises, architecture by architecture; gradients.py has the ways to differentiate it.

Every loss is free of the model's activation scale, by units measured once on the first batch: the TopK kinds divide by
the variance (Gao et al. 2024, arXiv 2406.04093), the others by scale = mean |x| / sqrt(d_in), which equals training on
inputs scaled to mean norm sqrt(d_in) (SAELens' "expected_average_only_in"). What is added for dead
features, the same for all, is in dead_features.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saes.numerics.jumprelu import JumpReLUSAE
from saes.numerics.sae import SAE
from saes.numerics.topk import BatchTopKSAE
from saes.numerics.transcoders import Skip
from training.numerics.ranks import ALONE, Ranks
from training.numerics.transcoding import sides


@dataclass(frozen=True)
class Terms:
    """What a loss needs beside the SAE and the batch.

    dead: (m,) int64, the features counted dead, or empty. scale, variance: the units of the loss (see above). l1, l0,
    aux: coefficients. bandwidth: width, in units of scale, of the window in which JumpReLU's thresholds learn.
    target_l0: with it, JumpReLU's penalty is quadratic around that L0 instead of proportional to it. autocast: the plain
    way (a GPU, or no kernels) computes its products in bfloat16. ranks: the processes that share the batch, of which x is
    then this one's rows.
    """

    dead: Tensor
    scale: float = 1.0
    variance: float = 1.0
    l1: float = 0.0
    aux: float = 0.0
    l0: float = 0.0
    bandwidth: float = 0.05
    target_l0: float | None = None
    autocast: bool = False
    ranks: Ranks = ALONE


@dataclass(frozen=True)
class Outcome:
    """Gradients by parameter name, the parts of the loss, and what happened.

    grads["W_enc"] is (d_sae, d_in): the training layout, one row a feature. fired: (d_sae,) how often each feature
    fired. squared_error: mean |x_hat - x|^2. least: the smallest code above 0, which BatchTopK's threshold follows.
    """

    grads: Mapping[str, Tensor]
    parts: dict[str, float]
    fired: Tensor
    squared_error: float
    least: float | None = None

    @property
    def loss(self) -> float:
        return sum(self.parts.values())


# ---------------------------------------------------------------------------------------------------- formulas


def squared_error(x_hat: Tensor, x: Tensor) -> Tensor:
    """mean over rows of sum over d of (x_hat - x)^2, of (n, d) tensors."""
    return (x_hat - x).square().sum(-1).mean()


def variance(x: Tensor) -> Tensor:
    """mean over rows of sum over d of (x - mean of the rows)^2, of (n, d)."""
    return squared_error(x.mean(0), x)


def l1_penalty(acts: Tensor, W_dec: Tensor) -> Tensor:
    """mean over rows of sum over i of |acts_i| * |W_dec_i| (SAELens "standard", lp_norm 1), acts (n, d_sae)."""
    return (acts.abs() @ W_dec.norm(dim=-1)).mean()


# ---------------------------------------------------------------------------------------------------- thresholds


class Jump(torch.autograd.Function):
    """JumpReLU(z) = z * [z > theta], with a pseudo-derivative for theta (Rajamanoharan et al. 2024, arXiv 2407.14435).

        d/dz = [z > theta];   d/dtheta = -(theta / eps) * [|z - theta| < eps / 2], summed over rows

    z (n, d_sae), theta (d_sae,), eps the width of the window.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(z, theta)
        ctx.eps = eps
        return z * (z > theta)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        z, theta = ctx.saved_tensors
        near = (z - theta).abs() < ctx.eps / 2
        return grad * (z > theta), -(theta / ctx.eps) * (grad * near).sum(0), None


class Count(torch.autograd.Function):
    """[z > theta], with d/dtheta = -(1 / eps) * [|z - theta| < eps / 2] and no gradient for z (same paper)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(z, theta)
        ctx.eps = eps
        return (z > theta).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:  # type: ignore[override]
        z, theta = ctx.saved_tensors
        near = (z - theta).abs() < ctx.eps / 2
        return None, -(grad * near).sum(0) / ctx.eps, None


# ---------------------------------------------------------------------------------------------------- losses


@dataclass(frozen=True)
class Pass:
    """One forward pass: z and acts (n, d_sae), x_hat (n, d_out), and x (n, d_out), what x_hat is to be."""

    x: Tensor
    z: Tensor
    acts: Tensor
    x_hat: Tensor


def topk_loss(sae: SAE, made: Pass, terms: Terms) -> dict[str, Tensor]:
    """{"fvu": mean |x_hat - x|^2 / variance}: close to the fraction of variance unexplained (Gao et al. 2024)."""
    return {"fvu": squared_error(made.x_hat, made.x) / terms.variance}


def batchtopk_loss(sae: SAE, made: Pass, terms: Terms) -> dict[str, Tensor]:
    """As TopK. With option `matryoshka_widths`, {"prefixes": the sum of the same over the first w features} is added for
    each width w but the last, which is d_sae (Bussmann et al. 2025, arXiv 2503.17547; the sum as in SAELens)."""
    parts = topk_loss(sae, made, terms)
    errors = [
        squared_error(made.acts[:, :width] @ sae.W_dec[:width] + sae.b_dec, made.x)
        for width in matryoshka_widths(sae)[:-1]
    ]
    return parts | ({"prefixes": torch.stack(errors).sum() / terms.variance} if errors else {})


def standard_loss(sae: SAE, made: Pass, terms: Terms) -> dict[str, Tensor]:
    """{"mse": mean |x_hat - x|^2 / scale^2, "l1": l1 * mean sum f |W_dec| / scale} (SAELens, Anthropic April 2024)."""
    return {
        "mse": squared_error(made.x_hat, made.x) / terms.scale**2,
        "l1": terms.l1 * l1_penalty(made.acts, sae.W_dec) / terms.scale,
    }


def gated_loss(sae: SAE, made: Pass, terms: Terms) -> dict[str, Tensor]:
    """{"mse", "l1", "gate"}: g = relu(z + b_gate) bears the penalty and must reconstruct x by itself.

        l1 = l1 * mean sum g |W_dec| / scale;   gate = mean |g @ W_dec + b_dec - x|^2 / scale^2

    Rajamanoharan et al. 2024 (arXiv 2404.16014); with |W_dec| in the penalty and nothing detached, as in SAELens.
    """
    gate = (made.z + sae.tensor("b_gate")).relu()
    return {
        "mse": squared_error(made.x_hat, made.x) / terms.scale**2,
        "l1": terms.l1 * l1_penalty(gate, sae.W_dec) / terms.scale,
        "gate": squared_error(gate @ sae.W_dec + sae.b_dec, made.x) / terms.scale**2,
    }


def jumprelu_loss(sae: SAE, made: Pass, terms: Terms) -> dict[str, Tensor]:
    """{"mse", "l0": l0 * mean L0}, or with target_l0 l0 * mean 2 / target * (L0 - target)^2 (Gemma Scope 2, SAELens)."""
    counts = Count.apply(made.z, sae.tensor("threshold"), terms.bandwidth * terms.scale).sum(-1)  # type: ignore[no-untyped-call]
    target = terms.target_l0
    penalty = counts if target is None else 2 / target * (counts - target).square()
    return {"mse": squared_error(made.x_hat, made.x) / terms.scale**2, "l0": terms.l0 * penalty.mean()}


LOSSES: dict[str, Callable[[SAE, Pass, Terms], dict[str, Tensor]]] = {
    "topk": topk_loss,
    "batchtopk": batchtopk_loss,
    "standard": standard_loss,
    "gated": gated_loss,
    "jumprelu": jumprelu_loss,
    "topk_transcoder": topk_loss,
    "topk_skip_transcoder": topk_loss,
    "jumprelu_transcoder": jumprelu_loss,
    "jumprelu_skip_transcoder": jumprelu_loss,
}


def matryoshka_widths(sae: SAE) -> list[int]:
    """How many of the first features must reconstruct x by themselves; [d_sae] for an SAE that is not nested."""
    return [*sae.config.options.get("matryoshka_widths", ())] or [sae.config.d_sae]


def forward_pass(sae: SAE, x: Tensor, terms: Terms) -> Pass:
    """Codes and reconstruction of x (n, d_in), x in the space the encoder reads, with gradients for thresholds too.

    Of a transcoder x is (n, d_in + d_out), see `sides`."""
    x, goal = sides(sae, x)
    z = centre(sae, x) @ sae.W_enc
    if sae.config.architecture != "gated":
        z = z + sae.b_enc
    jump = isinstance(sae, JumpReLUSAE)
    eps = terms.bandwidth * terms.scale
    if isinstance(sae, BatchTopKSAE):
        acts = sae.activation(z, _kept(sae, z, terms.ranks))
    else:
        acts = Jump.apply(z, sae.tensor("threshold"), eps) if jump else sae.activation(z)  # type: ignore[no-untyped-call]
    x_hat = acts @ sae.W_dec + sae.b_dec
    return Pass(goal, z, acts, x_hat + F.linear(x, sae.W_skip) if isinstance(sae, Skip) else x_hat)


def centre(sae: SAE, x: Tensor) -> Tensor:
    """What W_enc is multiplied with, of x (n, d_in) in the space the encoder reads."""
    return x - sae.b_dec if sae.config.apply_b_dec_to_input else x


def _kept(sae: BatchTopKSAE, z: Tensor, ranks: Ranks) -> int:
    """How many of the codes of z (n, d_sae) are among the k * rows largest of the whole batch."""
    return ranks.keep(z.detach().relu().flatten(), int(sae.k * ranks.total(len(z))))


def trained(sae: SAE) -> dict[str, torch.nn.Parameter]:
    """The parameters that gradients change. BatchTopK's threshold follows its codes by a rule instead."""
    ruled = {"threshold"} if sae.config.architecture == "batchtopk" else set()
    return {name: tensor for name, tensor in sae.named_parameters() if name not in ruled}
