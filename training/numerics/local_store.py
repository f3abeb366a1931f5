"""Runs of mi_crow's LocalStore, read as captures and written from them.

    <base>/runs/<run>/meta.json                                        {"model": class name, "layer_signatures": [...], ...}
    <base>/runs/<run>/batch_<i>/metadata.json                          shapes, and _tensor_metadata_names, which it needs
    <base>/runs/<run>/batch_<i>/<signature>/activations.safetensors    "tensor" (texts, tokens, d), padding included
    <base>/runs/<run>/batch_<i>/attention_masks/attention_mask.safetensors   "tensor" (texts, tokens) bool, if it was asked for

A signature is the model's class in small letters and a module's path joined by underscores; a store holds outputs only.
Layout: mi_crow 1.0.0.post10, store/local_store.py. A store does not keep token ids: they are found again by tokenising the
corpus as mi_crow did (a text a row, cut at max_length), and taken only if every mask and length then agrees.
"""

import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from training.numerics.documents import Document
from training.numerics.shard_writer import ShardWriter, leaving_nothing
from training.numerics.shards import DTYPES, HELD_OUT_FRACTION, MANIFEST, Capture, CaptureError
from training.numerics.tokens import TokenPolicy, special_ids

SHARD_ROWS = 65_536
MASK = ("attention_masks", "attention_mask")


@dataclass(frozen=True)
class Run:
    """A run on disk: its folder, its metadata, and its batches in order."""

    path: Path
    meta: dict[str, Any]
    batches: list[Path]

    def shape(self, batch: Path, layer: str, key: str = "activations") -> tuple[int, ...]:
        return tuple(self._open(batch, layer, key, lambda file: file.get_slice("tensor").get_shape()))

    def tensor(self, batch: Path, layer: str, key: str = "activations") -> Tensor:
        found: Tensor = self._open(batch, layer, key, lambda file: file.get_tensor("tensor"))
        return found

    def mask(self, batch: Path) -> np.ndarray | None:
        """(texts, tokens), True for tokens that are neither padding nor special; None where none was saved."""
        if not (batch / MASK[0] / f"{MASK[1]}.safetensors").exists():
            return None
        return self.tensor(batch, *MASK).bool().numpy()

    def _open(self, batch: Path, layer: str, key: str, read: Callable[[Any], Any]) -> Any:
        file = batch / layer / f"{key}.safetensors"
        name = f"{batch.name}/{layer}/{file.name} of the run {self.path.name}"
        if not file.exists():
            raise CaptureError(f"There is no {name}; the run was not saved whole, or with other layers.")
        try:
            with safe_open(file, framework="pt") as handle:
                return read(handle)
        except (SafetensorError, OSError) as error:
            raise CaptureError(f"{name} is damaged or cut ({error}).") from error


def find_run(path: str | Path) -> Run:
    """The run at a path: its own folder, or a store that holds just one. Raises CaptureError."""
    path = Path(path)
    candidates = [path, *sorted((path / "runs").glob("*"))] if path.is_dir() else []
    runs = [folder for folder in candidates if any(folder.glob("batch_*/metadata.json"))]
    if len(runs) != 1:
        said = f"holds {len(runs)} runs; name the folder of one" if runs else "holds no batch_0 of a mi_crow run"
        raise CaptureError(f"{path.name} {said}.")
    numbers = {int(b.name[6:]): b for b in runs[0].glob("batch_*") if b.is_dir() and b.name[6:].isdecimal()}
    lost = next((number for number in range(max(numbers) + 1) if number not in numbers), None)
    if lost is not None:
        raise CaptureError(f"batch_{lost} of the run {runs[0].name} is missing, and later ones are there.")
    file = runs[0] / "meta.json"
    try:
        meta = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CaptureError(f"meta.json of the run {runs[0].name} is damaged ({error}).") from error
    return Run(runs[0], meta, [numbers[number] for number in sorted(numbers)])


def signature(architecture: str, point: dict[str, Any]) -> str:
    """mi_crow's name of a hook point's module; "_input" marks an input, which mi_crow itself never saves."""
    name = f"{architecture.lower()}_{point['module'].replace('.', '_')}"
    return name if point["side"] == "out" else f"{name}_input"


