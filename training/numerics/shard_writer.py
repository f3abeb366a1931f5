"""Writing a capture shard by shard, so that a killed one continues, several jobs can share one, and nothing is half-made.

`unfinished.json` stands in the folder until all is written. Where a capture is made in parts, each part writes the shards
whose number leaves its remainder, and has an unfinished file of its own; the last one to finish writes the manifest.
"""

import hashlib
import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saehub.causes import disk_is_full
from training.numerics.claim import Claim, Taken
from training.numerics.documents import CorpusError
from training.numerics.shards import (
    DTYPES,
    MANIFEST,
    UNFINISHED,
    CaptureError,
    is_held_out,
    read_tensor,
    write_json,
    write_tensors,
)

OWN_FILES = ("shard-*.safetensors", "*.tmp", "unfinished*.json", ".*.lock")


class OtherTexts(CaptureError):
    """The texts are not those of the unfinished capture, which is kept."""


class ShardWriter:
    """Writes a capture folder, or one part of it; begins after what an unfinished folder already holds.

    facts: JSON description of what is captured; a folder begun with other facts is refused. hooks: {hook name: d}.
    Either shards are closed by themselves once they hold `shard_rows` rows, at the end of the batch that filled them,
    or `begin_shard` and `close_shard` say where each begins and ends. part, parts: which share of the shards is written
    here.

    One writer at a time has a folder, or a part of it; another one is refused.

    A closed shard is written and hashed in a thread of its own while the model computes the next one, and what it could
    not write is raised by the next close, by `finish` or by `settle`.
    """

    def __init__(
        self,
        path: Path,
        facts: dict[str, Any],
        hooks: dict[str, int],
        dtype: str,
        shard_rows: int | None = None,
        *,
        part: int = 0,
        parts: int = 1,
    ) -> None:
        self.path, self.hooks, self.dtype, self.shard_rows = path, hooks, dtype, shard_rows
        self.part, self.parts = part, parts
        self._pending: list[dict[str, Tensor]] = []
        self._sums = dict.fromkeys(hooks, 0.0)
        self._pending_rows = self._masked = self._number = self._first = 0
        self._thread = ThreadPoolExecutor(1, "shard")
        self._being_written: Future[None] | None = None
        self.state: dict[str, Any] = {
            "facts": facts,
            "shards": [],
            "n_documents": 0,
            "sample": {},
            "seconds": 0.0,
            "done": False,
        }
        self._claim = self._claimed()
        try:
            self._begin(facts)
        except BaseException:
            self.release()
            raise
        self._documents = int(self.state["n_documents"])
        self.n_rows = sum(shard["n_rows"] for shard in self.state["shards"])  # with those waiting to be written
        self._clock = time.monotonic()
        self.begin_shard(len(self.state["shards"]), sum(shard["n_contexts"] for shard in self.state["shards"]))

    @property
    def file(self) -> Path:
        """What stands for this part until all is written."""
        return unfinished_file(self.path, self.part, self.parts)

    def whole(self, number: int) -> bool:
        """Whether this shard is on disk."""
        return any(shard["file"] == _name(number) for shard in self.state["shards"])

    def shard_contexts(self, number: int) -> np.ndarray:
        """Tokens (c, context_length) int32 of a shard that is on disk."""
        shard = next(shard for shard in self.state["shards"] if shard["file"] == _name(number))
        shape = (shard["n_contexts"], self.state["facts"]["policy"]["context_length"])
        return read_tensor(self.path / shard["file"], "contexts", shape, torch.int32).numpy()

    def keep_sample(self, sample: dict[str, Any]) -> None:
        """Keep what was measured before the first shard, for when this is continued."""
        self.state["sample"] = sample
        write_json(self.file, self.state)

    def begin_shard(self, number: int, first_context: int) -> None:
        """What is added from here on belongs to this shard, whose first context has this number."""
        self._number, self._first = number, first_context

    def add(
        self,
        contexts: np.ndarray,
        stored: np.ndarray,
        x: dict[str, Tensor],
        first: np.ndarray,
        last: int,
        *,
        lengths: np.ndarray | None = None,
        n_masked: int = 0,
    ) -> None:
        """Add contexts (b, t) int32 with the mask `stored` (b, t), the activations {hook: (rows, d)} of the stored
        tokens, and the documents in which each context begins (b,) and the last one ends. lengths: (b,), where contexts
        are padded. n_masked: rows of these contexts that were left out for their norm.

        Raises CaptureError for activations that are NaN or infinite, in the model or once in the storage dtype.
        """
        row, position = np.nonzero(stored)
        batch = {
            "contexts": torch.from_numpy(contexts.astype(np.int32)),
            "documents": torch.from_numpy(first.astype(np.int32)),
            "row_context": torch.from_numpy((row + self._next_context()).astype(np.int32)),
            "row_position": torch.from_numpy(position.astype(np.int32)),
        }
        if lengths is not None:
            batch["lengths"] = torch.from_numpy(lengths.astype(np.int32))
        for hook, values in x.items():
            batch[f"x/{hook}"] = self._kept(hook, values)
        self._pending.append(batch)
        self._pending_rows += len(row)
        self.n_rows += len(row)
        self._masked += n_masked
        self._documents = last + 1
        if self.shard_rows is not None and self._pending_rows >= self.shard_rows:
            self.close_shard()
            self.begin_shard(self._number + 1, self._next_context())

    def close_shard(self) -> None:
        """Begin to write the shard, if anything was added to it, once the one before it is written."""
        if not self._pending:
            return
        self.settle()
        entry: dict[str, Any] = {
            "file": _name(self._number),
            "first_context": self._first,
            "n_masked": self._masked,
            "norm_sums": self._sums,
        }
        self.state["n_documents"] = max(self._documents, self.state["n_documents"])
        self._first, batches, self._pending = self._next_context(), self._pending, []
        self._sums = dict.fromkeys(self.hooks, 0.0)
        self._pending_rows = self._masked = 0
        self._being_written = self._thread.submit(self._write, batches, entry)

    def settle(self) -> None:
        """Wait for the shard that is being written. Raises OSError where it could not be."""
        if self._being_written is not None:
            writing, self._being_written = self._being_written, None
            writing.result()

    def _write(self, batches: list[dict[str, Tensor]], entry: dict[str, Any]) -> None:
        """Write the shard, and then that it is whole."""
        shard = {key: _joined([batch[key] for batch in batches]) for key in batches[0]}
        batches.clear()
        file = self.path / entry["file"]
        write_tensors(file, shard)
        row_context = shard["row_context"].numpy()
        self.state["shards"].append(
            entry
            | {
                "n_contexts": len(shard["contexts"]),
                "n_seen": int(shard["lengths"].sum()) if "lengths" in shard else shard["contexts"].numel(),
                "n_rows": len(row_context),
                "n_held_out": int(is_held_out(row_context).sum()),
                "sha256": sha256(file),
            }
        )
        now = time.monotonic()
        self.state["seconds"] += now - self._clock
        self._clock = now
        write_json(self.file, self.state)

    def finish(self, **more: Any) -> dict[str, Any] | None:
        """Write what is left, and if no other part is unfinished the manifest, which makes the folder a capture.

        Returns the manifest, or None while other parts are unfinished."""
        self.close_shard()
        self.settle()
        self.state["done"] = True
        write_json(self.file, self.state)
        self.release()
        return merge(self.path, self.parts, **more)

    def release(self) -> None:
        """Give up the folder, as it stands."""
        self._lock.unlink(missing_ok=True)
        self._claim.release()

    @property
    def _lock(self) -> Path:
        return lock_file(self.path, self.part, self.parts)

    def _claimed(self) -> Claim:
        try:
            return Claim(self._lock)
        except Taken:
            raise CaptureError(
                f"Another capture is being written to {self.path.name}; wait for its end, or choose a new folder."
            ) from None

    def _begin(self, facts: dict[str, Any]) -> None:
        if self.file.exists():
            self._continue(facts)
        elif any(not any(file.match(pattern) for pattern in OWN_FILES) for file in self.path.iterdir()) or (
            self.parts == 1 and any(file != self._lock for file in self.path.iterdir())
        ):
            raise CaptureError(f"The folder {self.path.name} is not empty and holds no capture; choose a new folder.")
        else:
            write_json(self.file, self.state)

    def _continue(self, facts: dict[str, Any]) -> None:
        try:
            state = json.loads(self.file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise CaptureError(
                f"{self.file.name} of the capture {self.path.name} is damaged; choose a new folder."
            ) from error
        changed = [key.replace("_", " ") for key in facts if state["facts"].get(key) != facts[key]]
        if changed:
            raise CaptureError(
                f"The folder {self.path.name} holds an unfinished capture with another {' and '.join(changed)}; finish "
                "that one or choose another folder."
            )
        self.state = state | {"done": False}

    def _next_context(self) -> int:
        return self._first + sum(len(batch["contexts"]) for batch in self._pending)

    def _kept(self, hook: str, values: Tensor) -> Tensor:
        """The rows as they are stored; their norms are added up."""
        total = values.float().norm(dim=-1).double().sum()
        if not total.isfinite() and not values.isfinite().all():  # the norms tell it in the pass that is needed anyway
            raise CaptureError(f"The model's activations at {hook} hold NaN or infinite values; run it in float32.")
        self._sums[hook] += float(total)
        stored = values.to("cpu", DTYPES[self.dtype]).contiguous()
        if stored.dtype != torch.float32 and not stored.isfinite().all():
            raise CaptureError(
                f"Activations at {hook} are too large for {self.dtype}; store them as bfloat16 or float32."
            )
        return stored


def _joined(parts: list[Tensor]) -> Tensor:
    """Rows of several tensors in one. By numpy: in this thread torch would have a team of OpenMP threads of its own, which
    then spin on the cores of the model's (measured: a capture in bfloat16 took a quarter longer)."""
    dtype = parts[0].dtype
    if dtype == torch.bfloat16:  # which numpy does not know
        parts = [part.view(torch.int16) for part in parts]
    return torch.from_numpy(np.concatenate([part.numpy() for part in parts])).view(dtype)


def unfinished_file(path: Path, part: int = 0, parts: int = 1) -> Path:
    return path / (UNFINISHED if parts == 1 else f"unfinished-{part}-of-{parts}.json")


def lock_file(path: Path, part: int = 0, parts: int = 1) -> Path:
    return path / f".{unfinished_file(path, part, parts).stem}.lock"


def merge(path: Path, parts: int, **more: Any) -> dict[str, Any] | None:
    """The manifest of a capture all of whose parts are written, which is written too; None while one is not.

    Whoever comes last does it, and two at once write the same.
    """
    if (path / MANIFEST).exists():
        made: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        return made
    states = []
    for part in range(parts):
        file = unfinished_file(path, part, parts)
        state = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"done": False}
        if not state["done"]:
            return None
        states.append(state)
    manifest = _manifest(states) | more
    write_json(path / MANIFEST, manifest)
    for part in range(parts):
        unfinished_file(path, part, parts).unlink(missing_ok=True)
    return manifest


