"""Jobs of this app: generate with features edited, read texts by SAEs; the short ones in the worker that keeps models warm."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import torch
import transformers
from django.conf import settings

import saehub
from concepts.numerics.token_text import show_nul, token_texts
from inference import codes
from inference.models import Generation, Inference, PromptBatch, Steered, Sweep
from inference.neurons import top_texts
from inference.numerics.generate import Generated
from inference.numerics.generate import generate as generate_text
from inference.numerics.infer import Inferred, Reader, text_ids
from inference.numerics.infer import infer as infer_text
from inference.numerics.prompts import PromptReader
from inference.numerics.quality import DEFINITIONS, PlainReading, plain_reading, repetition, zlib_ratio
from inference.numerics.steer import SCOPES, Edit, Steering
from inference.numerics.sweep import sweep as sweep_strengths
from inference.numerics.table import new_table
from inference.numerics.warm import TooLarge, Warm, gigabytes, size_of
from inference.residency import publish
from saehub.causes import memory_ran_out
from saehub.jobs.progress import JobError, Progress
from saes.models import SAE, LanguageModel
from saes.numerics.folders import whole_folder
from saes.numerics.formats import load_sae
from saes.numerics.lm import LM, load_lm, pick_device
from saes.numerics.sae import SAE as Weights
from training.jobs import documents_of
from training.models import Corpus

T = TypeVar("T")
WRITE_SECONDS = 0.5  # how often the text so far is written to the row
LARGEST = 2**62
CHARACTERS_A_TOKEN = 3  # about, of English
SPECIAL = "control tokens are read and shown, and left out of every summary"


MODELS_AND_SAES = Warm(lambda: warm_budget())


def generate(progress: Progress, generation: int) -> dict[str, Any]:
    """Fill a Generation: the same prompt, settings and seed with and without its edits, written as it grows.

    Without edits nothing is hooked, and the steered side is the baseline itself. With an instruction there is a third
    text, of the plain model told in words.
    """
    row = Generation.objects.select_related("model", "sae").filter(pk=generation).first()
    if row is None:
        raise JobError("The generation is not there any more.", "It was deleted; start a new one.")
    began = time.monotonic()
    _keep(row, baseline={}, steered={}, prompted={})
    progress.start(f"Loading {row.model.name}")
    lm = warm_lm(row.model)
    steering, places = _steering(row, warm_sae)
    prompted: dict[str, Any] = {}
    with _saying_what_fits(lm, len(row.prompt) // CHARACTERS_A_TOKEN + row.max_new_tokens):
        plain = _side(progress, row, lm, "baseline", [])
        read = plain_reading(lm, plain.prompt_ids, plain.ids, steering)
        baseline = steered = _stored(plain, read, places)
        if steering:
            other = _side(progress, row, lm, "steered", steering)
            steered = _stored(other, plain_reading(lm, plain.prompt_ids, other.ids, steering), places)
        if row.instruction:
            words = _side(progress, row, lm, "prompted", [])
            # held against the prompt without the instruction, as the other two are
            prompted = _stored(words, plain_reading(lm, plain.prompt_ids, words.ids, steering), places)
    policy = asdict(plain.policy) | {"prompt_ids": plain.prompt_ids, "prompt_tokens": plain.prompt_tokens}
    policy |= {"scope": SCOPES[row.scope], "equation": "x' = x + decode(z') - decode(z)", "dtype": str(lm.dtype)}
    policy |= {"definitions": DEFINITIONS, "saes": [fact_of(sae) for sae in row.edited_saes().values()]}
    row.finish(
        baseline=baseline, steered=steered, prompted=prompted, policy=policy, versions=versions(),
        seconds=time.monotonic() - began,
    )  # fmt: skip
    return {"generation": row.pk, "baseline_tokens": len(baseline["ids"]), "steered_tokens": len(steered["ids"])}


def sweep(progress: Progress, sweep: int) -> dict[str, Any]:
    """Make a generation again at several strengths; every point is written as it comes."""
    row = Sweep.objects.select_related("generation__model", "generation__sae").get(pk=sweep)
    asked, began = row.generation, time.monotonic()
    progress.start(f"Loading {asked.model.name}", unit="tokens")
    lm = _load(asked.model)
    steering, _ = _steering(asked, _load_sae)
    n, whole = asked.max_new_tokens, len(row.factors) * asked.max_new_tokens
    points: list[dict[str, Any]] = []

    def told(done: int, total: int | None, step: str) -> None:
        progress(len(points) * n + done, whole, f"strength × {row.factors[len(points)]:g}")

    progress.start("Writing the texts", unit="tokens", total=whole)
    found = sweep_strengths(
        lm, _asked(asked), steering, row.factors, max_new_tokens=n, temperature=asked.temperature, seed=asked.seed,
        progress=told,
    )  # fmt: skip
    for point in found:
        points.append(asdict(point))
        Sweep.objects.filter(pk=row.pk).update(points=points)
    row.finish(points=points, versions=versions(), seconds=time.monotonic() - began)
    return {"sweep": row.pk, "points": len(points), "broken": sum(bool(point["error"]) for point in points)}


def infer(progress: Progress, inference: int) -> dict[str, Any]:
    """Read the texts of an Inference by its SAEs and write what fires into its folder; first let the model go on from
    them, where that was asked for."""
    row = Inference.objects.select_related("model").filter(pk=inference).first()
    if row is None:
        raise JobError("The text is not there any more.", "It was deleted; start a new one.")
    began = time.monotonic()
    saes = in_order(row.saes.all())
    progress.start(f"Loading {row.model.name}", unit="tokens")
    lm = warm_lm(row.model)
    readers = [_WarmReader(sae) for sae in saes]
    steering, _ = _steering(row, warm_sae) if row.new_tokens else ([], [])
    found: list[Inferred] = []
    row.outputs = []
    for number in range(len(row.prompts)):
        made = _written(progress, row, lm, number, steering)
        progress.start(f"Reading text {number + 1}", unit="tokens", total=len(made.ids))
        with _saying_what_fits(lm, len(made.ids)):
            found.append(infer_text(lm, readers, made.ids, likely=row.top_next if row.probabilities else 0))
        row.outputs.append(made.output)
    row.facts = [fact_of(sae) | _summary(number, found) for number, sae in enumerate(saes)]
    _write_texts(row, lm, found)
    n_tokens = sum(len(one.ids) for one in found)
    row.finish(
        facts=row.facts, outputs=row.outputs, n_tokens=n_tokens, versions=versions(), seconds=time.monotonic() - began,
        policy=row.outputs[0]["policy"] | {"special": SPECIAL, "dtype": str(lm.dtype)},
    )  # fmt: skip
    progress(n_tokens, n_tokens)
    return {"inference": row.pk, "tokens": n_tokens, "fires": sum(fact["fires"] for fact in row.facts)}


@dataclass(frozen=True)
class _Written:
    """A text to read, and what the row says of it."""

    ids: list[int]
    output: dict[str, Any]


def _written(progress: Progress, row: Inference, lm: LM, number: int, steering: list[Steering]) -> _Written:
    """The number-th prompt, with what the model made of it."""
    prompt, began = row.prompts[number], time.monotonic()
    ids, policy = text_ids(lm, _asked(row, prompt), row.prepend_bos)
    made = None
    if row.new_tokens:
        progress.start(f"Writing text {number + 1}", unit="tokens", total=row.new_tokens)
        made = generate_text(
            lm, _asked(row, prompt), steering=steering, max_new_tokens=row.new_tokens, temperature=row.temperature,
            seed=row.seed, bos=row.prepend_bos, progress=progress,
        )  # fmt: skip
    whole = [*ids, *made.ids] if made else ids
    text = prompt + (made.text if made else "")
    if row.chat:
        whole_text = lm.tokenizer.decode(whole, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        text = show_nul(str(whole_text))
    output = {
        "prompt": prompt, "text": text, "completion": made.text if made else "", "n_prompt_tokens": len(ids),
        "n_tokens": len(whole), "stopped": made.stopped if made else "", "seconds": time.monotonic() - began,
        "policy": asdict(policy),
    }  # fmt: skip
    return _Written(whole, output)


def _summary(number: int, found: Sequence[Inferred]) -> dict[str, Any]:
    """How much of the number-th SAE fires over all texts."""
    counts = [np.diff(one.codes[number].start)[~np.array(one.special)] for one in found]
    return {"fires": sum(len(one.codes[number].values) for one in found), "l0": _mean(np.concatenate(counts))}


def _write_texts(row: Inference, lm: LM, found: Sequence[Inferred]) -> None:
    """The files of all texts and top_texts.json, together or not at all."""
    with whole_folder(row.folder, replaces=[path.name for path in row.folder.glob("*")]) as folder:
        for number, one in enumerate(found):
            next_ids = [] if one.likely is None else np.unique(one.likely.ids).tolist()
            place = folder / row.text_folder(number).relative_to(row.folder)
            place.mkdir(exist_ok=True)
            codes.write(place, one, dict(zip(next_ids, token_texts(lm.tokenizer, next_ids), strict=True)))
        if row.save_top_texts:
            files = [
                codes.CodesFile(folder / row.text_folder(number).relative_to(row.folder))
                for number in range(len(found))
            ]
            for number, fact in enumerate(row.facts):
                file = folder / row.top_texts_file(fact["sae"]).relative_to(row.folder)
                file.parent.mkdir()
                file.write_text(json.dumps(top_texts(row, files, number), ensure_ascii=False), encoding="utf-8")


class _WarmReader(Reader):
    """An SAE fetched when its turn comes, so that many of them need not fit into memory at once."""

    def __init__(self, row: SAE) -> None:
        object.__setattr__(self, "_row", row)
        object.__setattr__(self, "hook_name", row.hook_name)

    @property
    def sae(self) -> Weights:  # type: ignore[override]
        row: SAE = self._row  # type: ignore[attr-defined]
        return warm_sae(row)


@contextmanager
def _saying_what_fits(lm: LM, n_tokens: int) -> Iterator[None]:
    """Where memory runs out in the worker that all share: let go of what is warm, and say how much there is."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not memory_ran_out(error):
            raise
        MODELS_AND_SAES.clear()
        free = psutil.virtual_memory().available
        raise JobError(
            f"Memory ran out with a text of up to {n_tokens:,} tokens: {lm.name} takes {gigabytes(size_of(lm))} without "
            f"it, and {gigabytes(free)} are free.",
            f"A text of {max(1, n_tokens // 2):,} tokens needs about half as much beside the model; fewer SAEs at a time "
            "need less, too.",
        ) from error


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
    _await_corpus(progress, row.corpus)
    began = time.monotonic()
    saes = in_order(row.saes.all())
    progress.start(f"Loading {row.model.name}", unit="prompts")
    lm = _load(row.model)
    readers = [Reader(_load_sae(sae), sae.hook_name) for sae in saes]
    total = min(row.corpus.n_documents or 0, row.max_prompts or LARGEST) or None
    progress.start("Reading the prompts", unit="prompts", total=total)
    reading = PromptReader(lm, readers, [sae.pk for sae in saes], row.prepend_bos, row.top)
    with whole_folder(row.folder, replaces=[row.FILE]) as folder, new_table(folder / row.FILE) as table:
        for done in reading.read(islice(documents_of(row.corpus), row.max_prompts), table):
            progress(done, max(total or 0, done) or None)
            _leave_disk(folder / row.FILE)
    if not reading.n_prompts:
        raise JobError("The corpus holds no text.", "Choose another corpus.")
    row.finish(
        n_prompts=reading.n_prompts, n_cut=reading.n_cut, n_tokens=reading.n_tokens, n_rows=table.rows,
        size_bytes=row.file.stat().st_size, facts=[fact_of(sae) for sae in saes],
        policy={
            "bos": row.prepend_bos, "special": SPECIAL, "chat_template": row.corpus.chats, "top": row.top,
            "dtype": str(lm.dtype),
        },
        versions=versions(), seconds=time.monotonic() - began,
    )  # fmt: skip
    return {"batch": row.pk, "prompts": reading.n_prompts, "tokens": reading.n_tokens, "rows": table.rows}


