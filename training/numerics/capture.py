"""Run a language model over texts or conversations and keep its activations at chosen hook points as shards.

One streaming pass: texts are tokenised and packed as they arrive, the forward pass serves all hook points at once and
stops after the deepest of them, and memory holds one shard at most. A shard is so many contexts, whatever is stored of
them, so where each shard begins is known from the texts alone: that is what lets parts be made apart.
"""

import importlib.metadata
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saes.numerics.lm import LM, HookPoint
from training.numerics.documents import Document
from training.numerics.forward import fidelity, outliers, precision, stored_rows
from training.numerics.shard_writer import OtherTexts, ShardWriter, leaving_nothing
from training.numerics.shards import DTYPES, HELD_OUT_FRACTION, MANIFEST, CaptureError, open_capture
from training.numerics.tokens import Context, TokenPolicy, iter_contexts, special_ids, stored_mask

SHARD_TOKENS = 65_536
STREAM_SHARD_TOKENS = 8192  # of a capture whose activations are computed again: eight of them are mixed at a time
STREAM_WINDOW_ROWS = 65_536
SAMPLE_CONTEXTS = 32
SORTED_BATCHES = 8  # padded contexts are sorted by length within so many batches

Progress = Callable[[int, int | None, str], None]


def capture(
    lm: LM,
    texts: Iterable[Document],
    hook_names: Iterable[str],
    out_dir: str | Path,
    *,
    policy: TokenPolicy | None = None,
    dtype: str = "float32",
    max_tokens: int | None = None,
    batch_contexts: int = 16,
    shard_tokens: int | None = None,
    dataset: dict[str, Any] | None = None,
    autocast: bool = False,
    max_norm_ratio: float | None = None,
    stored: bool = True,
    part: int = 0,
    parts: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any] | None:
    """Write a capture folder (layout in shards.py) and return its manifest.

    max_tokens: stop after the context that brings the stored rows to this number; None reads all texts.
    dtype: storage, "float32", "bfloat16" or "float16". autocast: run the model in bfloat16 (forward.precision); how far
    its activations are from float32 is measured on the first 32 contexts and kept in the manifest's "sample".
    max_norm_ratio: leave out rows whose norm is more than so many times the median norm, at any hook point. The median
    is that of the stored rows of the first 32 contexts, measured before the first shard and kept for continuing.
    stored False: no activations are written; whoever opens the capture computes them again (stream.py).
    shard_tokens: tokens of a shard's contexts; 65,536, or 8,192 where activations are computed again.
    part, parts: write every parts-th shard only, beginning with `part`, from the same texts in the same order. Parts
    may run at once, anywhere; together they write the files that one would have written alone.
    progress(stored rows, max_tokens, step) is called after every batch and may raise to stop.

    On a finished folder it returns the manifest that is there; on an unfinished one (stopped or killed) it continues
    after the last whole shard, giving the same shards as an uninterrupted run. Both only if the settings agree. Returns
    None for a part that is not the last to finish.
    Raises CaptureError (bad settings, NaN, full disk), CorpusError (texts) or UnknownHookPoint, leaving nothing behind.
    """
    policy, out_dir = policy or TokenPolicy(), Path(out_dir)
    points = _points(lm, hook_names)
    settings = {
        "dtype": dtype,
        "autocast": autocast,
        "max_norm_ratio": max_norm_ratio,
        "stored": stored,
        "dataset": dataset or {},
        "max_tokens": max_tokens,
        "batch_contexts": batch_contexts,
        "shard_tokens": shard_tokens or (SHARD_TOKENS if stored else STREAM_SHARD_TOKENS),
    }
    _check_settings(lm, policy, settings)
    facts = json.loads(json.dumps(_facts(lm, points, policy, settings)))
    if (out_dir / MANIFEST).exists():
        return _finished(out_dir, facts)
    _check_disk(out_dir, points, dtype, max_tokens if stored else 0)
    writer = _writer(out_dir, facts, points, part, parts)
    contexts = _limited(iter_contexts(texts, lm.tokenizer, policy), policy, facts["special_ids"], max_tokens)
    with leaving_nothing(writer):
        contexts = _sampled(lm, contexts, writer, policy)
        with precision(lm, [point.name for point in points], autocast and stored):
            return _run(lm, contexts, writer, policy, progress)


def _run(
    lm: LM, contexts: Iterator[Context], writer: ShardWriter, policy: TokenPolicy, progress: Progress | None
) -> dict[str, Any] | None:
    facts = writer.state["facts"]
    limits = _limits(writer)
    per_shard, size = _sizes(facts, policy)
    number = -1
    for number, block in enumerate(_blocks(contexts, per_shard)):
        if number % writer.parts != writer.part:
            continue
        if writer.whole(number):
            _check_same(writer, number, block)
            continue
        writer.begin_shard(number, number * per_shard)
        for start in range(0, len(block), size):
            _add(lm, writer, block[start : start + size], policy, limits)
            if progress is not None:
                progress(writer.n_rows, facts["max_tokens"], "capturing activations")
        writer.close_shard()
    if any(writer.whole(later) for later in range(number + 1, number + 1 + writer.parts)):
        raise OtherTexts(_other_texts(writer))
    if policy.roles and not writer.n_rows and writer.parts == 1:
        raise CaptureError(f"No conversation has a token of {' or '.join(policy.roles)}; choose other roles.")
    return writer.finish(
        run_id=writer.path.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        held_out_fraction=HELD_OUT_FRACTION,
        versions={name: importlib.metadata.version(name) for name in ("torch", "transformers", "safetensors")},
    )