def _manifest(states: list[dict[str, Any]]) -> dict[str, Any]:
    facts = states[0]["facts"]
    shards = sorted((shard for state in states for shard in state["shards"]), key=lambda shard: shard["first_context"])
    hooks = shards[0]["norm_sums"] if shards else {}
    n = sum(shard["n_rows"] for shard in shards)
    n_contexts = sum(shard["n_contexts"] for shard in shards)
    sums = {hook: math.fsum(shard["norm_sums"][hook] for shard in shards) for hook in hooks}
    return facts | {
        "shards": [{key: value for key, value in shard.items() if key != "norm_sums"} for shard in shards],
        "n_contexts": n_contexts,
        "n_tokens": n,
        "n_masked": sum(shard["n_masked"] for shard in shards),
        "n_documents": max(state["n_documents"] for state in states),
        "norms": {hook: total / max(n, 1) for hook, total in sums.items()},
        "sample": states[0]["sample"],
        "n_tokens_seen": sum(shard["n_seen"] for shard in shards),
        "seconds": sum(state["seconds"] for state in states),
    }


def discard(path: Path, part: int = 0, parts: int = 1) -> None:
    """Remove what an unfinished part left in its folder, and the folder when nothing else is in it."""
    if parts == 1:
        going = [file for pattern in OWN_FILES for file in path.glob(pattern)]
    else:
        numbered = ((int(file.name[6:11]), file) for file in path.glob("shard-*.safetensors*"))
        going = [file for number, file in numbered if number % parts == part]
        going += [unfinished_file(path, part, parts), lock_file(path, part, parts)]
    for file in going:
        file.unlink(missing_ok=True)
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()


