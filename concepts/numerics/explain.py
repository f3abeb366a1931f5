"""A language model names features from their texts, and the names are tested on texts it has not seen.

The namer gets half of a feature's top contexts. The test gets windows around peaks of contexts that the namer has not
seen, spread over the feature's intervals, and windows in which the feature is silent for certain: a sample of the capture
is encoded once for all features. See explain_prompts for what is asked, and for the definition of the score.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from concepts.featurefile import Example, FeatureView
from concepts.numerics.explain_prompts import Turn, cleaned, marked, name_turns, plain, tell_turns
from concepts.numerics.sparse_encode import SparseEncoder
from concepts.numerics.token_text import joined
from saes.numerics.lm import LM
from saes.numerics.sae import SAE
from training.numerics.shards import Capture

AROUND = 12  # tokens on either side of a peak
WINDOW = 2 * AROUND + 1
NEW_TOKENS = 32  # of a description
POOL_SHARDS, POOL_ROWS = 8, 2048  # where silent windows are looked for: so many rows of so many shards
SEED = 0


class ExplainError(ValueError):
    """The language model cannot be asked; the message is one sentence."""


@dataclass(frozen=True)
class Explained:
    """A feature's description and how well it foretells where the feature fires.

    text: "" where there is none, for the reason `fault`. score: detection_auroc_1 over n_active windows on which the feature
    fires and n_silent on which it does not; None where there are too few of either.
    """

    feature: int
    text: str
    score: float | None = None
    n_active: int = 0
    n_silent: int = 0
    fault: str = ""


class Namer:
    """A language model that answers the questions of explain_prompts."""

    def __init__(self, lm: LM) -> None:
        self.lm = lm
        parameters = inspect.signature(lm.model.forward).parameters
        self.options = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self.stops = _stop_ids(lm)

    @torch.inference_mode()
    def name(self, texts: Sequence[str]) -> str:
        """A description of what is marked in these texts, the likeliest tokens; "" where nothing that is one comes out."""
        given, cache = self._ids(name_turns(texts), "In common"), None
        written: list[int] = []
        step = torch.tensor([given], device=self.lm.device)
        while len(written) < NEW_TOKENS:
            out = self.lm.model(input_ids=step, past_key_values=cache, use_cache=True, **self.options)
            cache, token = out.past_key_values, int(out.logits[0, -1].argmax())
            if token in self.stops:
                break
            written.append(token)
            if "\n" in self._text(written).lstrip():
                break
            step = torch.tensor([[token]], device=self.lm.device)
        return cleaned(self._text(written))

    @torch.inference_mode()
    def tell(self, description: str, texts: Sequence[str]) -> np.ndarray:
        """log p(Yes) − log p(No) as the next token after each text's question (n,) float64.

        What all questions begin with is read once.
        """
        asked = [self._ids(tell_turns(description, text), "Answer") for text in texts]
        shared = min(min(_common(asked[0], one), len(one) - 1) for one in asked)
        start = None
        if shared:
            begun = torch.tensor([asked[0][:shared]], device=self.lm.device)
            start = self.lm.model(input_ids=begun, use_cache=True, **self.options).past_key_values
        between, yes, no = self._answers()
        found = []
        for one in asked:
            rest = torch.tensor([one[shared:] + between], device=self.lm.device)
            cache = copy.deepcopy(start)  # of whatever kind the model's is; not all of them can be cut
            logits = self.lm.model(input_ids=rest, past_key_values=cache, use_cache=True, **self.options).logits[0, -1]
            found.append(float(logits[yes].double() - logits[no].double()))
        return np.array(found)

    def _ids(self, turns: Sequence[Turn], word: str) -> list[int]:
        ids = self.lm.tokenizer(plain(turns, word), verbose=False)["input_ids"]
        most = self.lm.max_context
        if most is not None and len(ids) + NEW_TOKENS > most:
            raise ExplainError(
                f"{self.lm.name or 'The language model'} reads at most {most:,} tokens, and the question has {len(ids):,}; "
                "choose a model that reads more."
            )
        return list(ids)

    def _answers(self) -> tuple[list[int], int, int]:
        """Tokens that both answers begin with, and the first in which Yes and No differ."""
        asked = plain(tell_turns("a", "b"), "Answer")
        given, yes, no = (list(self.lm.tokenizer(asked + word)["input_ids"]) for word in ("", " Yes", " No"))
        at = _common(yes, no)
        return yes[len(given) : at], yes[at], no[at]

    def _text(self, ids: list[int]) -> str:
        return str(self.lm.tokenizer.decode(ids, skip_special_tokens=True))


def _stop_ids(lm: LM) -> set[int]:
    configured = getattr(lm.model.generation_config, "eos_token_id", None)
    several = configured if isinstance(configured, list) else [configured]
    return {stop for stop in [*several, lm.tokenizer.eos_token_id] if stop is not None}


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts begin with together."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Chance that one of `positive` is larger than one of `negative`, ties counting half (Mann-Whitney U / (n m))."""
    difference = positive[:, None] - negative[None, :]
    return float((difference > 0).mean() + (difference == 0).mean() / 2)


# ----------------------------------------------------------------------------------------------------- silent texts


