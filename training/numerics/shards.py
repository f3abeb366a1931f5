"""A capture on disk: activations of real tokens in safetensors shards, with the tokens they came from.

A folder holds `manifest.json` and `shard-00000.safetensors`, ... Every shard has
  contexts (c, context_length) int32   every token the model saw, BOS included
  documents (c,) int32                 index of the document of each context's first text token
  row_context (n,) int32               global number of the context of each stored row
  row_position (n,) int32              position of the row's token in its context
  x/<hook name> (n, d)                 activations in the storage dtype, one tensor per hook point
Rows of special tokens are absent unless the policy stores them. The manifest is written last: a folder without it is
unfinished, and `unfinished.json` says which of its shards are whole. Shards are memory-mapped; reading touches only the
rows asked for.
"""

import errno
import functools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

MANIFEST = "manifest.json"
UNFINISHED = "unfinished.json"  # stands in for the manifest while shards are being written
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HELD_OUT_FRACTION = 0.05
WINDOW_ROWS = 2**18  # rows shuffled together; part of the definition of the shuffled order

Split = Literal["train", "held_out", "all"]


class CaptureError(ValueError):
    """A capture cannot be made or read; the message is one sentence."""


def is_held_out(contexts: np.ndarray, fraction: float = HELD_OUT_FRACTION) -> np.ndarray:
    """True for context numbers kept away from training: (number * 2654435761) mod 2^32 < fraction * 2^32.

    Knuth's multiplicative constant spreads the held-out contexts evenly. Whole contexts are held out, so no row of a
    held-out context is ever trained on. Context 0 is always held out.
    """
    return (np.asarray(contexts, dtype=np.int64) * 2654435761) % 2**32 < fraction * 2**32


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write through a temporary name, so the file is whole or absent."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """safetensors through a temporary name. Raises OSError (ENOSPC) when the disk is full."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file(tensors, temporary, metadata)
        os.replace(temporary, path)
    except SafetensorError as error:  # the library reports system errors as text
        if f"os error {errno.ENOSPC}" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def open_capture(path: str | Path) -> "Capture":
    """Open a finished capture. Raises CaptureError when it is missing, unfinished or not a capture."""
    path = Path(path)
    if not path.is_dir():
        raise CaptureError(f"There is no capture folder {path}.")
    file = path / MANIFEST
    if not file.exists():
        raise CaptureError(f"The capture {path.name} has no {MANIFEST}: it was not finished; run the capture again.")
    try:
        return Capture(path, json.loads(file.read_text(encoding="utf-8")))
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CaptureError(f"{MANIFEST} of the capture {path.name} is damaged ({error}).") from error