@contextmanager
def leaving_nothing(writer: ShardWriter) -> Iterator[None]:
    """Removes the unfinished folder when the work cannot succeed as asked. A stop or a crash leaves it, to continue, and so
    does a disk that fills up once a shard is whole.

    Whatever happens, no thread writes on once this has ended.
    """
    try:
        with _told(writer):
            yield
    finally:
        writer.release()


@contextmanager
def _told(writer: ShardWriter) -> Iterator[None]:
    try:
        try:
            yield
        finally:
            writer.settle()
    except OSError as error:
        if not disk_is_full(error):
            raise
        if whole := writer.state["shards"]:
            rows = sum(shard["n_rows"] for shard in whole)
            raise CaptureError(
                f"The disk is full. {rows:,} tokens in whole shards are kept: free space, and a retry goes on from there."
            ) from error
        discard(writer.path, writer.part, writer.parts)
        raise CaptureError(
            "The disk is full; the unfinished capture was removed. Free space or capture fewer tokens."
        ) from error
    except OtherTexts:
        raise
    except (CaptureError, CorpusError):
        discard(writer.path, writer.part, writer.parts)
        raise


def sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def verify(path: Path, manifest: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(shard, what is wrong with it, "" for nothing) of every shard, one after the other.

    Captures made before hashes were kept are only checked to be there and readable.
    """
    for shard in manifest["shards"]:
        file = path / shard["file"]
        if not file.exists():
            yield file.name, f"{file.name} is gone."
        elif "sha256" in shard and sha256(file) != shard["sha256"]:
            yield file.name, f"{file.name} is not what was written: its SHA-256 differs."
        else:
            shape = (shard["n_contexts"], manifest["policy"]["context_length"])
            try:
                read_tensor(file, "contexts", shape, torch.int32)
            except CaptureError as error:
                yield file.name, str(error)
            else:
                yield file.name, ""


def _name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"