def _add(lm: LM, writer: ShardWriter, batch: list[Context], policy: TokenPolicy, limits: dict[str, float]) -> None:
    facts = writer.state["facts"]
    ids, lengths = arrays(batch, policy)
    stored = stored_mask(ids, policy, facts["special_ids"], lengths, kept_of(batch))
    x: dict[str, torch.Tensor] = {}
    if facts["stored"]:
        size = facts["batch_contexts"]
        x = stored_rows(lm, ids, stored, list(writer.hooks), lengths=lengths, batch_contexts=size)
    n_masked = 0
    if limits and x:
        over = outliers(x, limits)
        n_masked = int(over.sum())
        stored[stored] = ~over.cpu().numpy()
        x = {hook: values[~over] for hook, values in x.items()}
    first = np.array([context.document for context in batch])
    writer.add(ids, stored, x, first, batch[-1].last_document, lengths=lengths, n_masked=n_masked)


def arrays(batch: list[Context], policy: TokenPolicy) -> tuple[np.ndarray, np.ndarray | None]:
    """Token ids (b, t) of contexts, and their lengths (b,) where they are padded."""
    ids = np.stack([context.ids for context in batch])
    if policy.packed:
        return ids, None
    return ids, np.array([context.length for context in batch], dtype=np.int32)


def kept_of(batch: list[Context]) -> np.ndarray | None:
    """Which tokens (b, t) of contexts are of roles that are kept; None for all."""
    return None if batch[0].kept is None else np.stack([context.kept for context in batch if context.kept is not None])


