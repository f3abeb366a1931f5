"""A capture on disk: activations of real tokens in safetensors shards, with the tokens they came from.

A folder holds `manifest.json` and `shard-00000.safetensors`, ... Every shard has
  contexts (c, context_length) int32   every token the model saw, BOS included
  documents (c,) int32                 index of the document of each context's first text token
  lengths (c,) int32                   tokens of each context that are not padding; only where contexts are padded
  row_context (n,) int32               global number of the context of each stored row
  row_position (n,) int32              position of the row's token in its context
  x/<hook name> (n, d)                 activations in the storage dtype, one tensor per hook point
Rows of special tokens are absent unless the policy stores them, rows of padding always, and so are outliers by norm
and tokens of other roles of a conversation where they were left out. The manifest is written last and holds the SHA-256 of
every shard: a folder without it is unfinished, and `unfinished.json` says which of its shards are whole (shard_writer.py).
Shards are memory-mapped; reading touches only the rows asked for. A capture that is streamed has no x: its model computes
them again (stream.py).
"""

import functools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from saehub.causes import system_error

MANIFEST = "manifest.json"
UNFINISHED = "unfinished.json"  # stands in for the manifest while shards are being written
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HELD_OUT_FRACTION = 0.05
WINDOW_ROWS = 2**18  # rows shuffled together; part of the definition of the shuffled order