# ---------------------------------------------------------------------------------------------------- reading


def read_run(
    path: str | Path,
    out_dir: Path,
    points: list[dict[str, Any]],
    *,
    model: dict[str, Any],
    texts: Iterable[Document],
    tokenizer: Callable[[], Any],
    dtype: str = "float32",
    dataset: dict[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write a run as a capture folder and return its manifest. Padding and what the mask leaves out is not taken over.

    points: {name, module, side, d, layer} of the layers wanted. model: {name, architecture, revision}. texts: what the
    run was made from; where they give other tokens, the capture says that its tokens are not known.
    Read again, it continues after the last whole shard.
    Raises CaptureError, naming the file: another model, a missing layer or batch, a wrong width or dtype, NaN, a cut file.
    """
    run = find_run(path)
    if (out_dir / MANIFEST).exists():
        done: dict[str, Any] = json.loads((out_dir / MANIFEST).read_text(encoding="utf-8"))
        return done
    layers = {point["name"]: signature(model["architecture"], point) for point in points}
    shapes = [_shape(run, batch, points, layers, model["architecture"]) for batch in run.batches]
    tokens, special = _tokens(run, shapes, texts, tokenizer())
    length = max(2, max(t for _, t in shapes))
    facts = {
        "model": {key: model[key] for key in ("name", "revision")},
        "hook_points": points,
        "policy": TokenPolicy(length, prepend_bos=False, packed=False).facts(),
        "special_ids": sorted(special),
        "dtype": dtype,
        "dataset": dataset or {},
        "source": {"format": "mi_crow", "run": run.path.name, "masked": run.mask(run.batches[0]) is not None},
    }
    writer = ShardWriter(out_dir, facts, {p["name"]: p["d"] for p in points}, dtype, SHARD_ROWS)
    with leaving_nothing(writer):
        first = 0
        begun = sum(shard["n_contexts"] for shard in writer.state["shards"])
        for number, (batch, (b, t)) in enumerate(zip(run.batches, shapes, strict=True)):
            if first >= begun:
                known = tokens[first : first + b] if tokens is not None else None
                _take_over(run, batch, writer, layers, known, special, (b, t), length, first)
            first += b
            if progress is not None:
                progress(number + 1, len(run.batches))
        manifest = writer.finish(
            run_id=out_dir.name,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            held_out_fraction=HELD_OUT_FRACTION,
            tokens_known=tokens is not None,
        )
    assert manifest is not None  # it is made in one part
    return manifest


def _shape(
    run: Run, batch: Path, points: list[dict[str, Any]], layers: dict[str, str], architecture: str
) -> tuple[int, int]:
    """(texts, tokens) of a batch, after everything about it that its headers tell is checked."""
    made_by = run.meta.get("model") or architecture
    if made_by != architecture:
        raise CaptureError(
            f"The run {run.path.name} was made by a {made_by}, and the chosen model is a {architecture}."
        )
    found: set[tuple[int, int]] = set()
    for point in points:
        layer = layers[point["name"]]
        if not (batch / layer).is_dir():
            there = ", ".join(sorted(path.name for path in batch.iterdir() if path.is_dir() and path.name != MASK[0]))
            raise CaptureError(
                f"{batch.name} of the run {run.path.name} has no layer {layer} ({point['name']}); it has {there}."
            )
        shape = run.shape(batch, layer)
        if len(shape) != 3 or shape[2] != point["d"]:
            raise CaptureError(
                f"{batch.name} of the run {run.path.name} holds {layer} as {shape}, where {point['name']} is (texts, "
                f"tokens, {point['d']})."
            )
        found.add((shape[0], shape[1]))
    mask = run.mask(batch)
    if mask is not None:
        found.add(mask.shape)
    if len(found) != 1:
        raise CaptureError(f"The layers or the mask of {batch.name} of the run {run.path.name} differ in their shapes.")
    return found.pop()


def _tokens(
    run: Run, shapes: list[tuple[int, int]], texts: Iterable[Document], tokenizer: Any
) -> tuple[list[np.ndarray] | None, frozenset[int]]:
    """Token ids of every text, if they agree with all that the run tells of them; and which ids are special."""
    special = special_ids(tokenizer)
    longest = (run.meta.get("options") or {}).get("max_length")
    cut: dict[str, Any] = {"truncation": True, "max_length": longest} if longest else {}
    stream = iter(texts)
    found: list[np.ndarray] = []
    for batch, (b, t) in zip(run.batches, shapes, strict=True):
        some = list(itertools.islice(stream, b))
        if not all(isinstance(one, str) for one in some):  # mi_crow reads texts only
            return None, frozenset()
        encoded = tokenizer(some, verbose=False, **cut)["input_ids"] if some else []
        ids = [np.asarray(one, dtype=np.int32) for one in encoded]
        if len(ids) != b or max(map(len, ids)) != t:
            return None, frozenset()
        mask = run.mask(batch)
        if mask is not None and any(
            not np.array_equal(row, np.pad(~np.isin(one, list(special)), (0, t - len(one))))
            for row, one in zip(mask, ids, strict=True)
        ):
            return None, frozenset()
        found += ids
    return found, special


def _take_over(
    run: Run,
    batch: Path,
    writer: ShardWriter,
    layers: dict[str, str],
    tokens: list[np.ndarray] | None,
    special: frozenset[int],
    shape: tuple[int, int],
    length: int,
    first: int,
) -> None:
    b, t = shape
    mask = run.mask(batch)
    ids = np.zeros((b, length), dtype=np.int32)
    stored = np.ones((b, t), dtype=bool) if mask is None else mask
    lengths = np.where(stored.any(1), t - np.argmax(stored[:, ::-1], axis=1), 0)
    if tokens is not None:
        lengths = np.array([len(one) for one in tokens])
        for row, one in enumerate(tokens):
            ids[row, : len(one)] = one
        if mask is None:
            stored = (np.arange(t) < lengths[:, None]) & ~np.isin(ids[:, :t], list(special))
    x = {}
    for name, layer in layers.items():
        values = run.tensor(batch, layer)
        if values.dtype not in DTYPES.values():
            raise CaptureError(
                f"{batch.name} of the run {run.path.name} holds {layer} as {values.dtype}; only floats can be read."
            )
        x[name] = values[torch.from_numpy(stored)]
        if not x[name].isfinite().all():
            raise CaptureError(f"{batch.name} of the run {run.path.name} holds NaN or infinite values in {layer}.")
    wide = np.zeros((b, length), dtype=bool)
    wide[:, :t] = stored
    documents = np.arange(first, first + b)
    writer.add(ids, wide, x, documents, first + b - 1, lengths=lengths)


# ---------------------------------------------------------------------------------------------------- writing


def write_run(
    capture: Capture, base: Path, architecture: str, *, progress: Callable[[int, int], None] | None = None
) -> str:
    """Write a capture as a run below `base`, a batch for each shard; returns the run's id.

    Only stored rows are written, as (1, rows, d): mi_crow's trainer reads every row of a store, whatever its mask says,
    so padding and special tokens must not be in it.
    """
    run_id = f"capture-{capture.path.name}"
    points = {point["name"]: point for point in capture.manifest["hook_points"]}
    names = {hook: signature(architecture, points[hook]) for hook in capture.hook_names}
    run = base / "runs" / run_id
    done, total = 0, len(capture.shards) * len(names)
    for number in range(len(capture.shards)):
        batch = run / f"batch_{number}"
        shapes = {}
        for hook, layer in names.items():
            (batch / layer).mkdir(parents=True)
            x = capture.shard_rows(number, hook)[None]
            save_file({"tensor": x.contiguous()}, batch / layer / "activations.safetensors")
            shapes[layer] = {"activations_shape": list(x.shape)}
            done += 1
            if progress is not None:
                progress(done, total)
        _write(
            batch / "metadata.json", shapes | {"_tensor_metadata_names": {layer: ["activations"] for layer in shapes}}
        )
    meta = {
        "run_name": run_id,
        "model": architecture,
        "options": {"dtype": capture.manifest["dtype"], "max_length": capture.context_length, "batch_size": 1},
        "layer_signatures": list(names.values()),
        "num_layers": len(names),
        "capture": {key: value for key, value in capture.manifest.items() if key != "shards"},
    }
    _write(run / "meta.json", meta)
    return run_id


def _write(file: Path, data: dict[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2, ensure_ascii=False), encoding="utf-8")
