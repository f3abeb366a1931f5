"""A batch in parts: the gradients of a batch whose activations do not fit into memory at once."""

from collections.abc import Iterable

import torch
from torch import Tensor

from saes.numerics.sae import SAE
from training.numerics.gradients import gradients
from training.numerics.losses import Outcome, Terms
from training.numerics.threads import Scratch

MICRO_ROWS = 16  # fewer at once would not be training any more


def accumulate(sae: SAE, x: Tensor, terms: Terms, scratch: Scratch, rows: int) -> Outcome:
    """`gradients.gradients` of x (n, d_in), `rows` rows at a time, added up by their share of the batch.

    Every loss is a mean over rows, so that the sum is that of the whole batch but for rounding; the dead features' term,
    a ratio over rows, becomes the mean of the parts' ratios, and BatchTopK chooses its k a token within each part.
    """
    if rows >= len(x):
        return gradients(sae, x, terms, scratch)
    sums: dict[str, Tensor] = {}
    parts: dict[str, float] = {}
    fired = torch.zeros(sae.config.d_sae, dtype=torch.int64, device=x.device)
    squared_error, least = 0.0, []
    for part in x.split(rows):
        outcome, weight = gradients(sae, part, terms, scratch), len(part) / len(x)
        for name, grad in outcome.grads.items():
            if name in sums:
                sums[name].add_(grad, alpha=weight)
            else:
                sums[name] = grad * weight  # a copy: the scratch memory behind it is used again
        for name, value in outcome.parts.items():
            parts[name] = parts.get(name, 0.0) + weight * value
        fired += outcome.fired
        squared_error += weight * outcome.squared_error
        least.append(outcome.least)
    return Outcome(sums, parts, fired, squared_error, _least(least))


def _least(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)
