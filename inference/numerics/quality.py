"""How a generated text reads: likely to the plain model, or in circles. Both say when steering broke the model."""

import inspect
from collections.abc import Sequence

import torch

from saes.numerics.lm import LM


@torch.inference_mode()
def plain_logprobs(lm: LM, prompt_ids: Sequence[int], new_ids: Sequence[int]) -> list[float]:
    """log p of each new token under the model without edits, given the prompt and the new tokens before it.

    One forward pass over prompt and new tokens. Natural logarithm, temperature 1.
    """
    if not new_ids:
        return []
    ids = torch.tensor([[*prompt_ids, *new_ids]], device=lm.device)
    kept = len(new_ids) + 1
    parameters = inspect.signature(lm.model.forward).parameters
    # a long prompt's logits at every position would take gigabytes
    options = {"logits_to_keep": kept} if "logits_to_keep" in parameters else {}
    logits = lm.model(input_ids=ids, use_cache=False, **options).logits[0, -kept:-1].float()
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt_ids) :, None]).squeeze(1).tolist()


def repetition(ids: Sequence[int], n: int = 3) -> float | None:
    """Share of n-grams of token ids that repeat an earlier one: 1 - distinct / all. None when there is no n-gram."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else None
