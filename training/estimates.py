"""What a capture or a run will cost, said before it starts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from saehub.disk import free_bytes
from saehub.machine import Room
from training.memory import FLOAT, GPU_PROCESS, PROCESS, room, run_memory, streamed_memory
from training.models import Capture
from training.preview import Policy, Preview, preview
from training.speed import Speed, Speeds

CHARACTERS_PER_TOKEN = 4.0  # of English text, where the model's own tokenizer cannot be asked
STORAGE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class CaptureEstimate:
    """tokens None: the corpus was not counted and no limit is set. seconds None: the model was not captured from yet;
    else scaled from the capture `like`."""

    tokens: int | None
    bytes: int | None
    free: int
    hooks: list[dict[str, Any]]
    preview: Preview | None
    seconds: float | None = None
    like: Capture | None = None
    kept: tuple[str, ...] = ()  # what the choices mean, a sentence each

    @property
    def fits(self) -> bool:
        return self.bytes is None or self.bytes <= self.free


def estimate_capture(data: dict[str, Any]) -> CaptureEstimate | None:
    """From the clean fields of a CaptureForm; None while model, hook points or corpus are not chosen."""
    model, corpus, hooks = data.get("model"), data.get("corpus"), data.get("hook_names")
    if not (model and corpus and hooks):
        return None
    shown = preview(model, corpus.sampled, Policy.of(data))
    ratio = (shown and shown.characters_per_token) or CHARACTERS_PER_TOKEN
    share = 1.0 if shown is None or shown.share is None else shown.share
    found = int(corpus.n_characters / ratio * share) if corpus.n_characters is not None else None
    tokens = min(filter(None, (found, data.get("max_tokens"))), default=None)
    rows = [row for row in map(model.hook, hooks) if row]
    width = sum(row["d"] for row in rows)
    stored = data.get("stored") not in (False, "0")
    each = (width * STORAGE_BYTES[data.get("dtype") or "float32"] if stored else 0) + 3 * 4  # token, context, place
    seen = tokens and int(tokens / share) if share else None
    seconds, like = _capture_seconds(model, rows, seen, data.get("compute_dtype") or Capture.Compute.FP32, stored)
    size = None if tokens is None else tokens * each
    return CaptureEstimate(tokens, size, free_bytes(), rows, shown, seconds, like, tuple(_kept(data, corpus, stored)))


def _kept(data: dict[str, Any], corpus: Any, stored: bool) -> Iterator[str]:
    """What the choices of the form mean together."""
    if data.get("location"):
        return
    policy = Policy.of(data)
    whole = "conversation" if corpus.chats else "document"
    filled = (
        f"filled from one {whole} after the other" if policy.packed else f"each from one {whole}, padded at its end"
    )
    bos = "BOS comes first in each" if policy.prepend_bos else "no BOS is put before them"
    yield f"The model reads contexts of {policy.context_length:,} tokens, {filled}; {bos}."
    whose = f" of the {' and the '.join(policy.roles)}" if policy.roles else ""
    special = (
        f"of every token{whose}, control tokens too" if policy.store_special else f"of every token{whose} that is text"
    )
    kept = (
        f"The activation {special} is stored"
        if stored
        else f"Only the tokens are stored; every run computes the activations{whose}"
    )
    yield f"{kept}{'' if stored else ' again'}{'.' if policy.packed else '; padding counts for nothing.'}"
    if ratio := data.get("max_norm_ratio"):
        done = "left out" if stored else "replaced by ordinary ones"
        yield f"Tokens whose norm is above {ratio:g} times the median of the first contexts are {done}."
    if (data.get("parts") or 1) > 1:
        yield f"{data['parts']} jobs share the work."


def _capture_seconds(
    model: Any, hooks: list[dict[str, Any]], tokens: int | None, compute_dtype: str, stored: bool
) -> tuple[float | None, Capture | None]:
    """From the last capture of the same model in the same precision: a pass costs as much as it is deep. tokens: those that
    the model reads."""
    done = Capture.objects.ready().filter(
        model=model, compute_dtype=compute_dtype, location="", stored=True, seconds__gt=0, n_tokens__gt=0
    )
    last = done.order_by("-ready_at").first()
    if last is None or last.seconds is None or last.n_tokens is None or tokens is None or not stored:
        return None, None
    before = [row for row in map(model.hook, last.hook_names) if row]
    read = last.manifest.get("n_tokens_seen") or last.n_tokens
    return last.seconds / read * tokens * _depth(model, hooks) / _depth(model, before), last


def _depth(model: Any, hooks: list[dict[str, Any]]) -> int:
    """Layers that a pass runs through."""
    layers = [row["layer"] for row in hooks if row["layer"] is not None]
    return max(layers, default=0) + 1


@dataclass(frozen=True)
class RunEstimate:
    """seconds None: nothing comparable was trained here yet; else at `speed`, of several runs that of the first. passes:
    how often each training token is seen. memory: bytes that all of it takes, `shared` of them once however many runs
    there are; room: what there is where it will run."""

    seconds: float | None
    speed: Speed | None
    passes: float
    memory: int
    shared: int
    room: Room
    disk: int
    free: int
    runs: int = 1

    @property
    def fits(self) -> bool:
        return self.disk <= self.free

    @property
    def too_large(self) -> bool:
        """It takes more memory than there is at all."""
        return self.memory > self.room.total

    @property
    def crowded(self) -> bool:
        """It takes more memory than is free now, though not more than there is."""
        return self.room.free < self.memory <= self.room.total


def together(each: Sequence[RunEstimate]) -> RunEstimate:
    """Of runs side by side. Their time is the sum: what they share is small beside what each computes."""
    known = [run.seconds for run in each if run.seconds is not None]
    return replace(
        each[0],
        seconds=sum(known) if len(known) == len(each) else None,
        memory=sum(run.memory - run.shared for run in each) + each[0].shared,
        disk=sum(run.disk for run in each),
        runs=len(each),
    )


def estimate_run(
    speeds: Speeds,
    hook_name: str,
    architecture: str,
    d_sae: int,
    n_tokens: int,
    batch_size: int,
    hook_name_out: str = "",
    has: Room | None = None,
) -> RunEstimate:
    """Of a run on the capture of `speeds`, whose measured runs tell the time. has: the room there is, where it is known."""
    capture, has = speeds.capture, has or room()
    d_in = capture.d_in(hook_name) or 0
    d_out = capture.d_in(hook_name_out) or d_in
    weights = (d_in + d_out + 1) * d_sae + d_out
    shared = GPU_PROCESS if has.gpu else PROCESS
    if not capture.stored:
        width = sum(capture.d_in(name) or 0 for name in filter(None, (hook_name, hook_name_out)))
        shared += streamed_memory(capture.model.size_bytes or 0, width)
    processes = 1 if has.gpu else speeds.processes  # each on a GPU of its own
    speed = speeds.of(architecture, d_in, d_sae, batch_size) if d_in and d_sae else None
    return RunEstimate(
        seconds=n_tokens / speed.tokens_per_second if speed else None,
        speed=speed,
        passes=n_tokens / max(0.95 * (capture.n_tokens or 0), 1),
        memory=processes * (shared + run_memory(architecture, d_in, d_out, d_sae, batch_size, gpu=has.gpu)),
        shared=processes * shared,
        room=has,
        disk=2
        * 3
        * FLOAT
        * weights,  # a checkpoint holds weights and moments; the old one stays until the new one is whole
        free=free_bytes(),
    )
