"""How a generated text reads: likely to the plain model, or in circles. Both say when steering broke the model.

And what an edit reached: how strongly its feature fires when the plain model reads the text that came out.
"""

import inspect
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inference.numerics.steer import Steering, SteeringHook
from saes.numerics.lm import LM, hooked

# What the figures of a text are, by the ids they are shown and exported with.
DEFINITIONS = {
    "plain_perplexity_1": "exp(-mean natural log p) of the new tokens under the model without edits, temperature 1",
    "repetition_3gram_1": "share of 3-grams of new token ids that repeat an earlier one: 1 - distinct / all",
    "zlib_ratio_9_1": "bytes of the new text compressed by zlib level 9 / bytes of the text as UTF-8",
    "plain_effect_1": "mean code of the edited features over the new tokens, read by the model without edits",
}


@dataclass(frozen=True)
class PlainReading:
    """A text read by the model without edits.

    logprobs: log p of each new token, natural logarithm, temperature 1.
    effects: for each Steering and each of its edits, the mean code of the feature over the new tokens.
    """

    logprobs: list[float]
    effects: list[list[float]]


@torch.inference_mode()
def plain_reading(
    lm: LM, prompt_ids: Sequence[int], new_ids: Sequence[int], steering: Sequence[Steering] = ()
) -> PlainReading:
    """One forward pass over prompt and new tokens, nothing edited, the features of `steering` read on the way."""
    if not new_ids:
        return PlainReading([], [[] for _ in steering])
    ids = torch.tensor([[*prompt_ids, *new_ids]], device=lm.device)
    kept = len(new_ids) + 1
    parameters = inspect.signature(lm.model.forward).parameters
    # a long prompt's logits at every position would take gigabytes
    options = {"logits_to_keep": kept} if "logits_to_keep" in parameters else {}
    effects: list[list[float]] = [[] for _ in steering]
    readers: dict[str, list[Callable[[Tensor], None]]] = {}
    for number, one in enumerate(steering):
        if one.edits:
            reader = _reader(effects, number, one, len(prompt_ids))
            readers.setdefault(lm.resolve(one.hook_name).name, []).append(reader)
    with hooked(lm, {name: _each(several) for name, several in readers.items()}):
        logits = lm.model(input_ids=ids, use_cache=False, **options).logits[0, -kept:-1].float()
    logprobs = logits.log_softmax(-1).gather(1, ids[0, len(prompt_ids) :, None]).squeeze(1).tolist()
    return PlainReading(logprobs, effects)


def _reader(effects: list[list[float]], number: int, one: Steering, start: int) -> Callable[[Tensor], None]:
    hook = SteeringHook(one.sae, one.edits)

    def read(x: Tensor) -> None:
        effects[number] = hook.codes(x[:, start:].to(hook.ids.device)).mean((0, 1)).tolist()

    return read


def _each(several: Sequence[Callable[[Tensor], None]]) -> Callable[[Tensor], None]:
    def read(x: Tensor) -> None:
        for one in several:
            one(x)

    return read


def repetition(ids: Sequence[int], n: int = 3) -> float | None:
    """Share of n-grams of token ids that repeat an earlier one: 1 - distinct / all. None when there is no n-gram."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else None


def zlib_ratio(text: str) -> float | None:
    """Bytes of the text compressed (zlib, level 9) / bytes of the text: small where it repeats itself. None for no text.

    A few words cannot be compressed, so that short texts come out near or above 1.
    """
    raw = text.encode()
    return len(zlib.compress(raw, 9)) / len(raw) if raw else None