def _await_corpus(progress: Progress, corpus: Corpus) -> None:
    """A file that came with the batch is read as a corpus first, by a job of its own."""
    if not corpus.ready:
        progress.start(f"Waiting until {corpus.name} is read")
    while not corpus.ready:
        if not corpus.busy:
            said = corpus.job.error if corpus.job else ""
            raise JobError(f"The prompts could not be read. {said}".strip(), "Correct the file, and begin a new batch.")
        progress(0)
        time.sleep(WRITE_SECONDS)
        corpus.refresh_from_db()


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
    expected = max(model.size_bytes or 0, 4 * (model.n_parameters or 0))
    return _warm("model", (model.load_from, model.revision), model.name, expected, lambda: _load(model))


def _load(model: LanguageModel) -> LM:
    lm = load_lm(model.load_from, revision=model.revision or None)
    lm.name = model.name  # sentences name it as people here do, not by its folder
    return lm


def warm_sae(sae: SAE) -> Weights:
    expected = 8 * (sae.d_in or 0) * (sae.d_sae or 0)
    return _warm("sae", (sae.path, sae.sha256), sae.name, expected, lambda: _load_sae(sae))


def _load_sae(sae: SAE) -> Weights:
    return load_sae(sae.files, facts=sae.facts, device=pick_device())


