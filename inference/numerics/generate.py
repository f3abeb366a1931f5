"""Generation, one token at a time, with a key-value cache and optionally with SAE features edited on the way."""

import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from concepts.numerics.token_text import show_nul, token_texts
from inference.numerics.steer import Steering, steering_hooks
from saes.numerics.chat import ChatError, chat_text
from saes.numerics.lm import LM, hooked
from training.numerics.tokens import special_ids

MAX_NEW_TOKENS = 4096
_CONTEXT = 4  # tokens of the prompt decoded along, so that the first new piece keeps its leading space

Message = Mapping[str, str]
OnToken = Callable[[int, str], None]
Progress = Callable[[int, int | None, str], None]


class GenerationError(ValueError):
    """A generation that cannot be made as asked; the message is one sentence."""


class PromptError(GenerationError):
    """A prompt the model cannot take."""


@dataclass(frozen=True)
class TokenPolicy:
    """How the prompt became tokens. `bos`: the first is the tokenizer's BOS (by its own default, or the template)."""

    n_prompt_tokens: int
    bos: bool
    chat_template: bool


@dataclass(frozen=True)
class Generated:
    """What came out, token by token.

    ids: new token ids, a closing EOS included.  tokens: each as shown to a person (bytes as `<0xE2>`).
    pieces: the text each token completed; joined they are `text` (special tokens and unfinished characters give "").
    logprobs: log p of each chosen token under the model as steered, at temperature 1.
    stopped: "eos" or "length".  seconds: from the first forward pass to the last token.
    """

    ids: list[int]
    tokens: list[str]
    pieces: list[str]
    text: str
    logprobs: list[float]
    stopped: str
    seconds: float
    tokens_per_second: float
    prompt_ids: list[int]
    prompt_tokens: list[str]
    policy: TokenPolicy


def generate(
    lm: LM,
    prompt: str | Sequence[Message],
    *,
    steering: Sequence[Steering] = (),
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    bos: bool | None = None,
    on_token: OnToken = lambda token_id, piece: None,
    progress: Progress = lambda done, total, step: None,
) -> Generated:
    """Continue a text, or answer chat messages ({"role", "content"}) through the tokenizer's chat template.

    Temperature 0 takes the likeliest token; above it, tokens are drawn with a generator of this call's own, seeded with
    `seed`. `bos`: see `prompt_ids`. It ends after an end-of-sequence token or `max_new_tokens`. `on_token(id, piece)` is called for every token,
    `progress` too; what they raise ends the generation. Edits touch this call only, whoever else runs the model.
    Raises PromptError, GenerationError (settings; logits that are not numbers), SteeringError, UnknownHookPoint.
    """
    _check_settings(max_new_tokens, temperature, seed)
    ids, policy = prompt_ids(lm, prompt, bos)
    _check_length(lm, len(ids), max_new_tokens)
    state = _State(lm, ids, temperature, seed)
    stops = _stop_ids(lm)
    decoder = _Decoder(lm.tokenizer, ids)
    began = time.perf_counter()
    with torch.inference_mode(), ExitStack() as stack:
        if hooks := steering_hooks(lm, steering, len(ids), lambda: state.seen, state.special):
            stack.enter_context(hooked(lm, hooks))
        for done in range(1, max_new_tokens + 1):
            token = state.step()
            on_token(token, decoder.push(token))
            progress(done, max_new_tokens, "writing")
            if token in stops:
                break
    seconds = time.perf_counter() - began
    new = state.chosen
    return Generated(
        ids=new,
        tokens=token_texts(lm.tokenizer, new),
        pieces=decoder.finish(),
        text="".join(decoder.pieces),
        logprobs=state.logprobs,
        stopped="eos" if new[-1] in stops else "length",
        seconds=seconds,
        tokens_per_second=len(new) / seconds,
        prompt_ids=ids,
        prompt_tokens=token_texts(lm.tokenizer, ids),
        policy=policy,
    )


# ---------------------------------------------------------------------------------------------------- the prompt


def prompt_ids(lm: LM, prompt: str | Sequence[Message], bos: bool | None = None) -> tuple[list[int], TokenPolicy]:
    """Token ids of a prompt and how they came to be.

    A text gets the special tokens its tokenizer adds by default; with `bos` True or False it begins with the tokenizer's
    BOS, where it has one, or without. A chat gets those of its template and no others. Raises PromptError for a prompt
    without text, or chat messages the template does not take.
    """
    chat = not isinstance(prompt, str)
    text = _render(lm, prompt) if not isinstance(prompt, str) else prompt
    if not text:
        raise PromptError("The prompt is empty; write at least one word.")
    ids = lm.tokenizer(text, add_special_tokens=not chat, verbose=False)["input_ids"]
    if not ids:
        raise PromptError("The prompt holds no token the model knows; write at least one word.")
    if max(ids) >= lm.vocab_size:
        raise PromptError(
            f"The prompt holds token {max(ids)}, which is outside the model's {lm.vocab_size:,} embeddings."
        )
    ids = ids if chat or bos is None else _with_bos(lm, ids, bos)
    return ids, TokenPolicy(len(ids), ids[0] == lm.tokenizer.bos_token_id, chat)


