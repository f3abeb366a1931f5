"""Top texts and statistics of every feature of an SAE over a capture, in one pass over its activations.

The work is an external group-by. The capture is encoded once, in order, and every code above 0 is written to a scratch
file of its block of features. Then each block is read back, grouped by feature with one radix sort, and all of it is
computed exactly: no feature keeps a running heap, and there is no Python loop over tokens or features. Memory holds one
chunk of activations or one block of codes (about BLOCK_CODES of them; a block that grew larger is split first) whatever
the length of the capture; the scratch takes 16 bytes a code and 4 a token, and is removed at the end.

What was encoded is noted every CHECKPOINT_SECONDS. A harvest of the same SAE and capture into the same folder that was
killed goes on from there; one that was cancelled, or failed, leaves nothing.

Definitions, for feature i over the n stored tokens of the chosen split:
  fires              tokens with code z_i > 0;  density = fires / n
  top contexts       the k contexts with the largest peak (largest z_i in the context); equal peaks: the earlier context
  histogram          fires in 50 equal bins from 0 to the feature's maximum
  interval j of m    contexts with their peak in (j/m, (j+1)/m] of the maximum, bin edges as the histogram's; a seeded
                     random sample of them, independent of the top contexts, so one context may appear in both
  top tokens         token ids by the sum of z_i over all n tokens, with the number of fires on each
"""

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from concepts.featurefile import FACTS, HISTOGRAM_BINS, VERSION
from concepts.numerics.sparse_encode import SparseEncoder
from concepts.numerics.token_text import vocabulary_texts
from saes.numerics.sae import SAE
from training.numerics.shards import Capture, Split, write_json
from training.numerics.tokens import special_ids

TOP_TOKENS = 10
BLOCK_CODES = 2**21  # codes grouped at once; about 100 bytes of memory each
MAX_BLOCKS = 256  # scratch files open at once
CHECKPOINT_SECONDS = 20.0
SCRATCH = "scratch.json"  # how far the encoding came
SAMPLED = 2**16  # weights that tell one SAE from another
COLLECT_SHARE = 1 / 8  # of the progress bar, for the work after encoding
CODE = np.dtype([("feature", np.int32), ("context", np.int32), ("position", np.int32), ("value", np.float32)])
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Progress = Callable[[int, int | None, str], None]

DEFINITIONS = {
    "density": "tokens with activation > 0 / tokens tested",
    "mean": "mean activation over the tokens on which the feature fires",
    "top": "contexts with the largest activation, one example a context",
    "interval": "random sample of the contexts whose largest activation lies in the interval",
    "top_tokens": "tokens by summed activation over all tokens tested",
}


class HarvestError(ValueError):
    """The features cannot be harvested; the message is one sentence."""