def _warm(kind: str, key: Hashable, name: str, expected: int, load: Callable[[], T]) -> T:
    """What is warm already, or loaded now; the pages are told what is held."""
    try:
        return MODELS_AND_SAES.get((kind, key), load, name=name, expected=expected)
    except TooLarge as error:
        raise JobError(str(error), "Choose a smaller one, or ask an admin to raise SAEHUB_WARM_MB.") from error
    finally:
        publish([(kept.key[0], kept.name, kept.n_bytes) for kept in MODELS_AND_SAES.held()], warm_budget())


def warm_budget() -> int:
    """Bytes the models and SAEs of this worker may take: SAEHUB_WARM_MB, else half of the memory they are in."""
    if settings.WARM_BYTES:
        return int(settings.WARM_BYTES)
    if pick_device().type == "cuda":
        return torch.cuda.get_device_properties(0).total_memory // 2
    return psutil.virtual_memory().total // 2


def _steering(row: Steered, load: Callable[[SAE], Weights]) -> tuple[list[Steering], list[tuple[int, int]]]:
    """The edits by SAE and scope, and for each edit of the row which Steering it is in and where there."""
    saes = row.edited_saes()
    groups: dict[tuple[int, Any, int], list[Edit]] = {}
    places: list[tuple[int, int]] = []
    for edit in row.edit_rows():
        if edit["sae"] not in saes:
            raise JobError("An SAE of these edits is not there any more.", "Fork the generation and choose another.")
        place = (edit["sae"], edit["scope"], edit["first"])
        mine = groups.setdefault(place, [])
        places.append((list(groups).index(place), len(mine)))
        mine.append(Edit(edit["feature"], edit["mode"], edit["value"]))
    weights = {pk: load(saes[pk]) for pk in dict.fromkeys(pk for pk, _, _ in groups)}
    steering = [
        Steering(weights[pk], saes[pk].hook_name, edits, scope, first) for (pk, scope, first), edits in groups.items()
    ]
    return steering, places


