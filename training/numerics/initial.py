"""How the peers begin, as a choice: weights, thresholds and b_dec of SAELens, sparsify and dictionary_learning.

What `build_sae` makes is ours, and what is used unless a config's `initialization` names one of these. Read in sae-lens
6.54, eai-sparsify 1.3 and dictionary-learning 0.1; tests hold each against the peer's own class.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from saes.numerics.sae import SAE
from training.numerics.checkpoint import TrainingError

SAES = ("standard", "gated", "topk", "batchtopk", "jumprelu")
INITIALIZATIONS: dict[str, tuple[str, ...]] = {  # whose, and what they train
    "saelens": SAES,
    "sparsify": ("topk",),
    "dictionary_learning": SAES,
}
SAELENS_DECODER_NORM = 0.1  # decoder_init_norm; learned from there, so that decoder rows are "free"
SMALL_NORM = 0.1  # of dictionary_learning's AutoEncoder
# JumpReLU's first threshold: of SAELens for activations of mean norm sqrt(d_in), of dictionary_learning of norm 1
SAELENS_THRESHOLD, DICTIONARY_THRESHOLD = 0.01, 0.001
MEDIAN_STEPS, MEDIAN_CLOSE = 100, 1e-5


@torch.no_grad()
def begin(sae: SAE, whose: str, generator: torch.Generator) -> None:
    """Put the weights that a peer begins with into `sae`, W_enc (d_in, d_sae) and W_dec (d_sae, d_in), in place; biases 0.

    saelens: random directions, rows of W_dec at norm 0.1, W_enc = W_dec^T.
    sparsify: torch's Linear for W_enc (columns of norm about 0.58), W_dec the same directions at norm 1.
    dictionary_learning: W_enc = W_dec^T, rows at norm 1, of its ReLU autoencoder at 0.1.

    Raises TrainingError for a peer that does not train the architecture.
    """
    config = sae.config
    if config.architecture not in INITIALIZATIONS[whose]:
        raise TrainingError(
            f"{whose} trains no {config.architecture} SAE whose initialization could be used; choose another, or none."
        )
    rows = config.d_sae, config.d_in
    if whose == "sparsify":
        W_enc = _cube(*rows, generator) / config.d_in**0.5
        W_dec = normalize(W_enc, dim=-1)
    else:
        W_enc = W_dec = _directions(config.architecture, bool(config.options), whose, *rows, generator)
    sae.W_enc.copy_(W_enc.T)
    sae.W_dec.copy_(W_dec)


def _directions(
    architecture: str, nested: bool, whose: str, d_sae: int, d_in: int, generator: torch.Generator
) -> Tensor:
    """Rows (d_sae, d_in) of the norm that SAELens or dictionary_learning gives them, drawn in their order."""
    if whose == "saelens":
        return SAELENS_DECODER_NORM * normalize(_cube(d_sae, d_in, generator), dim=-1)
    if architecture in ("standard", "gated"):
        found = normalize(torch.randn(d_in, d_sae, generator=generator).T, dim=-1)
        return SMALL_NORM * found if architecture == "standard" else found
    if architecture == "jumprelu" or nested:
        return normalize(_cube(d_sae, d_in, generator), dim=-1)
    return normalize(_cube(d_in, d_sae, generator).T, dim=-1)


def _cube(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Evenly from -1 to 1: torch's kaiming_uniform_ but for the factor."""
    return torch.empty(rows, columns).uniform_(-1, 1, generator=generator)


def first_b_dec(sae: SAE, whose: str | None, goal: Tensor) -> Tensor:
    """b_dec (d_out,) from a first batch (n, d_out): the mean (ours and sparsify's), dictionary_learning's geometric
    median for the TopK kinds, or 0."""
    if whose in (None, "sparsify"):
        return goal.mean(0)
    if whose == "dictionary_learning" and sae.config.architecture in ("topk", "batchtopk"):
        return geometric_median(goal)
    return torch.zeros_like(sae.b_dec)


def geometric_median(points: Tensor) -> Tensor:
    """The point (d,) with the least sum of distances to points (n, d), by Weiszfeld's iteration from the mean."""
    guess = points.mean(0)
    for _ in range(MEDIAN_STEPS):
        weights = 1 / (points - guess).norm(dim=-1).clamp_min(torch.finfo(points.dtype).tiny)
        before, guess = guess, (weights / weights.sum()) @ points
        if (guess - before).norm() < MEDIAN_CLOSE:
            break
    return guess


def first_threshold(whose: str | None, x: Tensor, scale: float) -> float:
    """JumpReLU's, in the units of activations x (n, d_in) whose mean norm is scale * sqrt(d_in)."""
    if whose == "dictionary_learning":
        return DICTIONARY_THRESHOLD * float(x.square().sum(-1).mean().sqrt())
    return SAELENS_THRESHOLD * scale