class Silent:
    """A sample of a capture's windows, and which of the features that were asked for fire in each."""

    def __init__(
        self, capture: Capture, hook: str, sae: SAE, features: Collection[int], columns: FeatureView, seed: int = SEED
    ) -> None:
        self.texts: list[str] = []
        self.fires: dict[int, set[int]] = {feature: set() for feature in features}
        self.rng = np.random.default_rng(seed)
        wanted, encode = np.fromiter(features, np.int64), SparseEncoder(sae)
        starts = np.concatenate([[0], np.cumsum([shard["n_rows"] for shard in capture.shards])])
        every = max(1, len(capture.shards) // POOL_SHARDS)
        for i in range(0, len(capture.shards), every)[:POOL_SHARDS]:
            rows = capture.rows(hook, chunk=min(POOL_ROWS, encode.rows), start=int(starts[i]))
            x, context, position = next(rows)
            row, feature, _ = encode(x.to(sae.W_dec.device))
            chosen = np.isin(feature, wanted)
            self._add(capture, i, (context, position), (row[chosen], feature[chosen]), columns)

    def _add(
        self,
        capture: Capture,
        shard: int,
        place: tuple[np.ndarray, np.ndarray],
        fires: tuple[np.ndarray, np.ndarray],
        columns: FeatureView,
    ) -> None:
        """The windows of a shard that its rows fill; the last one may be cut off by the end of the rows."""
        width = min(WINDOW, capture.context_length)
        per_context = -(-capture.context_length // width)
        number = place[0].astype(np.int64) * per_context + place[1] // width
        windows, counts = np.unique(number, return_counts=True)
        whole = windows[(counts >= width / 2) & (windows != number[-1])]
        tokens, first = capture.shard_contexts(shard), int(capture.shards[shard]["first_context"])
        known: dict[int, int] = {}
        for window in whole.tolist():
            context, at = divmod(window, per_context)
            known[window] = len(self.texts)
            self.texts.append(_shown(columns, tokens[context - first, at * width : (at + 1) * width]))
        for row, feature in zip(number[fires[0]].tolist(), fires[1].tolist(), strict=True):
            if row in known:
                self.fires[feature].add(known[row])

    def texts_without(self, feature: int, n: int) -> list[str]:
        """At most n windows, at random, in which the feature does not fire."""
        silent = [i for i in range(len(self.texts)) if i not in self.fires[feature]]
        chosen = self.rng.permutation(len(silent))[:n]
        return [self.texts[silent[i]] for i in chosen]


def _shown(columns: FeatureView, ids: np.ndarray) -> str:
    return joined(columns.token_texts(ids[~np.isin(ids, columns.facts["special_ids"])]))


# -------------------------------------------------------------------------------------------------------- features


def explain(
    namer: Namer,
    columns: FeatureView,
    features: Sequence[int],
    silent: Silent | None,
    *,
    n_shown: int = 10,
    n_tested: int = 10,
    report: Callable[[], None] = lambda: None,
) -> Iterator[Explained]:
    """Each feature with its description. silent: None leaves the score out.

    n_shown: top contexts that the namer sees, every other one. n_tested: windows of either kind in the test. `report` is
    called between questions; what it raises ends the work.
    """
    for feature in features:
        report()
        yield _explain(namer, columns, feature, silent, n_shown, n_tested, report)


def _explain(
    namer: Namer,
    columns: FeatureView,
    feature: int,
    silent: Silent | None,
    n_shown: int,
    n_tested: int,
    report: Callable[[], None],
) -> Explained:
    record = columns.feature(feature)
    if not record.top:
        return Explained(feature, "", fault="It never fired.")
    top = _distinct(record.top)
    shown = top[::2][:n_shown]
    text = namer.name([marked(*_window(one)) for one in shown])
    if not text:
        return Explained(feature, "", fault="The language model wrote nothing that can be a name.")
    if silent is None:
        return Explained(feature, text)
    report()
    active = _tests(top[1::2], [_distinct(one.examples) for one in record.intervals], shown, n_tested)
    others = silent.texts_without(feature, n_tested)
    n, m = len(active), len(others)
    if min(n, m) < 2:
        few = "few other texts in which it fires" if n < 2 else "few texts in which it does not"
        return Explained(feature, text, None, n, m, f"Not tested: there are too {few}.")
    found = namer.tell(text, [*active, *others])
    return Explained(feature, text, auroc(found[:n], found[n:]), n, m)


def _tests(rest: list[Example], intervals: list[list[Example]], shown: list[Example], n: int) -> list[str]:
    """Windows of contexts that were not shown: from every interval in turn, then of the other top contexts."""
    seen = {one.context for one in shown}
    turns = [group[i] for i in range(max(map(len, intervals), default=0)) for group in intervals if i < len(group)]
    texts: dict[str, None] = {}
    for one in (*turns, *rest):
        if one.context not in seen and len(texts) < n:
            texts.setdefault(joined(_window(one)[0]))
            seen.add(one.context)
    return list(texts)


def _distinct(examples: Sequence[Example]) -> list[Example]:
    """Those that show different windows."""
    first: dict[tuple[str, ...], Example] = {}
    for one in examples:
        first.setdefault(tuple(_window(one)[0]), one)
    return list(first.values())


def _window(example: Example) -> tuple[list[str], list[float]]:
    """Tokens around the peak and their activations, control tokens left out."""
    start, end = max(0, example.peak - AROUND), example.peak + AROUND + 1
    rows = zip(
        example.tokens[start:end], example.activations[start:end].tolist(), example.special[start:end], strict=True
    )
    kept = [(token, value) for token, value, special in rows if not special]
    return [token for token, _ in kept], [value for _, value in kept]
