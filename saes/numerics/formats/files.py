"""Reading files that came from somewhere else: JSON and safetensors, with limits, and never by unpickling.

Nothing here trusts a file: sizes are checked before memory is asked for, and whatever is wrong becomes one sentence.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

MAX_JSON_BYTES = 4_000_000
MAX_JSON_DEPTH = 32
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


# Files by which people publish SAEs, so that a folder can be named for what it is, and two formats in one be noticed.
WEIGHT_FILES = {
    "sae_weights.safetensors": "SAELens",
    "sae_weights.safetensors.index.json": "SAELens",
    "params.npz": "Gemma Scope",
    "params.safetensors": "Gemma Scope 2",
    "sae.safetensors": "sparsify",
    "ae.pt": "dictionary_learning",
    "checkpoint.safetensors": "miStudio",
    "latest_ckpt.safetensors": "temporal",
}


class FormatError(ValueError):
    """Files that do not hold what they should. The message is one sentence for a person."""


class UnknownFormat(FormatError):
    """No known SAE format; the message names what was found."""


class TwoFormats(UnknownFormat):
    """A folder with the weights of two formats: which of them is meant is not for us to choose."""


class MissingFact(FormatError):
    """The files cannot tell something that loading needs; `names` are the facts to give."""

    def __init__(self, sentence: str, *names: str) -> None:
        super().__init__(sentence)
        self.names = names


class NotRepresentable(FormatError):
    """This SAE cannot be written in that format without losing something; the message names what."""


class Place(NamedTuple):
    """Where an SAE is: a folder, and in it a file, a file's stem or a layer's number where the folder holds several."""

    folder: Path
    entry: str  # "" means the folder itself
    names: tuple[str, ...]  # of the folder's files, sorted, without hidden ones

    @property
    def said(self) -> str:
        """What to call it in a sentence."""
        return self.entry or self.folder.name

    def has(self, *names: str) -> bool:
        return all(name in self.names for name in names)


def find_place(path: Path) -> Place:
    """The place a path means. Raises UnknownFormat when neither it nor its folder exists."""
    path = path.absolute()  # so that "." has a name
    folder, entry = (path, "") if path.is_dir() else (path.parent, path.name)
    if not folder.is_dir():
        raise UnknownFormat(f"There is no folder {path}.")
    names = (child.name for child in folder.iterdir() if not child.name.startswith(".") and child.is_file())
    return Place(folder, entry, tuple(sorted(names)))


class TensorInfo(NamedTuple):
    """What a safetensors header says about a tensor; `dtype` in its notation ("F32", "BF16", ...)."""

    dtype: str
    shape: tuple[int, ...]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises FormatError: too large, too deep, not UTF-8, not JSON, not an object."""
    if not path.is_file():
        raise FormatError(f"{path.name} is missing.")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise FormatError(f"{path.name} is larger than {MAX_JSON_BYTES:,} bytes, which no SAE's config is.")
    return parse_json(path.read_bytes(), path.name)


def parse_json(data: bytes, name: str) -> dict[str, Any]:
    """As `read_json`, for bytes that were read already."""
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise FormatError(f"{name} is not UTF-8 text.") from error
    except RecursionError as error:
        raise FormatError(f"{name} is nested too deeply.") from error
    except ValueError as error:
        raise FormatError(f"{name} is not valid JSON ({error}).") from error
    if not isinstance(value, dict):
        raise FormatError(f"{name} must hold a JSON object, but holds a {type(value).__name__}.")
    if _depth(value) > MAX_JSON_DEPTH:
        raise FormatError(f"{name} is nested too deeply.")
    return value


def tensor_headers(path: Path) -> dict[str, TensorInfo]:
    """Name, dtype and shape of every tensor of a safetensors file, without reading any of them.

    Raises FormatError for a file that is missing, cut, not safetensors, a git-lfs pointer or a web page.
    """
    header = _header(path)
    header.pop("__metadata__", None)
    return {name: _tensor_info(path.name, name, entry) for name, entry in header.items()}


def header_notes(path: Path) -> dict[str, Any]:
    """What the writer of a safetensors file noted in its header beside the tensors. Raises as `tensor_headers`."""
    notes = _header(path).get("__metadata__")
    return notes if isinstance(notes, dict) else {}


def _header(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FormatError(f"{path.name} is missing.")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
        length = int.from_bytes(start[:8], "little")
        refuse_impostors(path.name, start)
        if size < 8 or length > size - 8:
            raise FormatError(f"{path.name} is damaged or incomplete: its header does not fit into the file.")
        if length > MAX_JSON_BYTES:
            raise FormatError(f"{path.name} has a header of {length:,} bytes, which no SAE's weights have.")
        file.seek(8)
        return parse_json(file.read(length), f"The header of {path.name}")


def read_tensors(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Named tensors of a safetensors file, memory-mapped on the CPU. Raises FormatError when the file is damaged."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path.name} is damaged or incomplete ({error}).") from error


def weight_files(folder: Path, name: str) -> dict[str, dict[str, TensorInfo]]:
    """The files that hold a folder's weights, with their headers: `name` itself, or the shards of `name`.index.json.

    Raises FormatError when a shard is missing, lies outside of the folder, or does not hold what the index says.
    """
    if not (folder / f"{name}.index.json").is_file():
        return {name: tensor_headers(folder / name)}
    places = read_json(folder / f"{name}.index.json").get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise FormatError(f"{name}.index.json has no weight_map of tensor names to file names.")
    files: dict[str, dict[str, TensorInfo]] = {}
    for place in sorted(set(places.values())):
        if place != Path(place).name or place in ("", ".", "..") or "\\" in place:
            raise FormatError(f"{name}.index.json names {place!r}, which is not a file of this folder.")
        files[place] = tensor_headers(folder / place)
    for tensor, place in places.items():
        if tensor not in files[place]:
            raise FormatError(f"{name}.index.json says that {tensor} is in {place}, but it is not.")
    return files


def refuse_impostors(name: str, start: bytes) -> None:
    """Raises FormatError for what comes in place of weights: `start` is a file's first bytes."""
    if start.startswith(b"version https://git-lfs"):
        raise FormatError(f"{name} is a git-lfs pointer, not the weights themselves; fetch them with git lfs pull.")
    if start.lstrip()[:1] == b"<":
        raise FormatError(f"{name} is a web page, not weights; the download went wrong.")


def _tensor_info(file: str, name: str, entry: Any) -> TensorInfo:
    dtype, shape = (entry.get("dtype"), entry.get("shape")) if isinstance(entry, dict) else (None, None)
    if not isinstance(dtype, str) or not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise FormatError(f"{file} is damaged: its header says nothing sensible about the tensor {name}.")
    return TensorInfo(dtype, tuple(shape))


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a JSON number")


def _depth(value: Any) -> int:
    """Levels of nesting, counted level by level so that no depth can exhaust the stack."""
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
    return depth