def _sizes(facts: dict[str, Any], policy: TokenPolicy) -> tuple[int, int]:
    """Contexts of a shard, and of a batch. Padded contexts are sorted by length within a batch, so it is larger."""
    per_shard = max(1, facts["shard_tokens"] // policy.context_length)
    size = facts["batch_contexts"] * (1 if policy.packed else SORTED_BATCHES)
    return per_shard, size


def _blocks(contexts: Iterator[Context], size: int) -> Iterator[list[Context]]:
    while block := list(itertools.islice(contexts, size)):
        yield block


# ---------------------------------------------------------------------------------------------------- the sample


def _sampled(lm: LM, contexts: Iterator[Context], writer: ShardWriter, policy: TokenPolicy) -> Iterator[Context]:
    """The same contexts, after the first of them were looked at, if that is needed and was not done before."""
    facts = writer.state["facts"]
    needed = facts["autocast"] or facts["max_norm_ratio"] or not facts["stored"]
    if not needed or writer.state["sample"]:
        return contexts
    begin = list(itertools.islice(contexts, SAMPLE_CONTEXTS))
    writer.keep_sample(_look(lm, begin, facts, policy))
    return itertools.chain(begin, contexts)


def _look(lm: LM, begin: list[Context], facts: dict[str, Any], policy: TokenPolicy) -> dict[str, Any]:
    """Median norms of the stored rows of some contexts, and with autocast how far they are from exact ones."""
    ids, lengths = arrays(begin, policy)
    stored = stored_mask(ids, policy, facts["special_ids"], lengths, kept_of(begin))
    if facts["max_norm_ratio"] and not stored.any():
        raise CaptureError(
            f"None of the first {len(begin)} contexts holds a token that is kept, and the median norm is measured on them; "
            "set no limit on norms, or keep the tokens of more roles."
        )
    hooks = [point["name"] for point in facts["hook_points"]]

    def rows() -> dict[str, torch.Tensor]:
        return stored_rows(lm, ids, stored, hooks, lengths=lengths, batch_contexts=facts["batch_contexts"])

    with precision(lm, hooks, facts["autocast"]):
        x = rows()
    for hook, values in x.items():
        if not values.isfinite().all():
            raise CaptureError(f"The model's activations at {hook} hold NaN or infinite values; run it in float32.")
    medians = {hook: float(values.float().norm(dim=-1).median()) for hook, values in x.items() if len(values)}
    return {
        "n_contexts": len(begin),
        "n": int(stored.sum()),
        "median_norms": medians,
        "fidelity": fidelity(x, rows()) if facts["autocast"] and medians else {},
    }


def _limits(writer: ShardWriter) -> dict[str, float]:
    """The largest norm that is stored, for each hook point; none where nothing is left out."""
    ratio = writer.state["facts"]["max_norm_ratio"]
    return {hook: ratio * norm for hook, norm in writer.state["sample"]["median_norms"].items()} if ratio else {}


# ---------------------------------------------------------------------------------------------------- settings


def _points(lm: LM, hook_names: Iterable[str]) -> list[HookPoint]:
    points = {point.name: point for point in map(lm.resolve, hook_names)}
    if not points:
        raise CaptureError("No hook point was chosen; name at least one, such as blocks.0.hook_resid_post.")
    return list(points.values())


def _check_settings(lm: LM, policy: TokenPolicy, settings: dict[str, Any]) -> None:
    if settings["dtype"] not in DTYPES:
        raise CaptureError(f'Activations cannot be stored as "{settings["dtype"]}"; choose {", ".join(DTYPES)}.')
    longest = getattr(lm.model.config, "max_position_embeddings", None)
    if longest and policy.context_length > longest:
        raise CaptureError(
            f"The context length {policy.context_length:,} is more than the {longest:,} positions of {lm.name}."
        )
    ratio = settings["max_norm_ratio"]
    if ratio is not None and not 1 < ratio < float("inf"):
        raise CaptureError(f"The largest norm is {ratio:g} times the median; choose a number above 1.")
    bounds = {"max_tokens": 2**31 - 1, "batch_contexts": 4096, "shard_tokens": 2**24}  # row numbers are int32
    for name, most in bounds.items():
        value = settings[name]
        if value is not None and not 1 <= value <= most:
            raise CaptureError(f"{name} is {value:,}; choose a whole number from 1 to {most:,}.")


def _facts(lm: LM, points: list[HookPoint], policy: TokenPolicy, settings: dict[str, Any]) -> dict[str, Any]:
    """What decides the shards' content: equal facts and texts give equal shards."""
    model = {"name": lm.name, "revision": lm.revision, "d_model": lm.d_model, "n_layers": lm.n_layers}
    window = {} if settings["stored"] else {"window_rows": STREAM_WINDOW_ROWS}
    return (
        window
        | settings
        | {
            "model": model | {"dtype": str(lm.dtype).removeprefix("torch.")},
            "hook_points": [
                {"name": p.name, "module": p.module, "side": p.side, "d": p.d, "layer": p.layer} for p in points
            ],
            "policy": policy.facts(),
            "bos_id": lm.tokenizer.bos_token_id,
            "eos_id": lm.tokenizer.eos_token_id,
            "special_ids": sorted(special_ids(lm.tokenizer)),
        }
    )


# ---------------------------------------------------------------------------------------------------- the folder


def _finished(out_dir: Path, facts: dict[str, Any]) -> dict[str, Any]:
    manifest = open_capture(out_dir).manifest
    changed = [key.replace("_", " ") for key in facts if manifest.get(key) != facts[key]]
    if changed:
        raise CaptureError(
            f"The folder {out_dir.name} holds a finished capture with another {' and '.join(changed)}; choose a new "
            "folder."
        )
    return manifest


def _check_disk(out_dir: Path, points: list[HookPoint], dtype: str, max_tokens: int | None) -> None:
    existing = next(folder for folder in (out_dir, *out_dir.absolute().parents) if folder.exists())
    statistics = os.statvfs(existing)
    free = statistics.f_bavail * statistics.f_frsize
    whole = sum(file.stat().st_size for file in out_dir.glob("shard-*.safetensors"))  # of one that is continued
    need = (max_tokens or 0) * sum(point.d for point in points) * DTYPES[dtype].itemsize - whole
    if need > free:
        raise CaptureError(
            f"The capture needs about {need / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB free; capture fewer "
            "tokens or hook points, store bfloat16, or free space."
        )


def _writer(out_dir: Path, facts: dict[str, Any], points: list[HookPoint], part: int, parts: int) -> ShardWriter:
    hooks = {point.name: point.d for point in points} if facts["stored"] else {}
    try:
        return ShardWriter(out_dir, facts, hooks, facts["dtype"], part=part, parts=parts)
    except OSError as error:
        raise CaptureError(f"The folder {out_dir} cannot be written: {error.strerror}.") from error


def _limited(
    contexts: Iterator[Context], policy: TokenPolicy, special: list[int], max_tokens: int | None
) -> Iterator[Context]:
    rows = 0
    for context in contexts:
        yield context
        lengths = None if context.length is None else np.array([context.length])
        rows += int(stored_mask(context.ids[None], policy, special, lengths, kept_of([context])).sum())
        if max_tokens is not None and rows >= max_tokens:
            return


def _check_same(writer: ShardWriter, number: int, block: list[Context]) -> None:
    if not np.array_equal(np.stack([context.ids for context in block]), writer.shard_contexts(number)):
        raise OtherTexts(_other_texts(writer))


def _other_texts(writer: ShardWriter) -> str:
    return (
        f"The texts are not those with which the unfinished capture {writer.path.name} began; give the same texts or "
        "choose another folder."
    )
