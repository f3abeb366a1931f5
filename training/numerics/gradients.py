"""The gradients of a batch, by the fastest way there is: compiled kernels on a CPU (sparse.py, dense.py), TopK's in plain
torch (topk_plain.py), else autograd, which is the reference for all of them."""

import torch
from torch import Tensor

from saes.numerics.sae import SAE
from saes.numerics.topk import BatchTopKSAE, TopKSAE
from training.numerics.compiled import kernels
from training.numerics.dead_features import dead_gradients, dead_part
from training.numerics.dense import dense_gradients
from training.numerics.losses import (
    LOSSES,
    Outcome,
    Terms,
    centre,
    forward_pass,
    matryoshka_widths,
    squared_error,
    trained,
)
from training.numerics.row_gradients import PairGradients
from training.numerics.sparse import (
    Encoder,
    by_feature,
    choose,
    chosen_by_norm,
    decode,
    products_are_rounded,
    skip_gradient,
)
from training.numerics.threads import Scratch
from training.numerics.topk_plain import topk_gradients
from training.numerics.transcoding import sides


def gradients(sae: SAE, x: Tensor, terms: Terms, scratch: Scratch | None = None) -> Outcome:
    """Gradients of the architecture's loss on a batch x (n, d_in), x in the space the encoder reads (normalised).

    Of a transcoder x is (n, d_in + d_out), see `transcoding.sides`. The fastest way there is for it. With
    `scratch`, which the caller keeps from step to step, the outcome's gradients are good until the next call.
    """
    on_cpu = sae.W_dec.device.type == "cpu" and sae.W_dec.dtype == torch.float32
    if on_cpu and kernels():
        if isinstance(sae, TopKSAE | BatchTopKSAE):
            return pair_gradients(sae, x, terms, scratch or Scratch())
        if products_are_rounded():
            return dense_gradients(sae, x, terms, scratch or Scratch())
    with torch.autocast(sae.W_dec.device.type, torch.bfloat16, enabled=terms.autocast):
        if isinstance(sae, TopKSAE) and not sae.by_norm:
            return topk_gradients(sae, x, terms)
        return autograd_gradients(sae, x, terms)


def autograd_gradients(sae: SAE, x: Tensor, terms: Terms) -> Outcome:
    """The reference: the loss as written, differentiated by torch. Dense in (n, d_sae)."""
    parameters = trained(sae)
    with torch.enable_grad():
        made = forward_pass(sae, x, terms)
        parts = LOSSES[sae.config.architecture](sae, made, terms)
        centred = centre(sae, sides(sae, x)[0]).detach()
        parts |= dead_part(sae, centred, (made.x - made.x_hat).detach(), terms)
        total = torch.stack(list(parts.values())).sum()
        found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    grads = {
        name: torch.zeros_like(tensor) if grad is None else grad
        for (name, tensor), grad in zip(parameters.items(), found, strict=True)
    }
    grads["W_enc"] = grads["W_enc"].t().contiguous()
    numbers = {name: part.item() for name, part in parts.items()}
    fired = made.acts > 0
    least = None
    if sae.config.architecture == "batchtopk" and fired.any():  # in the units that codes are chosen in
        weighed = made.acts * sae.W_dec.norm(dim=-1) if chosen_by_norm(sae) else made.acts
        least = weighed.detach()[fired].min().item()
    return Outcome(grads, numbers, fired.sum(0), squared_error(made.x_hat, made.x).item(), least)


@torch.no_grad()
def pair_gradients(sae: SAE, x: Tensor, terms: Terms, scratch: Scratch) -> Outcome:
    """`topk_gradients` by compiled kernels, for TopK SAEs and transcoders and for BatchTopK, nested or not.

    With products of precision "fast" the encoder's inputs, and x and the residual where gradients are summed from them,
    are rounded to bfloat16; x_hat, the residual, Adam and all sums are float32.
    """
    rows, x, n, fast = x, sides(sae, x)[0], len(x), products_are_rounded()
    encoder = Encoder(sae, x, fast, scratch)
    pairs = choose(sae, encoder, n, scratch, terms.ranks)
    scale, widths = 2 / (n * terms.variance), matryoshka_widths(sae)
    residual, close, totals, errors, dz = decode(sae, rows, pairs, widths, scale, fast, scratch)
    ordered = by_feature(pairs, dz, sae.config.d_sae, scratch)
    parts = {"fvu": float(errors[-1]) / terms.variance}
    parts |= {"prefixes": float(errors[:-1].sum()) / terms.variance} if len(widths) > 1 else {}
    extra: dict[str, Tensor] = {}
    if len(terms.dead) and terms.aux:
        dead, extra = dead_gradients(sae, x, -residual[-1], terms, scratch)
        parts |= dead
    others = {"b_dec": totals[0] * scale} | skip_gradient(sae, rows, residual[0], scale, scratch)
    grads = PairGradients(sae, ordered, encoder.centred, close, scale, widths, others, terms.dead, extra, scratch)
    return Outcome(grads, parts, ordered[0].diff(), float(errors[-1]), pairs.least)
