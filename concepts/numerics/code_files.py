"""The pass of a harvest over the tokens: every code above 0, written to the scratch file of its block of features.

Each file holds the codes of its features in the order of the tokens. What was encoded is noted every CHECKPOINT_SECONDS,
so that a pass that was killed goes on from there.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from concepts.numerics.sparse_encode import Fires, SparseEncoder
from concepts.numerics.together import SAMPLE, sampled
from saes.numerics.sae import SAE
from training.numerics.compiled import kernels
from training.numerics.shards import Capture, Split, write_json

BLOCK_CODES = 2**20  # codes grouped at once, up to twice as many; about 60 bytes of memory each (100 without numba)
MAX_BLOCKS = 256  # scratch files open at once
CHECKPOINT_SECONDS = 20.0
SCRATCH = "scratch.json"  # how far the encoding came
CODE = np.dtype([("feature", np.int32), ("context", np.int32), ("position", np.int32), ("value", np.float32)])


class HarvestError(ValueError):
    """The features cannot be harvested; the message is one sentence."""


@dataclass(frozen=True)
class Block:
    """Features `first` to `end` (exclusive) and the file of their codes, in the order of the tokens."""

    first: int
    end: int
    file: Path

    def codes(self) -> np.ndarray:
        return np.fromfile(self.file, dtype=CODE)


class Encoding:
    """The pass over the rows: encodes each once and sorts its codes into the files of their blocks."""

    def __init__(self, sae: SAE, capture: Capture, hook: str, split: Split, folder: Path, n_rows: int) -> None:
        self.sae, self.capture, self.hook, self.split = sae, capture, hook, split
        self.folder, self.n_rows = folder, n_rows
        self.encode = SparseEncoder(sae)
        self.blocks: list[Block] = []
        self.files: list[BinaryIO] = []  # of the blocks; the last one holds the sample of whole rows (together.py)
        self.done = 0

    @torch.inference_mode()
    def run(self, report: Callable[[int], None]) -> list[Block]:
        """Encode from where the folder's note says that it stopped."""
        self._resume()
        last_note = began = time.monotonic()
        try:
            rows = self.capture.rows(self.hook, self.split, chunk=self.encode.rows, start=self.done)
            for x, context, position in rows if self.done < self.n_rows else ():
                fires = _fires(self.encode, x.to(self.sae.W_dec.device))
                if not self.blocks:
                    self.blocks = _plan(fires[1], len(x), self.n_rows, self.sae.config.d_sae, self.folder)
                    self.files = [file.open("wb") for file in self._places()]
                _write(fires, context, position, self.blocks, self.files[:-1])
                self.files[-1].write(sampled(self.done, len(x), self.n_rows, *fires[:2]).view(np.uint8).data)
                self.done += len(x)
                if time.monotonic() - last_note >= CHECKPOINT_SECONDS:
                    self._note()
                    last_note = time.monotonic()
                report(self.done)
                if self.done >= self.n_rows:
                    break
            if time.monotonic() - began >= CHECKPOINT_SECONDS:  # else it is done again sooner than it is on the disk
                self._note()
        finally:
            for file in self.files:
                file.close()
        return self.blocks

    def _places(self) -> list[Path]:
        return [*(block.file for block in self.blocks), self.folder / SAMPLE]

    def _note(self) -> None:
        """Write down how far it came; what is written to the files after this is cut off when it is taken up again."""
        sizes = []
        for file in self.files:
            file.flush()
            os.fsync(file.fileno())
            sizes.append(file.tell())
        edges = [[block.first, block.end] for block in self.blocks]
        found = {"done": self.done, "edges": edges, "sizes": sizes, "dense": self.encode.dense}
        write_json(self.folder / SCRATCH, noted(self.folder) | found)

    def _resume(self) -> None:
        note = noted(self.folder)
        if not note.get("done") or "dense" not in note:
            return
        self.blocks = [Block(first, end, self.folder / f"codes-{first}") for first, end in note["edges"]]
        places = self._places()
        if len(places) != len(note["sizes"]) or any(
            not place.exists() or place.stat().st_size < n for place, n in zip(places, note["sizes"], strict=True)
        ):
            self.blocks = []
            return
        self.files = [place.open("r+b") for place in places]
        for file, size in zip(self.files, note["sizes"], strict=True):
            file.truncate(size)
            file.seek(size)
        self.done, self.encode.dense = note["done"], note["dense"]