def _with_bos(lm: LM, ids: list[int], wanted: bool) -> list[int]:
    own = lm.tokenizer.bos_token_id
    if own is None or (ids[0] == own) == wanted:
        return ids
    if wanted:
        return [own, *ids]
    if len(ids) == 1:
        raise PromptError("The text holds no token besides BOS; write at least one word.")
    return ids[1:]


def _render(lm: LM, messages: Sequence[Message]) -> str:
    if not messages or not any(message.get("content") for message in messages):
        raise PromptError("The chat is empty; write at least one message.")
    if not lm.tokenizer.chat_template:
        raise PromptError(f"{lm.name or 'This model'} has no chat template; give the prompt as plain text.")
    try:
        return chat_text(lm.tokenizer, [dict(message) for message in messages], add_generation_prompt=True)
    except ChatError as error:
        raise PromptError(str(error)) from error


def _check_length(lm: LM, n_prompt: int, max_new_tokens: int) -> None:
    if lm.max_context is not None and n_prompt + max_new_tokens > lm.max_context:
        raise PromptError(
            f"The prompt has {n_prompt:,} tokens and {max_new_tokens:,} new ones were asked for, but "
            f"{lm.name or 'this model'} reads at most {lm.max_context:,} in all; shorten one of them."
        )


def _check_settings(max_new_tokens: int, temperature: float, seed: int) -> None:
    if not 1 <= max_new_tokens <= MAX_NEW_TOKENS:
        raise GenerationError(f"The number of new tokens is {max_new_tokens}; choose one from 1 to {MAX_NEW_TOKENS:,}.")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise GenerationError(f"The temperature is {temperature}; choose 0 or a positive number.")
    if not 0 <= seed < 2**63:
        raise GenerationError(f"The seed is {seed}; choose a whole number from 0 to 2^63 - 1.")


def _stop_ids(lm: LM) -> set[int]:
    """The ids that end a text: of the model's generation config (one or several) and of the tokenizer."""
    configured = getattr(lm.model.generation_config, "eos_token_id", None)
    several = configured if isinstance(configured, list) else [configured]
    return {stop for stop in [*several, lm.tokenizer.eos_token_id] if stop is not None}


# ---------------------------------------------------------------------------------------------------- the loop


class _State:
    """One generation under way: its cache, the tokens in it (`seen`), and what was chosen so far."""

    def __init__(self, lm: LM, ids: list[int], temperature: float, seed: int) -> None:
        self.model = lm.model
        self.next = torch.tensor([ids], device=lm.device)
        self.temperature = temperature
        self.generator = torch.Generator().manual_seed(seed)
        self.cache: Any = None
        self.seen = 0
        self.prompt = ids
        self.control = special_ids(lm.tokenizer)
        self.chosen: list[int] = []
        self.logprobs: list[float] = []
        parameters = inspect.signature(lm.model.forward).parameters
        # a long prompt's logits at every position would take gigabytes
        self.options = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}

    def step(self) -> int:
        """Run the model on what it has not seen yet and choose the next token."""
        out = self.model(input_ids=self.next, past_key_values=self.cache, use_cache=True, **self.options)
        self.cache = out.past_key_values
        self.seen += self.next.shape[1]
        logits = out.logits[0, -1].float().cpu()
        if not logits.isfinite().all():
            raise GenerationError("The model's logits are no longer finite numbers; use smaller steering values.")
        token = self._choose(logits)
        self.chosen.append(token)
        self.logprobs.append(float(logits.log_softmax(0)[token]))
        self.next = torch.tensor([[token]], device=self.next.device)
        return token

    def special(self, start: int, n: int) -> list[bool]:
        """Which of the n tokens from position `start` are control tokens."""
        text = (*self.prompt[start : start + n], *self.chosen[max(0, start - len(self.prompt)) :])[:n]
        return [token in self.control for token in text]

    def _choose(self, logits: Tensor) -> int:
        if self.temperature == 0:
            return int(logits.argmax())
        logits = (logits - logits.max()).double() / self.temperature  # stays a number for the smallest temperature
        return int(torch.multinomial(logits.softmax(0), 1, generator=self.generator))


class _Decoder:
    """Token ids to text, piece by piece; a character split over several tokens comes with the last of them."""

    def __init__(self, tokenizer: Any, prompt: list[int]) -> None:
        self.tokenizer = tokenizer
        self.ids = prompt[-_CONTEXT:]
        self.shown = len(self._text())
        self.pieces: list[str] = []

    def push(self, token: int) -> str:
        self.ids.append(token)
        text = self._text()
        piece = "" if text.endswith("\N{REPLACEMENT CHARACTER}") else text[self.shown :]
        self.shown += len(piece)
        self.pieces.append(piece)
        return piece

    def finish(self) -> list[str]:
        """All pieces; an unfinished character at the very end is added as the replacement character."""
        self.pieces[-1] += self._text()[self.shown :]
        return self.pieces

    def _text(self) -> str:
        return show_nul(self.tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