def harvest(
    sae: SAE,
    capture: Capture,
    hook: str,
    out_dir: str | Path,
    *,
    k: int = 20,
    intervals: int = 5,
    per_interval: int = 5,
    split: Split = "all",
    tokenizer: Any = None,
    seed: int = 0,
    limit: int | None = None,
    progress: Progress = lambda done, total, step: None,
) -> dict[str, Any]:
    """Write a view of every feature to `out_dir` (concepts.featurefile reads it) and return its summary.

    k: top contexts of each feature. intervals, per_interval: activation intervals and sampled contexts in each.
    tokenizer: gives the token texts; without it tokens are shown by number. limit: stop after that many tokens, at the end
    of a chunk; the view is then `partial`. A view already at `out_dir` is replaced
    when the new one is complete; whatever `progress` or the disk raises leaves it as it was.
    Raises HarvestError when SAE and capture do not fit, a number is out of range, or the scratch does not fit the disk.
    """
    _check(sae, capture, hook, split, k, intervals, per_interval)
    began = time.perf_counter()
    whole = capture.split_rows(split)
    n_rows = min(whole, limit or whole)
    total = n_rows + max(1, int(n_rows * COLLECT_SHARE))
    settings = {"k": k, "intervals": intervals, "per_interval": per_interval, "seed": seed}
    source = {"sae": fingerprint(sae), "capture": capture.manifest["run_id"], "hook": hook, "split": split}
    with _folder(Path(out_dir), source | settings | {"rows": n_rows}) as folder:
        encoding = _Encoding(sae, capture, hook, split, folder, n_rows)
        blocks = encoding.run(lambda done: progress(done, total, "encoding tokens"))
        n_rows = encoding.done
        tokens = _tokens(capture, folder)
        encode_seconds = time.perf_counter() - began
        with ExitStack() as files:
            columns = _Columns(folder, files)
            rng = np.random.default_rng(seed)
            for block in _parts(blocks, folder):
                _collect(block, tokens, columns, k, intervals, per_interval, rng)
                share = block.end / sae.config.d_sae
                progress(n_rows + int((total - n_rows) * share), total, "collecting examples")
            columns.finish()
        _write_contexts(folder, tokens, capture.documents())
        _write_vocabulary(folder, vocabulary_texts(tokenizer) if tokenizer is not None else [])
        seconds = time.perf_counter() - began
        for file in folder.glob("codes-*"):
            file.unlink()
        (folder / "tokens.npy").unlink()
        (folder / SCRATCH).unlink()
        speed = {"seconds": seconds, "encode_seconds": encode_seconds, "tokens_per_second": n_rows / seconds}
        summary = _summary(folder, n_rows) | speed | {"partial": n_rows < whole, "n_tokens_whole": whole}
        write_json(
            folder / FACTS, _facts(sae, capture, hook, split, tokenizer) | settings | summary | {"source": source}
        )
    return summary


def _check(sae: SAE, capture: Capture, hook: str, split: Split, k: int, intervals: int, per_interval: int) -> None:
    if hook not in capture.d:
        raise HarvestError(f"The capture has no hook point {hook}; it has {', '.join(capture.hook_names)}.")
    if sae.config.d_in != capture.d[hook]:
        raise HarvestError(
            f"The SAE reads vectors of {sae.config.d_in} numbers, but the capture holds {capture.d[hook]} at {hook}; "
            "choose the capture of the model and hook point the SAE was trained on."
        )
    if k < 1 or per_interval < 0:
        raise HarvestError("At least 1 top context and at least 0 samples an interval are needed.")
    if intervals < 1 or HISTOGRAM_BINS % intervals:
        raise HarvestError(f"The number of intervals is {intervals}; it must divide {HISTOGRAM_BINS}: 1, 2, 5, 10, ...")
    if not capture.split_rows(split):
        raise HarvestError(f"The capture has no {split.replace('_', '-')} tokens; capture more text.")


