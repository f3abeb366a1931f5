"""Which features fire on a text: one plain forward pass, read by every SAE on the way. Nothing is changed in the model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from concepts.numerics.token_text import token_texts
from inference.numerics.generate import Message, TokenPolicy, prompt_ids
from saes.numerics.lm import LM, hooked
from saes.numerics.sae import SAE
from training.numerics.tokens import special_ids

DENSE_NUMBERS = 1 << 24  # codes held densely at a time: 64 MB in float32
MOST_LOGITS = 1 << 28  # logits held at a time: 1 GB in float32


class InferError(ValueError):
    """A text that cannot be read as asked; the message is one sentence."""


@dataclass(frozen=True)
class Reader:
    """An SAE and the hook point it reads."""

    sae: SAE
    hook_name: str


@dataclass(frozen=True)
class Codes:
    """Every code that fires, token by token: those of token i are rows start[i] to start[i + 1], largest first.

    start (t + 1,) int64;  features (f,) int32;  values (f,) float32
    """

    start: np.ndarray
    features: np.ndarray
    values: np.ndarray

    def strongest(self, k: int) -> "Codes":
        """The k first of every token."""
        rank = np.arange(len(self.features)) - np.repeat(self.start[:-1], np.diff(self.start))
        kept = rank < k
        start = np.concatenate([[0], np.minimum(np.diff(self.start), k).cumsum()])
        return Codes(start, self.features[kept], self.values[kept])


@dataclass(frozen=True)
class Likely:
    """The k likeliest tokens after each of t tokens, at temperature 1, and what really came.

    ids (t, k) int32;  logits, probabilities (t, k) float32;  logprobs (t,): log p of token i given those before it, NaN
    for the first.
    """

    ids: np.ndarray
    logits: np.ndarray
    probabilities: np.ndarray
    logprobs: np.ndarray


@dataclass(frozen=True)
class Inferred:
    """ids, tokens, special (t,): the text as the model saw it, as a person reads it, and which are control tokens.

    codes: one of each reader, in their order.
    """

    ids: list[int]
    tokens: list[str]
    special: list[bool]
    codes: list[Codes]
    likely: Likely | None


def infer(lm: LM, readers: Sequence[Reader], ids: Sequence[int], *, likely: int = 0) -> Inferred:
    """Codes of one text on several SAEs, and with `likely` the likeliest next tokens after each of its tokens.

    Raises InferError (an SAE that does not fit its hook point; activations that are no numbers), LMError (tokens the
    model cannot take, no such hook point).
    """
    check_readers(lm, readers)
    batch = torch.tensor([list(ids)], dtype=torch.int64)
    if likely:
        codes, logits = _whole_pass(lm, readers, batch)
    else:
        seen, logits = lm.activations(batch, list({reader.hook_name for reader in readers})), None
        codes = [read(reader.sae, seen[reader.hook_name][0]) for reader in readers]
    control = special_ids(lm.tokenizer)
    return Inferred(
        ids=list(ids),
        tokens=token_texts(lm.tokenizer, ids),
        special=[i in control for i in ids],
        codes=codes,
        likely=None if logits is None else _likely(logits, batch[0], likely),
    )


def infer_many(lm: LM, readers: Sequence[Reader], texts: Sequence[Sequence[int]]) -> list[list[Codes]]:
    """Codes of several texts in one padded pass: for each text, one Codes of each reader. Raises as `infer`.

    Padding is on the right and masked, so that no token sees it and positions count from the text's own start.
    """
    check_readers(lm, readers)
    lengths = [len(ids) for ids in texts]
    batch = torch.zeros(len(texts), max(lengths), dtype=torch.int64)
    mask = torch.zeros_like(batch)
    for row, ids in enumerate(texts):
        batch[row, : len(ids)] = torch.tensor(list(ids))
        mask[row, : len(ids)] = 1
    padded = None if mask.all() else mask
    seen = lm.activations(batch, list({reader.hook_name for reader in readers}), padded)
    return [[read(reader.sae, seen[reader.hook_name][row, :n]) for reader in readers] for row, n in enumerate(lengths)]


def check_readers(lm: LM, readers: Sequence[Reader]) -> None:
    """Raises InferError when an SAE does not fit the model at its hook point, UnknownHookPoint without one."""
    for reader in readers:
        d, d_in = lm.resolve(reader.hook_name).d, reader.sae.config.d_in
        if d != d_in:
            raise InferError(
                f"The SAE reads vectors of {d_in} numbers, but {reader.hook_name} of {lm.name or 'this model'} has {d}; "
                "choose the model the SAE was trained on."
            )


@torch.inference_mode()
def read(sae: SAE, x: Tensor) -> Codes:
    """All codes that fire on x (t, d_in), the activations of one text in order.

    Encoded in pieces, so that the dense codes of a wide SAE never have to fit into memory at once; an SAE whose codes
    depend on earlier positions is given the whole text. Raises InferError for activations that are no numbers.
    """
    if not x.isfinite().all():
        raise InferError("The model's activations on this text are not finite numbers.")
    x = x.to(sae.W_dec.device)
    rows = max(1, DENSE_NUMBERS // sae.config.d_sae) if sae.row_by_row else max(1, len(x))
    counts, features, values = [], [], []
    for part in x.split(rows):
        found, indices = sae.encode_sparse(part)
        fires = found != 0
        counts.append(fires.sum(-1).cpu())
        features.append(indices[fires].int().cpu())
        values.append(found[fires].float().cpu())
    start = np.concatenate([[0], torch.cat(counts).numpy().cumsum()]).astype(np.int64)
    return Codes(start, torch.cat(features).numpy(), torch.cat(values).numpy())


@torch.inference_mode()
def _whole_pass(lm: LM, readers: Sequence[Reader], batch: Tensor) -> tuple[list[Codes], Tensor]:
    """Codes of every reader and logits (t, vocabulary) of one pass. Each SAE reads where the model passes by."""
    lm.activations(batch, [])  # refuses tokens the model cannot take
    if batch.shape[1] * lm.vocab_size > MOST_LOGITS:
        fits = MOST_LOGITS // lm.vocab_size
        raise InferError(
            f"Probabilities after each of {batch.shape[1]:,} tokens over {lm.vocab_size:,} words do not fit; up to "
            f"{fits:,} tokens do, or leave the probabilities off."
        )
    at: dict[str, list[int]] = {}
    for number, reader in enumerate(readers):
        at.setdefault(lm.resolve(reader.hook_name).name, []).append(number)
    codes: dict[int, Codes] = {}

    def recorder(numbers: list[int]) -> Callable[[Tensor], None]:
        def record(x: Tensor) -> None:
            codes.update({number: read(readers[number].sae, x[0]) for number in numbers})

        return record

    with hooked(lm, {name: recorder(numbers) for name, numbers in at.items()}):
        logits = lm.model(input_ids=batch.to(lm.device), use_cache=False).logits[0]
    return [codes[number] for number in range(len(readers))], logits


def _likely(logits: Tensor, ids: Tensor, k: int) -> Likely:
    """In pieces of positions: the probabilities of a long text over a large vocabulary take gigabytes."""
    ids = ids.to(logits.device)
    top, probabilities, found, logprobs = [], [], [], [torch.full((1,), float("nan"))]
    for start in range(0, len(logits), 128):
        part = logits[start : start + 128].float()
        if not part.isfinite().all():
            raise InferError("The model's logits on this text are not finite numbers.")
        logs = part.log_softmax(-1)
        values, indices = part.topk(min(k, part.shape[-1]), dim=-1)
        top.append(values.cpu())
        found.append(indices.int().cpu())
        probabilities.append(logs.gather(-1, indices).exp().cpu())
        following = ids[start + 1 : start + 1 + len(part)]
        logprobs.append(logs[: len(following)].gather(-1, following[:, None])[:, 0].cpu())
    return Likely(
        ids=torch.cat(found).numpy(),
        logits=torch.cat(top).numpy(),
        probabilities=torch.cat(probabilities).numpy(),
        logprobs=torch.cat(logprobs).numpy(),
    )


def text_ids(lm: LM, prompt: str | Sequence[Message], prepend_bos: bool) -> tuple[list[int], TokenPolicy]:
    """Token ids of a text to read. With `prepend_bos` a plain text begins with the tokenizer's BOS, where it has one, as
    the contexts of captures do; a chat gets the special tokens of its template. Raises PromptError."""
    return prompt_ids(lm, prompt, prepend_bos)
