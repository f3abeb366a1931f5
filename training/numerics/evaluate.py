"""How good an SAE is, on activations it was not trained on: every number with its definition, its n and its data.

On a capture's held-out contexts, or on any texts: the model then runs over them and nothing is stored.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saes.numerics.lm import LM
from saes.numerics.sae import SAE
from training.numerics.capture import arrays, kept_of
from training.numerics.definitions import EvaluationError, Metric, metric
from training.numerics.documents import Document
from training.numerics.predictions import Contexts, Splice, predictions
from training.numerics.reconstruction import Firing, Rows, reconstruction
from training.numerics.shards import Capture, Split, is_held_out
from training.numerics.tokens import TokenPolicy, iter_contexts, special_ids, stored_mask

Progress = Callable[[int, int | None, str], None]


@dataclass(frozen=True)
class Measured:
    """The metrics {name: {"value", "definition", "n", "data"}}, and how often each feature fired on how many tokens."""

    metrics: dict[str, Metric]
    firing: Firing
    n: int


def evaluate(
    sae: SAE,
    x_batches: Iterable[Tensor | Rows],
    *,
    lm: LM | None = None,
    contexts: np.ndarray | None = None,
    replaced: np.ndarray | None = None,
    hook_name: str | None = None,
    data: str = "",
    batch_contexts: int = 4,
    total: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Metric]:
    """Metrics {name: {"value", "definition", "n", "data"}} of an SAE.

    `definition` is a key of DEFINITIONS; `value` is None where it is not defined (a ratio to nothing).

    x_batches: (n, d_in) float32, in the model's own activation space; Rows for a transcoder, whose output is compared
    with their goal. With `lm` and `contexts` (c, t) token ids, also what the reconstruction does to the model's
    predictions at `hook_name` (the SAE's own unless given); `replaced` (c, t) is False at positions to leave untouched.
    n counts tokens for the former, predictions for the latter. progress(done, total, step) is called per batch and may
    raise. Raises EvaluationError for no data, NaN, or a width that does not fit the SAE.
    """
    given = None
    if contexts is not None:
        given = Contexts(contexts, np.ones(contexts.shape, dtype=bool) if replaced is None else replaced)
    reads = hook_name or sae.config.hook_name
    place = (reads, reads)
    found = _measure(sae, x_batches, lm, lambda: given, place, data, batch_contexts, total, progress or _silent)
    return found.metrics


def measure_capture(
    sae: SAE,
    capture: Capture,
    hook: str | None = None,
    *,
    goal_hook: str | None = None,
    split: Split = "held_out",
    max_rows: int | None = None,
    lm: LM | None = None,
    max_contexts: int = 64,
    batch_size: int = 4096,
    progress: Progress | None = None,
) -> Measured:
    """`evaluate` on a split of a capture: at most `max_rows` rows, and with `lm` at most `max_contexts` contexts.

    goal_hook: what a transcoder's output is compared with, where the capture holds it too. Of the contexts whose
    predictions are compared, the tokens are replaced whose activations the capture stores.
    """
    hook = hook or sae.config.hook_name
    goal_hook = None if goal_hook == hook else goal_hook
    rows = min(capture.split_rows(split), max_rows or capture.split_rows(split))
    contexts = None if lm is None else _contexts_of(capture, hook, split, max_contexts)
    data = f"{split.replace('_', '-')} contexts of capture {capture.manifest['run_id']}"
    stream = _rows_of(capture, hook, goal_hook, split, batch_size, rows)
    return _measure(
        sae, stream, lm, lambda: contexts, (hook, goal_hook or hook), data, 4, rows, progress or _silent
    )  # fmt: skip


def measure_texts(
    sae: SAE,
    lm: LM,
    texts: Iterable[Document],
    policy: TokenPolicy,
    *,
    hook_name: str | None = None,
    goal_hook: str | None = None,
    max_tokens: int | None = None,
    max_contexts: int = 64,
    batch_contexts: int = 8,
    data: str = "",
    progress: Progress | None = None,
) -> Measured:
    """`evaluate` on texts: the model runs over them once for the activations, and over the first `max_contexts` contexts
    again for its predictions; nothing is stored. Stops after the context that brings the tokens to `max_tokens`.

    Raises CorpusError for texts that do not fill one context, EvaluationError as `evaluate`.
    """
    hook = lm.resolve(hook_name or sae.config.hook_name).name
    goal = lm.resolve(goal_hook).name if goal_hook else hook
    special = sorted(special_ids(lm.tokenizer))
    kept: list[tuple[np.ndarray, np.ndarray, int]] = []  # ids and replaced (t,), and how many are not padding

    def stream() -> Iterator[Rows]:
        first = rows = 0
        contexts = iter_contexts(texts, lm.tokenizer, policy)
        while batch := list(itertools.islice(contexts, batch_contexts)):
            ids, lengths = arrays(batch, policy)
            stored = stored_mask(ids, policy, special, lengths, kept_of(batch))
            if max_tokens is not None:
                last = np.searchsorted(rows + stored.sum(1).cumsum(), max_tokens) + 1
                ids, stored = ids[:last], stored[:last]
            ends = [ids.shape[1]] * len(ids) if lengths is None else lengths.tolist()
            kept.extend(list(zip(ids, stored, ends, strict=False))[: max(0, max_contexts - len(kept))])
            x = lm.activations(torch.from_numpy(ids).long(), sorted({hook, goal}))
            mask = torch.from_numpy(stored).to(lm.device)
            number = np.repeat(np.arange(first, first + len(ids)), stored.sum(1))
            yield Rows(x[hook][mask].float(), x[goal][mask].float() if goal != hook else None, number)
            first, rows = first + len(ids), rows + int(stored.sum())
            if max_tokens is not None and rows >= max_tokens:
                return

    def contexts() -> Contexts | None:
        ids, replaced, lengths = zip(*kept, strict=True)
        return Contexts(np.stack(ids), np.stack(replaced), np.array(lengths))

    return _measure(
        sae, stream(), lm, contexts, (hook, goal), data, min(4, batch_contexts), max_tokens, progress or _silent
    )  # fmt: skip


def _measure(
    sae: SAE,
    stream: Iterable[Tensor | Rows],
    lm: LM | None,
    contexts: Callable[[], Contexts | None],
    place: tuple[str, str],
    data: str,
    batch_contexts: int,
    total: int | None,
    progress: Progress,
) -> Measured:
    """contexts() is asked after the stream has been read to its end."""

    def show(done: int) -> None:
        progress(done, total and max(total, done), "reconstructing")

    found = reconstruction(sae, stream, show)
    if found is None:
        raise EvaluationError("There are no activations to evaluate on; capture more text.")
    if not np.isfinite(found.values["mse"]):
        raise EvaluationError("The SAE's reconstructions are NaN or infinite; its weights are damaged.")
    metrics = {name: metric(name, value, found.n, data) for name, value in found.values.items()}
    if lm is not None and (given := contexts()) is not None:
        values = predictions(Splice(sae, lm, *place, found.mean), given, batch_contexts, progress)
        metrics |= {name: metric(name, value, given.predictions, data) for name, value in values.items()}
    return Measured(metrics, found.firing, found.n)


# ---------------------------------------------------------------------------------------------------- from a capture


def _rows_of(capture: Capture, hook: str, goal_hook: str | None, split: Split, chunk: int, n: int) -> Iterator[Rows]:
    """The first n rows of a split in stored order."""
    if not n:
        raise EvaluationError(
            f"The capture {capture.path.name} has no {split.replace('_', '-')} rows; capture more text."
        )
    goals = capture.rows(goal_hook, split, chunk=chunk) if goal_hook else itertools.repeat((None, None, None))
    for (x, context, _), (goal, _, _) in zip(capture.rows(hook, split, chunk=chunk), goals, strict=False):
        m = min(len(x), n)
        yield Rows(x[:m], None if goal is None else goal[:m], context[:m])
        n -= m
        if not n:
            return


def _contexts_of(capture: Capture, hook: str, split: Split, most: int) -> Contexts:
    """The first contexts of a split, and which of their tokens have activations in the capture."""
    numbers = _numbers(capture, split)[:most]
    contexts, lengths = capture.contexts()[numbers], capture.lengths()
    replaced = np.zeros(contexts.shape, dtype=bool)
    for _, context, position in capture.rows(hook, split):
        at = np.searchsorted(numbers, context)
        here = (at < len(numbers)) & (numbers[np.minimum(at, len(numbers) - 1)] == context) if len(numbers) else at < 0
        replaced[at[here], position[here]] = True
        if not here.any():
            break
    return Contexts(contexts, replaced, None if lengths is None else lengths[numbers])


def _numbers(capture: Capture, split: Split) -> np.ndarray:
    """Context numbers of a split, in order."""
    numbers = np.arange(capture.n_contexts)
    if split == "all":
        return numbers
    held_out = is_held_out(numbers, capture.held_out_fraction)
    return numbers[held_out if split == "held_out" else ~held_out]


def _silent(done: int, total: int | None, step: str = "") -> None:
    return None