def _read_tensor(file: Path, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A memory-mapped tensor of a shard, checked against what the manifest says."""
    try:
        with safe_open(file, framework="pt") as handle:
            tensor = handle.get_tensor(key)
    except FileNotFoundError as error:
        raise CaptureError(f"The capture {file.parent.name} lost its file {file.name}; capture it again.") from error
    except (SafetensorError, OSError) as error:
        raise CaptureError(f"{file.name} of the capture {file.parent.name} is damaged or cut ({error}).") from error
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise CaptureError(
            f"{file.name} of the capture {file.parent.name} holds {key} as {tensor.dtype} {tuple(tensor.shape)} where "
            f"the manifest says {dtype} {shape}."
        )
    return tensor


class Capture:
    """A finished capture, read-only. Opening reads the manifest only; shards are mapped when they are needed."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.shards: list[dict[str, Any]] = manifest["shards"]
        self.hook_names: list[str] = [point["name"] for point in manifest["hook_points"]]
        self.d: dict[str, int] = {point["name"]: int(point["d"]) for point in manifest["hook_points"]}
        self.context_length = int(manifest["policy"]["context_length"])
        self.held_out_fraction = float(manifest["held_out_fraction"])
        self.n_contexts = int(manifest["n_contexts"])
        self.n_rows = int(manifest["n_tokens"])
        self.dtype = DTYPES[manifest["dtype"]]
        self._rows_of = [(int(s["n_rows"]), int(s["n_held_out"])) for s in self.shards]
        self._activations = functools.lru_cache(maxsize=64)(self._map)  # a page is faulted in once, not every batch

    def split_rows(self, split: Split = "all") -> int:
        """Number of stored rows of a split."""
        return sum(self._shard_rows(i, split) for i in range(len(self.shards)))

    def shard_contexts(self, i: int) -> np.ndarray:
        """Tokens (c, context_length) int32 of shard i; context j is global context shards[i]["first_context"] + j."""
        return self._read(i, "contexts", (self.shards[i]["n_contexts"], self.context_length), torch.int32).numpy()

    def contexts(self) -> np.ndarray:
        """Tokens of all contexts (n_contexts, context_length) int32, in memory: 4 bytes a token."""
        return np.concatenate([self.shard_contexts(i) for i in range(len(self.shards))])

    def documents(self) -> np.ndarray:
        """Document index of every context, (n_contexts,) int32."""
        counts = [shard["n_contexts"] for shard in self.shards]
        return np.concatenate([self._read(i, "documents", (c,), torch.int32).numpy() for i, c in enumerate(counts)])

    def rows(
        self, hook: str, split: Split = "all", *, chunk: int = 4096
    ) -> Iterator[tuple[Tensor, np.ndarray, np.ndarray]]:
        """Every row of a split in stored order: (x (m, d) float32, row_context (m,), row_position (m,)), m <= chunk."""
        self._check(hook, split)
        for i in range(len(self.shards)):
            context, position = self._row_tokens(i)
            chosen = self._split_of(context, split)
            for start in range(0, len(chosen), chunk):
                part = chosen[start : start + chunk]
                x = self._gather(hook, np.full(len(part), i), part)
                yield x, context[part], position[part]

    def batches(
        self,
        hook: str,
        batch_size: int,
        *,
        split: Split = "train",
        shuffle: bool = True,
        seed: int = 0,
        epochs: int | None = None,
        n_rows: int | None = None,
        start_row: int = 0,
    ) -> Iterator[Tensor]:
        """Batches (batch_size, d) float32 of a split, the last one possibly smaller.

        Without `epochs` and `n_rows` it is one pass; with `n_rows` as many passes as that many rows need. The order is
        fixed by the seed and does not depend on the batch size: shards are shuffled, then all rows of a window of
        consecutive shards (up to 2^18 rows) are shuffled together, anew in every pass. `start_row` leaves out the rows
        already consumed of that same order, reading nothing of whole windows left out.
        """
        self._check(hook, split)
        total = self.split_rows(split)
        if batch_size < 1:
            raise CaptureError(f"The batch size is {batch_size}; it must be at least 1.")
        if not total:
            raise CaptureError(
                f"The capture {self.path.name} has no {split.replace('_', '-')} rows; capture more text."
            )
        end = n_rows if n_rows is not None else total * (epochs or 1)
        return self._batches(hook, batch_size, split, seed if shuffle else None, start_row, end)

    # ------------------------------------------------------------------------------------------------ the order

    def _batches(
        self, hook: str, batch_size: int, split: Split, seed: int | None, start: int, end: int
    ) -> Iterator[Tensor]:
        shard, row, at = np.empty(0, np.int64), np.empty(0, np.int64), start
        for more_shard, more_row in self._order(split, seed, start):
            shard, row = np.concatenate([shard, more_shard]), np.concatenate([row, more_row])
            while at < end and len(row) >= min(batch_size, end - at):
                m = min(batch_size, end - at)
                yield self._gather(hook, shard[:m], row[:m])
                shard, row, at = shard[m:], row[m:], at + m
            if at >= end:
                return

    def _order(self, split: Split, seed: int | None, skip: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Endless (shard numbers, row numbers), one window at a time, beginning `skip` rows in."""
        epoch, skip = divmod(skip, self.split_rows(split))
        while True:
            for number, window in enumerate(self._windows(split, seed, epoch)):
                size = sum(self._shard_rows(i, split) for i in window)
                if skip >= size:
                    skip -= size
                    continue
                shard, row = self._window_rows(window, split)
                if seed is not None:
                    order = np.random.default_rng([seed, epoch, number]).permutation(size)
                    shard, row = shard[order], row[order]
                yield shard[skip:], row[skip:]
                skip = 0
            epoch += 1

    def _windows(self, split: Split, seed: int | None, epoch: int) -> list[list[int]]:
        count = len(self.shards)
        order = range(count) if seed is None else np.random.default_rng([seed, epoch]).permutation(count).tolist()
        windows: list[list[int]] = []
        size = WINDOW_ROWS
        for i in order:
            rows = self._shard_rows(i, split)
            if size + rows > WINDOW_ROWS:
                windows.append([])
                size = 0
            windows[-1].append(i)
            size += rows
        return windows

    def _window_rows(self, window: list[int], split: Split) -> tuple[np.ndarray, np.ndarray]:
        rows = [self._split_of(self._row_tokens(i)[0], split) for i in window]
        return np.concatenate([np.full(len(r), i) for i, r in zip(window, rows, strict=True)]), np.concatenate(rows)

    def _shard_rows(self, i: int, split: Split) -> int:
        rows, held_out = self._rows_of[i]
        return {"all": rows, "held_out": held_out, "train": rows - held_out}[split]

    def _split_of(self, row_context: np.ndarray, split: Split) -> np.ndarray:
        if split == "all":
            return np.arange(len(row_context))
        held_out = is_held_out(row_context, self.held_out_fraction)
        return np.flatnonzero(held_out if split == "held_out" else ~held_out)

    # ------------------------------------------------------------------------------------------------ the files

    def _gather(self, hook: str, shard: np.ndarray, row: np.ndarray) -> Tensor:
        out = torch.empty(len(row), self.d[hook])
        for i in np.unique(shard).tolist():
            at = np.flatnonzero(shard == i)
            x = self._activations(i, hook)
            out[torch.from_numpy(at)] = x[torch.from_numpy(row[at])].float()
        if not out.sum().isfinite():
            raise CaptureError(
                f"The capture {self.path.name} holds NaN or infinite values at {hook}; capture it again."
            )
        return out

    def _map(self, i: int, hook: str) -> Tensor:
        return self._read(i, f"x/{hook}", (self._rows_of[i][0], self.d[hook]), self.dtype)

    def _row_tokens(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        n = self._rows_of[i][0]
        context = self._read(i, "row_context", (n,), torch.int32).numpy()
        return context, self._read(i, "row_position", (n,), torch.int32).numpy()

    def _read(self, i: int, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return _read_tensor(self.path / self.shards[i]["file"], key, shape, dtype)

    def _check(self, hook: str, split: str) -> None:
        if hook not in self.d:
            raise CaptureError(
                f"The capture {self.path.name} has no hook point {hook}; it has {', '.join(self.hook_names)}."
            )
        if split not in ("train", "held_out", "all"):
            raise CaptureError(f'There is no split "{split}"; choose train, held_out or all.')


class ShardWriter:
    """Writes a capture folder shard by shard; begins after the last whole shard of an unfinished folder.

    facts: JSON description of what is captured; a folder begun with other facts is refused. hooks: {hook name: d}.
    A shard is closed once it holds `shard_rows` rows, at the end of the batch that filled it.
    """

    def __init__(self, path: Path, facts: dict[str, Any], hooks: dict[str, int], dtype: str, shard_rows: int) -> None:
        self.path, self.hooks, self.dtype, self.shard_rows = path, hooks, dtype, shard_rows
        self._pending: list[dict[str, Tensor]] = []
        self._pending_rows = 0
        self._documents = 0
        self.state: dict[str, Any] = {
            "facts": facts,
            "shards": [],
            "n_contexts": 0,
            "n_tokens": 0,
            "n_documents": 0,
            "norm_sums": dict.fromkeys(hooks, 0.0),
            "seconds": 0.0,
        }
        self._begin(facts)
        self._clock = time.monotonic()

    @property
    def n_contexts(self) -> int:
        """Contexts in whole shards, safely on disk."""
        return int(self.state["n_contexts"])

    @property
    def n_rows(self) -> int:
        """Rows in whole shards and rows waiting for the next one."""
        return int(self.state["n_tokens"]) + self._pending_rows

    def whole_shards(self) -> Iterator[np.ndarray]:
        """Tokens (c, context_length) int32 of every shard already on disk."""
        length = self.state["facts"]["policy"]["context_length"]
        for shard in self.state["shards"]:
            file = self.path / shard["file"]
            yield _read_tensor(file, "contexts", (shard["n_contexts"], length), torch.int32).numpy()

    def add(self, contexts: np.ndarray, stored: np.ndarray, x: dict[str, Tensor], first: np.ndarray, last: int) -> None:
        """Add contexts (b, t) int32 with the mask `stored` (b, t), the activations {hook: (rows, d)} of the stored
        tokens, and the documents in which each context begins (b,) and the last one ends.

        Raises CaptureError for activations that are NaN or infinite, in the model or once in the storage dtype.
        """
        row, position = np.nonzero(stored)
        batch = {
            "contexts": torch.from_numpy(contexts.astype(np.int32)),
            "documents": torch.from_numpy(first.astype(np.int32)),
            "row_context": torch.from_numpy((row + self._next_context()).astype(np.int32)),
            "row_position": torch.from_numpy(position.astype(np.int32)),
        }
        for hook, values in x.items():
            batch[f"x/{hook}"] = self._to_storage(hook, values)
            self.state["norm_sums"][hook] += float(values.float().norm(dim=-1).double().sum())
        self._pending.append(batch)
        self._pending_rows += len(row)
        self._documents = last + 1
        if self._pending_rows >= self.shard_rows:
            self._flush()

    def finish(self, **more: Any) -> dict[str, Any]:
        """Write what is left and then the manifest, which makes the folder a capture; returns the manifest."""
        if self._pending:
            self._flush()
        sums, n = self.state.pop("norm_sums"), self.state["n_tokens"]
        length = self.state["facts"]["policy"]["context_length"]
        norms = {hook: total / max(n, 1) for hook, total in sums.items()}
        manifest = self.state.pop("facts") | more | self.state
        manifest |= {"norms": norms, "n_tokens_seen": self.n_contexts * length}
        write_json(self.path / MANIFEST, manifest)
        (self.path / UNFINISHED).unlink()
        return manifest

    def _begin(self, facts: dict[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / UNFINISHED
        if file.exists():
            self._continue(file, facts)
        elif any(self.path.iterdir()):
            raise CaptureError(f"The folder {self.path.name} is not empty and holds no capture; choose a new folder.")
        else:
            write_json(file, self.state)

    def _continue(self, file: Path, facts: dict[str, Any]) -> None:
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise CaptureError(
                f"{file.name} of the capture {self.path.name} is damaged; choose a new folder."
            ) from error
        changed = [key.replace("_", " ") for key in facts if state["facts"].get(key) != facts[key]]
        if changed:
            raise CaptureError(
                f"The folder {self.path.name} holds an unfinished capture with another {' and '.join(changed)}; finish "
                "that one or choose another folder."
            )
        self.state = state
        self._documents = state["n_documents"]

    def _next_context(self) -> int:
        return self.n_contexts + sum(len(batch["contexts"]) for batch in self._pending)

    def _to_storage(self, hook: str, values: Tensor) -> Tensor:
        if not values.isfinite().all():
            raise CaptureError(f"The model's activations at {hook} hold NaN or infinite values; run it in float32.")
        stored = values.to("cpu", DTYPES[self.dtype]).contiguous()
        if not stored.isfinite().all():
            raise CaptureError(
                f"Activations at {hook} are too large for {self.dtype}; store them as bfloat16 or float32."
            )
        return stored

    def _flush(self) -> None:
        shard = {key: torch.cat([batch[key] for batch in self._pending]) for key in self._pending[0]}
        self._pending = []
        number = len(self.state["shards"])
        file = f"shard-{number:05d}.safetensors"
        write_tensors(self.path / file, shard)
        row_context = shard["row_context"].numpy()
        entry = {
            "file": file,
            "first_context": self.n_contexts,
            "n_contexts": len(shard["contexts"]),
            "n_rows": len(row_context),
            "n_held_out": int(is_held_out(row_context).sum()),
        }
        self.state["shards"].append(entry)
        self.state["n_contexts"] += entry["n_contexts"]
        self.state["n_tokens"] += entry["n_rows"]
        self.state["n_documents"] = self._documents
        self.state["seconds"] += time.monotonic() - self._clock
        self._pending_rows, self._clock = 0, time.monotonic()
        write_json(self.path / UNFINISHED, self.state)


def discard(path: Path) -> None:
    """Remove what an unfinished capture left in its folder, and the folder when nothing else is in it."""
    for pattern in ("shard-*.safetensors", "*.tmp", UNFINISHED):
        for file in path.glob(pattern):
            file.unlink()
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()
