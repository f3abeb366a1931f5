"""One steered generation at several strengths: how far the text follows the features, and when it breaks."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import mean

from inference.numerics.generate import Generated, GenerationError, Message, PromptError, generate
from inference.numerics.quality import plain_reading, repetition, zlib_ratio
from inference.numerics.steer import Edit, Steering
from saes.numerics.lm import LM

Progress = Callable[[int, int | None, str], None]


@dataclass(frozen=True)
class Point:
    """What came out at one factor. `effect`: mean code of the edited features when the plain model reads the new tokens.

    `error` says why there is no text: nothing else is known then.
    """

    factor: float
    ids: list[int]
    text: str
    mean_plain_logprob: float | None
    repetition: float | None
    zlib_ratio: float | None
    effect: float | None
    error: str = ""


def scaled(edit: Edit, factor: float) -> Edit:
    """The edit at `factor` times its strength: v * factor, and for scale, whose neutral value is 1, 1 + (v - 1) * factor.

    Ablate has no strength and stays as it is.
    """
    value = 1 + (edit.value - 1) * factor if edit.mode == "scale" else edit.value * factor
    return edit if edit.mode == "ablate" else replace(edit, value=value)


def sweep(
    lm: LM,
    prompt: str | Sequence[Message],
    steering: Sequence[Steering],
    factors: Sequence[float],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    progress: Progress = lambda done, total, step: None,
) -> Iterator[Point]:
    """A Point for every factor, in their order. A factor at which the model breaks gives a point that says so.

    Raises PromptError, SteeringError, UnknownHookPoint, and whatever `progress` raises.
    """
    for factor in factors:
        strong = [replace(one, edits=[scaled(edit, factor) for edit in one.edits]) for one in steering]
        try:
            made = generate(
                lm, prompt, steering=strong, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
                progress=progress,
            )  # fmt: skip
        except PromptError:
            raise
        except GenerationError as error:
            yield Point(factor, [], "", None, None, None, None, str(error))
            continue
        yield _point(lm, factor, made, strong)


def _point(lm: LM, factor: float, made: Generated, steering: Sequence[Steering]) -> Point:
    read = plain_reading(lm, made.prompt_ids, made.ids, steering)
    effects = [effect for each in read.effects for effect in each]
    return Point(
        factor=factor,
        ids=made.ids,
        text=made.text,
        mean_plain_logprob=mean(read.logprobs),
        repetition=repetition(made.ids),
        zlib_ratio=zlib_ratio(made.text),
        effect=mean(effects) if effects else None,
    )