Split = Literal["train", "held_out", "all"]
Hooks = str | Sequence[str]  # a hook point, or several whose activations are put side by side


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
    """safetensors through a temporary name. Raises OSError, with its errno, for what the system refuses."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file(tensors, temporary, metadata)
        os.replace(temporary, path)
    except SafetensorError as error:  # the library reports system errors as text
        if number := system_error(error):
            raise OSError(number, os.strerror(number), str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def open_capture(path: str | Path) -> "Capture":
    """Open a finished capture. Raises CaptureError when it is missing, unfinished or not a capture.

    One that is streamed has the same interface; its model is loaded when the first activation is asked for.
    """
    path = Path(path)
    if not path.is_dir():
        raise CaptureError(f"There is no capture folder {path}.")
    file = path / MANIFEST
    if not file.exists():
        raise CaptureError(f"The capture {path.name} has no {MANIFEST}: it was not finished; run the capture again.")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        if manifest.get("stored", True):
            return Capture(path, manifest)
        from training.numerics.stream import StreamedCapture  # late: it reaches the language models

        return StreamedCapture(path, manifest)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CaptureError(f"{MANIFEST} of the capture {path.name} is damaged ({error}).") from error


def read_tensor(file: Path, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
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
    """A finished capture, read-only. Opening reads the manifest only; shards are mapped when they are needed.

    window_rows: rows shuffled together by `batches`.
    """

    SHARDS_KEPT = 64  # mapped at a time

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
        self.window_rows = int(manifest.get("window_rows") or WINDOW_ROWS)
        self._activations = functools.lru_cache(self.SHARDS_KEPT)(
            self._map
        )  # a page is faulted in once, not every batch

    def split_rows(self, split: Split = "all") -> int:
        """Number of stored rows of a split."""
        return sum(self._shard_rows(i, split) for i in range(len(self.shards)))

    def shard_contexts(self, i: int) -> np.ndarray:
        """Tokens (c, context_length) int32 of shard i; context j is global context shards[i]["first_context"] + j.

        Raises CaptureError for an imported capture whose tokens are not known."""
        if not self.manifest.get("tokens_known", True):
            raise CaptureError(
                f"The tokens of the capture {self.path.name} are not known: it was read from a store that does not keep "
                "them, and its corpus gives others."
            )
        return self._read(i, "contexts", (self.shards[i]["n_contexts"], self.context_length), torch.int32).numpy()

    def contexts(self) -> np.ndarray:
        """Tokens of all contexts (n_contexts, context_length) int32, in memory: 4 bytes a token."""
        return np.concatenate([self.shard_contexts(i) for i in range(len(self.shards))])

    def documents(self) -> np.ndarray:
        """Document index of every context, (n_contexts,) int32."""
        counts = [shard["n_contexts"] for shard in self.shards]
        return np.concatenate([self._read(i, "documents", (c,), torch.int32).numpy() for i, c in enumerate(counts)])

    def shard_lengths(self, i: int) -> np.ndarray | None:
        """Tokens of each context of shard i that are not padding, (c,) int32; None where nothing is padded."""
        if self.manifest["policy"].get("packed", True):
            return None
        return self._read(i, "lengths", (self.shards[i]["n_contexts"],), torch.int32).numpy()

    def lengths(self) -> np.ndarray | None:
        """Tokens of every context that are not padding, (n_contexts,) int32; None where nothing is padded."""
        found = [self.shard_lengths(i) for i in range(len(self.shards))]
        return None if not found or found[0] is None else np.concatenate([one for one in found if one is not None])

    def shard_rows(self, i: int, hook: str) -> Tensor:
        """Activations (n, d) of shard i as they are stored."""
        self._check(hook, "all")
        return self._activations(i, hook)

    def rows(
        self, hook: str, split: Split = "all", *, chunk: int = 4096, start: int = 0
    ) -> Iterator[tuple[Tensor, np.ndarray, np.ndarray]]:
        """Every row of a split in stored order: (x (m, d) float32, row_context (m,), row_position (m,)), m <= chunk.

        start: rows left out at the beginning, without being read."""
        self._check(hook, split)
        for i in range(len(self.shards)):
            n = self._shard_rows(i, split)
            left_out, start = min(start, n), start - min(start, n)
            if left_out == n:
                continue
            context, position = self._row_tokens(i)
            chosen = self._split_of(context, split)[left_out:]
            for first in range(0, len(chosen), chunk):
                part = chosen[first : first + chunk]
                yield self._in_order(hook, i, part), context[part], position[part]

    def batches(
        self,
        hook: Hooks,
        batch_size: int,
        *,
        split: Split = "train",
        shuffle: bool = True,
        seed: int = 0,
        epochs: int | None = None,
        n_rows: int | None = None,
        start_row: int = 0,
    ) -> Iterator[Tensor]:
        """Batches (batch_size, d) float32 of a split, the last one possibly smaller; of several hook points the
        activations of the same tokens side by side, d the sum of their widths.

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
        self, hook: Hooks, batch_size: int, split: Split, seed: int | None, start: int, end: int
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
        size = self.window_rows
        for i in order:
            rows = self._shard_rows(i, split)
            if size + rows > self.window_rows:
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

    def _gather(self, hook: Hooks, shard: np.ndarray, row: np.ndarray) -> Tensor:
        hooks = _listed(hook)
        widths = [self.d[name] for name in hooks]
        out = torch.empty(len(row), sum(widths))
        for i in np.unique(shard).tolist():
            at = np.flatnonzero(shard == i)
            places, rows = torch.from_numpy(at), torch.from_numpy(row[at])
            for name, part in zip(hooks, out.split(widths, dim=1), strict=True):
                part[places] = self._activations(i, name)[rows].float()
        self._refuse_infinite(out, hooks)
        return out

    def _in_order(self, hook: str, i: int, row: np.ndarray) -> Tensor:
        """Rising rows of one shard (m, d) float32; read at once where none is left out between them."""
        stored = self._activations(i, hook)
        first, last = int(row[0]), int(row[-1]) + 1
        found = stored[first:last] if last - first == len(row) else stored[torch.from_numpy(row)]
        found = found.to(torch.float32, copy=True)
        self._refuse_infinite(found, [hook])
        return found

    def _refuse_infinite(self, found: Tensor, hooks: Sequence[str]) -> None:
        if not found.sum().isfinite():
            raise CaptureError(
                f"The capture {self.path.name} holds NaN or infinite values at {' or '.join(hooks)}; capture it again."
            )

    def _map(self, i: int, hook: str) -> Tensor:
        return self._read(i, f"x/{hook}", (self._rows_of[i][0], self.d[hook]), self.dtype)

    def _row_tokens(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        n = self._rows_of[i][0]
        context = self._read(i, "row_context", (n,), torch.int32).numpy()
        return context, self._read(i, "row_position", (n,), torch.int32).numpy()

    def _read(self, i: int, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return read_tensor(self.path / self.shards[i]["file"], key, shape, dtype)

    def _check(self, hook: Hooks, split: str) -> None:
        for name in _listed(hook):
            if name not in self.d:
                raise CaptureError(
                    f"The capture {self.path.name} has no hook point {name}; it has {', '.join(self.hook_names)}."
                )
        if split not in ("train", "held_out", "all"):
            raise CaptureError(f'There is no split "{split}"; choose train, held_out or all.')


def _listed(hook: Hooks) -> Sequence[str]:
    return [hook] if isinstance(hook, str) else hook