def fingerprint(sae: SAE) -> str:
    """The same for the same architecture and weights: config and evenly spaced numbers of every parameter, hashed."""
    found = hashlib.blake2b(repr((type(sae).__name__, sae.config)).encode(), digest_size=16)
    for name, tensor in sorted(sae.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        found.update(f"{name} {tuple(tensor.shape)}".encode())
        found.update(flat[:: max(1, len(flat) // SAMPLED)].float().cpu().numpy().tobytes())
    return found.hexdigest()


@contextmanager
def _folder(out_dir: Path, source: dict[str, Any]) -> Iterator[Path]:
    """A temporary folder beside `out_dir` that takes its place at the end, or vanishes when anything is raised.

    One that a killed harvest of the same source left behind is taken up again.
    """
    folder = out_dir.with_name(out_dir.name + ".tmp")
    old = out_dir.with_name(out_dir.name + ".old")
    if _noted(folder).get("source") != source:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_json(folder / SCRATCH, {"source": source})
    try:
        yield folder
        if out_dir.exists():
            shutil.rmtree(old, ignore_errors=True)
            out_dir.rename(old)  # readers keep their memory maps of the old files
        folder.rename(out_dir)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise HarvestError("The disk is full; free some space and harvest again.") from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------- pass over tokens


@dataclass(frozen=True)
class _Block:
    """Features `first` to `end` (exclusive) and the file of their codes, in the order of the tokens."""

    first: int
    end: int
    file: Path

    def codes(self) -> np.ndarray:
        return np.fromfile(self.file, dtype=CODE)


class _Encoding:
    """The pass over the rows: encodes each once and sorts its codes into the files of their blocks."""

    def __init__(self, sae: SAE, capture: Capture, hook: str, split: Split, folder: Path, n_rows: int) -> None:
        self.sae, self.capture, self.hook, self.split, self.folder, self.n_rows = (
            sae,
            capture,
            hook,
            split,
            folder,
            n_rows,
        )
        self.encode = SparseEncoder(sae)
        self.blocks: list[_Block] = []
        self.files: list[BinaryIO] = []
        self.done = 0

    @torch.inference_mode()
    def run(self, report: Callable[[int], None]) -> list[_Block]:
        """Encode from where the folder's note says that it stopped."""
        self._resume()
        noted = time.monotonic()
        try:
            for x, context, position in self.capture.rows(
                self.hook, self.split, chunk=self.encode.rows, start=self.done
            ):
                if self.done >= self.n_rows:
                    break
                codes = _codes(self.encode, x.to(self.sae.W_dec.device), context, position)
                if not self.blocks:
                    self.blocks = _plan(codes, len(x), self.n_rows, self.sae.config.d_sae, self.folder)
                    self.files = [block.file.open("wb") for block in self.blocks]
                _scatter(codes, self.blocks, self.files)
                self.done += len(x)
                if time.monotonic() - noted >= CHECKPOINT_SECONDS:
                    self._note()
                    noted = time.monotonic()
                report(self.done)
            self._note()
        finally:
            for file in self.files:
                file.close()
        return self.blocks

    def _note(self) -> None:
        """Write down how far it came; what is written to the files after this is cut off when it is taken up again."""
        sizes = []
        for file in self.files:
            file.flush()
            os.fsync(file.fileno())
            sizes.append(file.tell())
        edges = [[block.first, block.end] for block in self.blocks]
        write_json(self.folder / SCRATCH, _noted(self.folder) | {"done": self.done, "edges": edges, "sizes": sizes})

    def _resume(self) -> None:
        note = _noted(self.folder)
        if not note.get("done"):
            return
        self.blocks = [_Block(first, end, self.folder / f"codes-{first}") for first, end in note["edges"]]
        if any(
            not b.file.exists() or b.file.stat().st_size < n for b, n in zip(self.blocks, note["sizes"], strict=True)
        ):
            self.blocks = []
            return
        self.files = [block.file.open("r+b") for block in self.blocks]
        for file, size in zip(self.files, note["sizes"], strict=True):
            file.truncate(size)
            file.seek(size)
        self.done = note["done"]


def _noted(folder: Path) -> dict[str, Any]:
    """What is known of a harvest that was begun in this folder; empty for none, or one that cannot be read."""
    try:
        found: dict[str, Any] = json.loads((folder / SCRATCH).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def _tokens(capture: Capture, folder: Path) -> np.ndarray:
    """Tokens (contexts, positions) of the capture in one memory-mapped file, so that they need not be held in memory."""
    file = folder / "tokens.npy"
    mapped = np.lib.format.open_memmap(file, "w+", np.int32, (capture.n_contexts, capture.context_length))
    for i, shard in enumerate(capture.shards):
        first = int(shard["first_context"])
        mapped[first : first + shard["n_contexts"]] = capture.shard_contexts(i)
    mapped.flush()
    return np.load(file, mmap_mode="r")


def _codes(encode: SparseEncoder, x: torch.Tensor, context: np.ndarray, position: np.ndarray) -> np.ndarray:
    """All codes above 0 of rows x (m, d), in row order, as CODE records."""
    row, feature, value = encode(x)
    if not np.isfinite(value.sum()):
        raise HarvestError(
            "The SAE gives codes that are NaN or infinite; its weights are damaged or do not fit the model."
        )
    codes = np.empty(len(row), dtype=CODE)
    codes["feature"], codes["value"] = feature, value
    codes["context"], codes["position"] = context[row], position[row]
    return codes


def _plan(codes: np.ndarray, rows: int, n_rows: int, d_sae: int, folder: Path) -> list[_Block]:
    """Blocks of features of about BLOCK_CODES codes, judged by the first chunk; refuses when the disk is too small."""
    expected = len(codes) / rows * n_rows
    _check_space(expected * CODE.itemsize, folder)
    # the even part of the load keeps a block below 2^16 features, where numpy's stable sort is a radix sort
    n_blocks = min(max(int(expected / BLOCK_CODES) + 1, -(-d_sae // 2**15)), MAX_BLOCKS, d_sae)
    load = np.cumsum(np.bincount(codes["feature"], minlength=d_sae) + max(1.0, len(codes) / d_sae))
    cuts = np.searchsorted(load, load[-1] * np.arange(1, n_blocks) / n_blocks)
    edges = np.unique([0, *cuts, d_sae]).tolist()
    return [_Block(first, end, folder / f"codes-{first}") for first, end in pairwise(edges)]


def _check_space(needed: float, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise HarvestError(
            f"The harvest needs about {needed / 1e9:.1f} GB of scratch space and {free / 1e9:.1f} GB are free; free "
            "some space or harvest a smaller capture."
        )


def _scatter(codes: np.ndarray, blocks: list[_Block], files: list[BinaryIO]) -> None:
    block = np.searchsorted([b.first for b in blocks], codes["feature"], side="right").astype(np.uint16) - 1
    codes = codes[np.argsort(block, kind="stable")]
    ends = np.cumsum(np.bincount(block, minlength=len(blocks)))
    for file, start, end in zip(files, np.concatenate([[0], ends]), ends, strict=False):
        file.write(codes[start:end].view(np.uint8).data)  # unlike tofile, write says why it failed


def _parts(blocks: list[_Block], folder: Path) -> Iterator[_Block]:
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
        parts = [_Block(first, end, folder / f"codes-{first}-part") for first, end in pairwise(edges)]
        with ExitStack() as stack:
            files: list[BinaryIO] = [stack.enter_context(part.file.open("wb")) for part in parts]
            for at in pieces:
                _scatter(np.array(codes[at]), parts, files)
        for part in parts:
            yield part
            part.file.unlink()


# ---------------------------------------------------------------------------------------------------- block by block


class _Columns:
    """Columns of the view, written one block of features after another."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.stack = stack  # closes the files, whatever happens
        self.files: dict[str, BinaryIO] = {}
        self.shapes: dict[str, tuple[np.dtype, int, tuple[int, ...]]] = {}

    def append(self, name: str, rows: np.ndarray) -> None:
        if name not in self.files:
            self.files[name] = self.stack.enter_context((self.folder / f"{name}.npy").open("wb"))
            self._header(name, rows.dtype, 0, rows.shape[1:])
        dtype, count, tail = self.shapes[name]
        self.files[name].write(np.ascontiguousarray(rows, dtype=dtype).view(np.uint8).data)
        self.shapes[name] = dtype, count + len(rows), tail

    def finish(self) -> None:
        """Write the headers again with the true lengths; numpy pads them so that a longer number still fits."""
        for name, file in self.files.items():
            file.seek(0)
            self._header(name, *self.shapes[name])

    def _header(self, name: str, dtype: np.dtype, count: int, tail: tuple[int, ...]) -> None:
        self.shapes[name] = dtype, count, tail
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count, *tail)}
        np.lib.format.write_array_header_1_0(self.files[name], header)


@dataclass(frozen=True)
class _Fires:
    """The codes of a block ordered by (feature, context, position), features counted from the block's first, and their
    groups: group g is the fires of one feature in one context, codes start[g] to start[g + 1]."""

    n_features: int
    codes: np.ndarray
    start: np.ndarray  # (G + 1,)
    feature: np.ndarray  # (G,)
    context: np.ndarray  # (G,)
    peak: np.ndarray  # (G,) largest activation
    position: np.ndarray  # (G,) where it is, the first of equals


def _group(block: _Block) -> _Fires:
    codes = block.codes()
    codes["feature"] -= block.first
    # the codes lie in the order of contexts and positions, and the sort is stable
    codes = codes[np.argsort(codes["feature"].astype(np.min_scalar_type(block.end - block.first)), kind="stable")]
    feature, context, value = codes["feature"], codes["context"], codes["value"]
    new = np.flatnonzero((np.diff(feature) != 0) | (np.diff(context) != 0)) + 1
    start = np.concatenate([[0], new, [len(codes)]]) if len(codes) else np.zeros(1, np.int64)
    first = start[:-1]
    peak = np.maximum.reduceat(value, first) if len(codes) else value
    is_peak = np.flatnonzero(value == np.repeat(peak, np.diff(start)))
    position = codes["position"][is_peak[np.searchsorted(is_peak, first)]]
    return _Fires(block.end - block.first, codes, start, feature[first], context[first], peak, position)


def _collect(
    block: _Block,
    tokens: np.ndarray,
    columns: _Columns,
    k: int,
    intervals: int,
    per_interval: int,
    rng: np.random.Generator,
) -> None:
    """Append the columns of one block of features."""
    fires = _group(block)
    maximum = _write_statistics(fires, columns)
    _write_top_tokens(fires, tokens, columns)
    top = _first_per(fires.feature, fires.peak, k)
    interval = _bins(fires.peak, maximum[fires.feature]) // (HISTOGRAM_BINS // intervals)
    sampled = _first_per(fires.feature * intervals + interval, rng.random(len(fires.peak)), per_interval)
    group = np.concatenate([np.zeros(len(top), np.uint8), (interval[sampled] + 1).astype(np.uint8)])
    _write_examples(fires, np.concatenate([top, sampled]), group, columns)


def _first_per(owner: np.ndarray, value: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest values >= 0 of every owner, by owner, then falling value, then index."""
    # the bits of a positive float32 order as it does, so one integer sorts by both (six times faster than lexsort)
    bits = np.ascontiguousarray(value, dtype=np.float32).view(np.int32)
    order = np.argsort((owner.astype(np.int64) << 32) - bits, kind="stable")
    return order[_rank(owner[order]) < count]


def _rank(owner: np.ndarray) -> np.ndarray:
    """Position of every entry among those of its owner; equal owners lie together."""
    start = np.flatnonzero(np.diff(owner, prepend=-1))
    return np.arange(len(owner)) - np.repeat(start, np.diff(start, append=len(owner)))


def _bins(value: np.ndarray, maximum: np.ndarray) -> np.ndarray:
    """Histogram bin of activations, each with its feature's maximum."""
    return np.minimum((value / maximum * HISTOGRAM_BINS).astype(np.int64), HISTOGRAM_BINS - 1)


def _write_statistics(fires: _Fires, columns: _Columns) -> np.ndarray:
    """Counts, mean, histogram and maximum of every feature; returns the maximum (features,) float32."""
    n, feature, value = fires.n_features, fires.codes["feature"], fires.codes["value"]
    maximum = np.zeros(n, np.float32)
    np.maximum.at(maximum, fires.feature, fires.peak)
    n_fires = np.bincount(feature, minlength=n)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(feature, weights=value, minlength=n) / n_fires  # NaN for a feature that never fired
    at = feature.astype(np.int64) * HISTOGRAM_BINS + _bins(value, maximum[feature])
    histogram = np.bincount(at, minlength=n * HISTOGRAM_BINS).reshape(n, HISTOGRAM_BINS)
    columns.append("n_fires", n_fires)
    columns.append("n_contexts", np.bincount(fires.feature, minlength=n))
    columns.append("maximum", maximum)
    columns.append("mean", mean.astype(np.float32))
    columns.append("histogram", histogram)
    return maximum


def _write_top_tokens(fires: _Fires, tokens: np.ndarray, columns: _Columns) -> None:
    """Sum and count of every (feature, token), of which the TOP_TOKENS largest sums of a feature are kept."""
    codes = fires.codes
    width = 1 << 32  # token ids are int32
    key = codes["feature"].astype(np.int64) * width + tokens[codes["context"], codes["position"]]
    order = np.argsort(key, kind="stable")
    key = key[order]
    start = np.flatnonzero(np.diff(key, prepend=-1))
    sums = np.add.reduceat(codes["value"][order], start, dtype=np.float64) if len(key) else np.empty(0)
    counts = np.diff(start, append=len(key))
    owner, token = np.divmod(key[start], width)
    kept = _first_per(owner, sums, TOP_TOKENS)
    row = owner[kept]
    rank = _rank(row)
    for name, values, empty in (
        ("ids", token.astype(np.int32), -1),
        ("sums", sums.astype(np.float32), 0),
        ("counts", counts, 0),
    ):
        table = np.full((fires.n_features, TOP_TOKENS), empty, dtype=values.dtype)
        table[row, rank] = values[kept]
        columns.append(f"top_token_{name}", table)


def _write_examples(fires: _Fires, kept: np.ndarray, group: np.ndarray, columns: _Columns) -> None:
    """Rows for the kept groups of fires, by feature, then example group, then falling peak."""
    order = np.lexsort((-fires.peak[kept], group, fires.feature[kept]))
    kept = kept[order]
    columns.append("example_count", np.bincount(fires.feature[kept], minlength=fires.n_features))
    columns.append("example_group", group[order])
    columns.append("example_context", fires.context[kept])
    columns.append("example_peak", fires.position[kept])
    columns.append("example_value", fires.peak[kept])
    length = np.diff(fires.start)[kept]
    columns.append("activation_count", length)
    ends = np.cumsum(length)
    at = np.arange(int(length.sum())) + np.repeat(fires.start[kept] - (ends - length), length)
    columns.append("activation_position", fires.codes["position"][at])
    columns.append("activation_value", fires.codes["value"][at])


# ---------------------------------------------------------------------------------------------------- the whole view


def _write_contexts(folder: Path, tokens: np.ndarray, documents: np.ndarray) -> None:
    """Turn counts into starts and keep the token ids of the contexts that examples come from."""
    for name in ("example", "activation"):
        counts = np.load(folder / f"{name}_count.npy")
        np.save(folder / f"{name}_start.npy", np.concatenate([[0], np.cumsum(counts)]))
        (folder / f"{name}_count.npy").unlink()
    number = np.unique(np.load(folder / "example_context.npy"))
    np.save(folder / "context_number.npy", number)
    np.save(folder / "context_document.npy", documents[number])
    np.save(folder / "context_tokens.npy", tokens[number])


def _write_vocabulary(folder: Path, texts: list[str]) -> None:
    encoded = [text.encode() for text in texts]
    np.save(folder / "vocabulary_start.npy", np.cumsum([0, *map(len, encoded)], dtype=np.int64))
    np.save(folder / "vocabulary_bytes.npy", np.frombuffer(b"".join(encoded), dtype=np.uint8))


def _summary(folder: Path, n_tokens: int) -> dict[str, Any]:
    fired = np.load(folder / "n_fires.npy") > 0
    return {
        "n_features": len(fired),
        "n_tokens": n_tokens,
        "alive": int(fired.sum()),
        "dead": int((~fired).sum()),
        "n_examples": len(np.load(folder / "example_context.npy", mmap_mode="r")),
        "bytes": sum(file.stat().st_size for file in folder.iterdir()),
    }


def _facts(sae: SAE, capture: Capture, hook: str, split: Split, tokenizer: Any) -> dict[str, Any]:
    config, manifest = sae.config, capture.manifest
    return {
        "version": VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "sae": {name: getattr(config, name) for name in ("architecture", "d_in", "d_sae", "hook_name", "model_name")},
        "capture": {key: manifest.get(key) for key in ("run_id", "created", "model", "dataset", "dtype")},
        "policy": manifest["policy"],
        "hook": hook,
        "split": split,
        "special_ids": sorted(special_ids(tokenizer)) if tokenizer is not None else [],
        "definitions": DEFINITIONS,
    }