def noted(folder: Path) -> dict[str, Any]:
    """What is known of a harvest that was begun in this folder; empty for none, or one that cannot be read."""
    try:
        found: dict[str, Any] = json.loads((folder / SCRATCH).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def _fires(encode: SparseEncoder, x: torch.Tensor) -> Fires:
    """(row, feature, value) of all codes above 0 of rows x (m, d), in row order."""
    row, feature, value = encode(x)
    if not np.isfinite(value.sum()):
        raise HarvestError(
            "The SAE gives codes that are NaN or infinite; its weights are damaged or do not fit the model."
        )
    return row, feature.astype(np.int32, copy=False), value


def _plan(feature: np.ndarray, rows: int, n_rows: int, d_sae: int, folder: Path) -> list[Block]:
    """Blocks of features of about BLOCK_CODES codes, judged by the codes of the first chunk; refuses when the disk is too small."""
    expected = len(feature) / rows * n_rows
    _check_space(expected * CODE.itemsize, folder)
    # the even part of the load keeps a block below 2^16 features, where numpy's stable sort is a radix sort
    n_blocks = min(max(int(expected / BLOCK_CODES) + 1, -(-d_sae // 2**15)), MAX_BLOCKS, d_sae)
    load = np.cumsum(np.bincount(feature, minlength=d_sae) + max(1.0, len(feature) / d_sae))
    cuts = np.searchsorted(load, load[-1] * np.arange(1, n_blocks) / n_blocks)
    edges = np.unique([0, *cuts, d_sae]).tolist()
    return [Block(first, end, folder / f"codes-{first}") for first, end in pairwise(edges)]


def _check_space(needed: float, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise HarvestError(
            f"The harvest needs about {needed / 1e9:.1f} GB of scratch space and {free / 1e9:.1f} GB are free; free "
            "some space or harvest a smaller capture."
        )


@cache
def compiled() -> Any:
    """The compiled loops over codes, or None where numba is not installed."""
    if kernels() is None:
        return None
    from concepts.numerics import column_kernels

    return column_kernels


def _write(fires: Fires, context: np.ndarray, position: np.ndarray, blocks: list[Block], files: list[BinaryIO]) -> None:
    """The codes of a chunk to the files of their blocks."""
    row, feature, value = fires
    codes = np.empty(len(row), dtype=CODE)
    if compiled() is None:
        codes["feature"], codes["value"] = feature, value
        codes["context"], codes["position"] = context[row], position[row]
        _scatter(codes, blocks, files)
        return
    block_of = np.repeat(np.arange(len(blocks), dtype=np.int32), [block.end - block.first for block in blocks])
    ends = np.empty(len(blocks), np.int64)
    found = row, feature, value, context, position
    compiled().by_block(*found, block_of, ends, codes.view(np.int32).reshape(-1, 4))
    _append(codes, ends, files)


def _scatter(codes: np.ndarray, blocks: list[Block], files: list[BinaryIO]) -> None:
    block = np.searchsorted([b.first for b in blocks], codes["feature"], side="right").astype(np.uint16) - 1
    codes = codes[np.argsort(block, kind="stable")]
    _append(codes, np.cumsum(np.bincount(block, minlength=len(blocks))), files)


def _append(codes: np.ndarray, ends: np.ndarray, files: list[BinaryIO]) -> None:
    """To each file its codes, which end at ends[file]."""
    for file, start, end in zip(files, np.concatenate([[0], ends]), ends, strict=False):
        file.write(codes[start:end].view(np.uint8).data)  # unlike tofile, write says why it failed


def parts(blocks: list[Block], folder: Path) -> Iterator[Block]:
    """The blocks in order, those that grew to more than twice BLOCK_CODES in parts of about that many, each a file.

    A feature is never divided: the codes of one are the least that is held at once.
    """
    for block in blocks:
        n = block.file.stat().st_size // CODE.itemsize
        if n <= 2 * BLOCK_CODES or block.end - block.first == 1:
            yield block
            continue
        codes = np.memmap(block.file, CODE, "r")
        pieces = [slice(start, start + BLOCK_CODES) for start in range(0, n, BLOCK_CODES)]
        width = block.end - block.first
        load = np.cumsum(sum(np.bincount(codes["feature"][at] - block.first, minlength=width) for at in pieces))
        cuts = block.first + np.searchsorted(load, load[-1] * np.arange(1, len(pieces)) / len(pieces), side="right")
        edges = np.unique([block.first, *np.clip(cuts, block.first, block.end), block.end]).tolist()
        parts = [Block(first, end, folder / f"codes-{first}-part") for first, end in pairwise(edges)]
        with ExitStack() as stack:
            files: list[BinaryIO] = [stack.enter_context(part.file.open("wb")) for part in parts]
            for at in pieces:
                _scatter(np.array(codes[at]), parts, files)
        for part in parts:
            yield part
            part.file.unlink()
