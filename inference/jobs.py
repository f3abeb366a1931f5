"""Jobs of this app: generate with features edited, read texts by SAEs; in the worker that keeps models warm."""

from __future__ import annotations

import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
import transformers
from django.conf import settings

import saehub
from concepts.numerics.token_text import token_texts
from inference import codes
from inference.models import Generation, Inference, PromptBatch
from inference.numerics.generate import Generated
from inference.numerics.generate import generate as generate_text
from inference.numerics.infer import LIKELY, Reader, text_ids
from inference.numerics.infer import infer as infer_text
from inference.numerics.prompts import PromptReader
from inference.numerics.quality import plain_logprobs, repetition
from inference.numerics.steer import SCOPES, Edit, Steering
from inference.numerics.table import new_table
from saehub.jobs.progress import JobError, Progress
from saes.models import SAE, LanguageModel
from saes.numerics.folders import whole_folder
from saes.numerics.formats import load_sae
from saes.numerics.lm import LM, load_lm, pick_device
from saes.numerics.sae import SAE as Weights
from training.jobs import texts_of

T = TypeVar("T")
WRITE_SECONDS = 0.5  # how often the text so far is written to the row
WARM_MODELS = 2
WARM_SAES = 4
LARGEST = 2**62
SPECIAL = "control tokens are read and shown, and left out of every summary"


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


def infer(progress: Progress, inference: int) -> dict[str, Any]:
    """Read one text by the SAEs of an Inference and write what fires into its folder."""
    row = Inference.objects.select_related("model").filter(pk=inference).first()
    if row is None:
        raise JobError("The text is not there any more.", "It was deleted; start a new one.")
    began = time.monotonic()
    saes = in_order(row.saes.all())
    progress.start(f"Loading {row.model.name}", unit="tokens")
    lm = warm_lm(row.model)
    readers = [Reader(warm_sae(sae), sae.hook_name) for sae in saes]
    ids, policy = text_ids(lm, _asked(row), row.prepend_bos)
    progress.start("Reading the text", unit="tokens", total=len(ids))
    found = infer_text(lm, readers, ids, likely=LIKELY if row.probabilities else 0)
    next_ids = [] if found.likely is None else np.unique(found.likely.ids).tolist()
    with whole_folder(row.folder, replaces=[path.name for path in row.folder.glob("*")]) as folder:
        codes.write(folder, found, dict(zip(next_ids, token_texts(lm.tokenizer, next_ids), strict=True)))
    counted = ~np.array(found.special)
    facts = [
        fact_of(sae) | {"fires": len(one.values), "l0": _mean(np.diff(one.start)[counted])}
        for sae, one in zip(saes, found.codes, strict=True)
    ]
    row.finish(
        facts=facts, n_tokens=len(ids), policy=asdict(policy) | {"special": SPECIAL, "dtype": str(lm.dtype)},
        versions=versions(), seconds=time.monotonic() - began,
    )  # fmt: skip
    progress(len(ids), len(ids))
    return {"inference": row.pk, "tokens": len(ids), "fires": sum(fact["fires"] for fact in facts)}


def _asked(row: Generation | Inference) -> Any:
    return [{"role": "user", "content": row.prompt}] if row.chat else row.prompt


def _mean(counts: Any) -> float | None:
    return float(counts.mean()) if len(counts) else None


def in_order(saes: Iterable[SAE]) -> list[SAE]:
    """By layer, then age: the order of everything that several SAEs read."""
    return sorted(saes, key=lambda sae: (-1 if sae.layer is None else sae.layer, sae.pk))


def fact_of(sae: SAE) -> dict[str, Any]:
    """What says which SAE it was, also when its row is gone."""
    return {"sae": sae.pk, "name": sae.name, "sha256": sae.sha256, "hook_name": sae.hook_name, "d_sae": sae.d_sae}


def infer_prompts(progress: Progress, batch: int) -> dict[str, Any]:
    """Read every text of a PromptBatch's corpus on its own; the table appears whole or not at all."""
    row = PromptBatch.objects.select_related("model", "corpus").get(pk=batch)
    began = time.monotonic()
    saes = in_order(row.saes.all())
    progress.start(f"Loading {row.model.name}", unit="prompts")
    lm = _load(row.model)
    readers = [Reader(_load_sae(sae), sae.hook_name) for sae in saes]
    total = min(row.corpus.n_documents or 0, row.max_prompts or LARGEST) or None
    progress.start("Reading the prompts", unit="prompts", total=total)
    reading = PromptReader(lm, readers, [sae.pk for sae in saes], row.prepend_bos, row.top)
    with whole_folder(row.folder, replaces=[row.FILE]) as folder, new_table(folder / row.FILE) as table:
        for done in reading.read(islice(texts_of(row.corpus), row.max_prompts), table):
            progress(done, max(total or 0, done) or None)
            _leave_disk(folder / row.FILE)
    if not reading.n_prompts:
        raise JobError("The corpus holds no text.", "Choose another corpus.")
    row.finish(
        n_prompts=reading.n_prompts, n_cut=reading.n_cut, n_tokens=reading.n_tokens, n_rows=table.rows,
        size_bytes=row.file.stat().st_size, facts=[fact_of(sae) for sae in saes],
        policy={"bos": row.prepend_bos, "special": SPECIAL, "top": row.top, "dtype": str(lm.dtype)},
        versions=versions(), seconds=time.monotonic() - began,
    )  # fmt: skip
    return {"batch": row.pk, "prompts": reading.n_prompts, "tokens": reading.n_tokens, "rows": table.rows}


def _leave_disk(file: Path) -> None:
    """The table is streamed to disk, so its size is known only as it grows."""
    size, free = file.stat().st_size, shutil.disk_usage(file.parent).free
    if size > settings.BATCH_LIMIT:
        raise JobError(
            f"The table is larger than {settings.BATCH_LIMIT // 10**6:,} MB, the most one batch may take.",
            "Keep fewer features of every token, or read fewer prompts.",
        )
    if free < settings.DISK_RESERVE:
        raise JobError("The disk is nearly full, so the table was not written.", "Free some space, then press Retry.")


def warm_lm(model: LanguageModel) -> LM:
    return MODELS.get((model.load_from, model.revision), lambda: _load(model))


def _load(model: LanguageModel) -> LM:
    lm = load_lm(model.load_from, revision=model.revision or None)
    lm.name = model.name  # sentences name it as people here do, not by its folder
    return lm


def warm_sae(sae: SAE) -> Weights:
    return SAES.get((sae.path, sae.sha256), lambda: _load_sae(sae))


def _load_sae(sae: SAE) -> Weights:
    return load_sae(sae.files, facts=sae.facts, device=pick_device(), checked=bool(sae.sha256))


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

    made = generate_text(
        lm,
        _asked(row),
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