def _side(progress: Progress, row: Generation, lm: LM, side: str, steering: list[Steering]) -> Generated:
    """Generate one of the texts, writing it to the row as it grows. `progress` raises where it is cancelled."""
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
            _keep(row, **{side: so_far()})

    def so_far() -> dict[str, Any]:
        return {"ids": ids, "pieces": pieces, "text": "".join(pieces)}

    try:
        made = generate_text(
            lm,
            _asked(row, row.prompt_only if side == "prompted" else row.prompt),
            steering=steering,
            max_new_tokens=row.max_new_tokens,
            temperature=row.temperature,
            seed=row.seed,
            on_token=on_token,
            progress=progress,
        )
    finally:
        _keep(row, **{side: so_far()})  # also what was written until somebody stopped it
    return made


def _asked(row: Generation | Inference, text: str = "") -> Any:
    text = text or row.prompt
    return [{"role": "user", "content": text}] if row.chat else text


def _keep(row: Generation, **sides: dict[str, Any]) -> None:
    Generation.objects.filter(pk=row.pk).update(**sides)


def _stored(made: Generated, read: PlainReading, places: list[tuple[int, int]]) -> dict[str, Any]:
    """A side as the row keeps it: the text, and what the plain model makes of it."""
    names = ("text", "ids", "tokens", "pieces", "logprobs", "stopped", "seconds", "tokens_per_second")
    return {name: getattr(made, name) for name in names} | {
        "mean_plain_logprob": sum(read.logprobs) / len(read.logprobs) if read.logprobs else None,
        "repetition": repetition(made.ids),
        "zlib_ratio": zlib_ratio(made.text),
        "effects": [read.effects[one][edit] for one, edit in places],
    }


def versions() -> dict[str, str]:
    return {"saehub": saehub.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
