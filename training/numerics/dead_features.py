"""What is added to every loss for dead features, and its gradients: by autograd, or by the kernels.

The live features leave a residual; the dead ones are to reconstruct it (Gao et al. 2024, arXiv 2406.04093, appendix A.2).
"""

import torch
from torch import Tensor

from saes.numerics.sae import SAE, SAEConfig
from saes.numerics.topk import TopKSAE
from training.numerics.losses import Terms, centre, squared_error
from training.numerics.ranks import ALONE, Ranks
from training.numerics.row_gradients import PairGradients
from training.numerics.sparse import Encoder, bias_of, by_feature, choose, chosen_by_norm, decode, products_are_rounded
from training.numerics.threads import Scratch


def auxk(
    error: Tensor, z_dead: Tensor, W_dead: Tensor, k_aux: int, ranks: Ranks = ALONE, by_norm: bool = False
) -> Tensor:
    """How badly the dead features alone reconstruct what the live ones left over; 0 at best.

        A = min(m / k_aux, 1) * sum |e - e_hat|^2 / sum |e|^2,   e_hat = topk(z_dead, k_aux) @ W_dead

    with e (n, d_out) the detached residual, z_dead (n, m) the pre-activations of the m dead features, chosen without
    relu so that features whose z is negative everywhere are reached too, W_dead (m, d_out). With `by_norm` chosen by
    z |W_dead row|.
    Gao et al. 2024, appendix A.2; the scale for few dead features and the choice without relu as in SAELens.
    """
    m = z_dead.shape[-1]
    order = z_dead.detach() * W_dead.detach().norm(dim=-1) if by_norm else z_dead
    indices = order.topk(min(k_aux, m), dim=-1, sorted=False).indices
    e_hat = torch.zeros_like(z_dead).scatter(-1, indices, z_dead.gather(-1, indices)) @ W_dead
    size = ranks.mean(error.square().sum(-1).mean()).clamp_min(torch.finfo(error.dtype).tiny)
    return min(m / k_aux, 1.0) * squared_error(e_hat, error) / size


def k_aux(sae: SAE) -> int:
    """How many dead features reconstruct a row's residual: k for TopK, else d_in / 2 (SAELens, dictionary_learning).

    Theirs is d_in / 2 for TopK too, whose revived features are too weak to be chosen or disturb the live ones. Measured
    on 262k tokens, 576 x 16,384, lr 4e-3: without the term FVU 0.132 and 2,174 features silent for 100k tokens; with
    d_in / 2 0.175 and 0; with k 0.134 and 362.
    """
    return max(int(sae.config.k), 1) if sae.config.k else max(sae.config.d_in // 2, 1)


def dead_part(sae: SAE, centred: Tensor, error: Tensor, terms: Terms) -> dict[str, Tensor]:
    """{"aux": aux * auxk} when there are dead features, else {}. Reaches no parameter but those of dead features."""
    if not terms.aux or not len(terms.dead):
        return {}
    z_dead = centred @ sae.W_enc[:, terms.dead] + sae.tensor(bias_of(sae))[terms.dead]
    part = auxk(error, z_dead, sae.W_dec[terms.dead], k_aux(sae), terms.ranks, chosen_by_norm(sae))
    return {"aux": terms.aux * part}


def dead_gradients(
    sae: SAE, x: Tensor, error: Tensor, terms: Terms, scratch: Scratch | None = None
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The dead features' part of the loss and its gradients, those features' rows alone: by autograd on their slices, or
    with `scratch` by the kernels."""
    dead, bias = terms.dead, bias_of(sae)
    slices = {"W_enc": sae.W_enc.t()[dead], bias: sae.tensor(bias)[dead], "W_dec": sae.W_dec[dead]}
    if scratch is not None:
        return _dead_pairs(sae, x, error, terms, slices, scratch.of("dead"))
    with torch.enable_grad():
        W_enc, b_enc, W_dec = leaves = [part.detach().requires_grad_() for part in slices.values()]
        z_dead = centre(sae, x).detach() @ W_enc.t() + b_enc
        part = terms.aux * auxk(error, z_dead, W_dec, k_aux(sae), terms.ranks, chosen_by_norm(sae))
        found = torch.autograd.grad(part, leaves)
    return {"aux": part.item()}, dict(zip(slices, found, strict=True))


def _dead_pairs(
    sae: SAE, x: Tensor, error: Tensor, terms: Terms, slices: dict[str, Tensor], scratch: Scratch
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The same by kernels: the dead features are a TopK SAE of their own, which reconstructs the error."""
    m, most = len(terms.dead), k_aux(sae)
    config = SAEConfig("topk", sae.config.d_in, m, d_out=sae.config.d_out, k=min(most, m), apply_b_dec_to_input=False)
    little = TopKSAE(config)
    little.by_norm = chosen_by_norm(sae)
    W_enc, b_enc, W_dec = slices.values()
    little.W_enc.data, little.b_enc.data, little.W_dec.data = W_enc.t(), b_enc, W_dec
    encoder = Encoder(little, centre(sae, x), products_are_rounded(), scratch)
    pairs = choose(little, encoder, len(x), scratch, positive=False)
    size = float(terms.ranks.mean(error.square().sum(-1).mean()).clamp_min(torch.finfo(error.dtype).tiny))
    weight = terms.aux * min(m / most, 1.0) / size
    scale = 2 * weight / len(x)
    made = decode(little, error, pairs, [m], scale, encoder.fast, scratch)
    grads = PairGradients(
        little,
        by_feature(pairs, made.dz, m, scratch),
        encoder.centred,
        made.close,
        scale,
        [m],
        {"b_dec": little.b_dec},
        terms.dead,
        {},
        scratch,
    )
    found = (grads["W_enc"], grads["b_enc"], grads["W_dec"])
    return {"aux": weight * float(made.errors[0])}, dict(zip(slices, found, strict=True))
