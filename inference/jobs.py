"""Job of this app: generate once plain and once with features edited, in the worker that keeps models warm."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import asdict
from typing import Any, Generic, TypeVar

import torch
import transformers

import saehub
from inference.models import Generation
from inference.numerics.generate import Generated
from inference.numerics.generate import generate as generate_text
from inference.numerics.quality import plain_logprobs, repetition
from inference.numerics.steer import SCOPES, Edit, Steering
from saehub.jobs.progress import JobError, Progress
from saes.models import SAE, LanguageModel
from saes.numerics.formats import load_sae
from saes.numerics.lm import LM, load_lm, pick_device
from saes.numerics.sae import SAE as Weights

T = TypeVar("T")
WRITE_SECONDS = 0.5  # how often the text so far is written to the row
WARM_MODELS = 2
WARM_SAES = 4


class Warm(Generic[T]):
    """The most recently used `size` things of a kind, kept between jobs. One is loaded at a time, whoever asks."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._kept: OrderedDict[Hashable, T] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, load: Callable[[], T]) -> T:
        with self._lock:
            if key not in self._kept:
                while len(self._kept) >= self.size:
                    self._kept.popitem(last=False)  # before loading, so that no more than `size` are ever held
                self._kept[key] = load()
            self._kept.move_to_end(key)
            return self._kept[key]


MODELS: Warm[LM] = Warm(WARM_MODELS)
SAES: Warm[Weights] = Warm(WARM_SAES)


def generate(progress: Progress, generation: int) -> dict[str, Any]:
    """Fill a Generation: the same prompt, settings and seed with and without its edits, written as it grows.

    Without edits nothing is hooked, and the steered side is the baseline itself.
    """
    row = Generation.objects.select_related("model", "sae").filter(pk=generation).first()
    if row is None:
        raise JobError("The generation is not there any more.", "It was deleted; start a new one.")
    began = time.monotonic()
    _keep(row, baseline={}, steered={})
    progress.start(f"Loading {row.model.name}")
    lm = warm_lm(row.model)
    steering = _steering(row)
    plain = _side(progress, row, lm, "baseline", [])
    baseline = _stored(plain, plain.logprobs)
    steered = baseline
    if steering:
        other = _side(progress, row, lm, "steered", steering)
        steered = _stored(other, plain_logprobs(lm, other.prompt_ids, other.ids))
    policy = asdict(plain.policy) | {"prompt_ids": plain.prompt_ids, "prompt_tokens": plain.prompt_tokens}
    policy |= {"scope": SCOPES[row.scope], "equation": "x' = x + decode(z') - decode(z)", "dtype": str(lm.dtype)}
    row.finish(baseline=baseline, steered=steered, policy=policy, versions=versions(), seconds=time.monotonic() - began)
    return {"generation": row.pk, "baseline_tokens": len(baseline["ids"]), "steered_tokens": len(steered["ids"])}


def warm_lm(model: LanguageModel) -> LM:
    return MODELS.get((model.load_from, model.revision), lambda: _load(model))


def _load(model: LanguageModel) -> LM:
    lm = load_lm(model.load_from, revision=model.revision or None)
    lm.name = model.name  # sentences name it as people here do, not by its folder
    return lm


def warm_sae(sae: SAE) -> Weights:
    return SAES.get((sae.path, sae.sha256), lambda: load_sae(sae.files, facts=sae.facts, device=pick_device()))


def _steering(row: Generation) -> list[Steering]:
    if not row.edits or row.sae is None:
        return []
    edits = [Edit(edit["feature"], edit["mode"], edit["value"]) for edit in row.edits]
    scope: Any = row.scope
    return [Steering(warm_sae(row.sae), row.sae.hook_name, edits, scope)]


def _side(progress: Progress, row: Generation, lm: LM, side: str, steering: list[Steering]) -> Generated:
    """Generate one of the two texts, writing it to the row as it grows. `progress` raises where it is cancelled."""
    progress.start(f"Writing the {side} text", unit="tokens", total=row.max_new_tokens)
    ids: list[int] = []
    pieces: list[str] = []
    written = time.monotonic()

    def on_token(token: int, piece: str) -> None:
        nonlocal written
        ids.append(token)
        pieces.append(piece)
        if time.monotonic() - written >= WRITE_SECONDS:
            written = time.monotonic()
            _keep(row, **{side: {"ids": ids, "pieces": pieces, "text": "".join(pieces)}})

    prompt: Any = [{"role": "user", "content": row.prompt}] if row.chat else row.prompt
    made = generate_text(
        lm,
        prompt,
        steering=steering,
        max_new_tokens=row.max_new_tokens,
        temperature=row.temperature,
        seed=row.seed,
        on_token=on_token,
        progress=progress,
    )
    _keep(row, **{side: _stored(made, made.logprobs if not steering else [])})
    return made


def _keep(row: Generation, **sides: dict[str, Any]) -> None:
    Generation.objects.filter(pk=row.pk).update(**sides)


def _stored(made: Generated, plain: list[float]) -> dict[str, Any]:
    """A side as the row keeps it. `plain`: log p of its tokens under the model without edits."""
    names = ("text", "ids", "tokens", "pieces", "logprobs", "stopped", "seconds", "tokens_per_second")
    return {name: getattr(made, name) for name in names} | {
        "mean_plain_logprob": sum(plain) / len(plain) if plain else None,
        "repetition": repetition(made.ids),
    }


def versions() -> dict[str, str]:
    return {"saehub": saehub.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
