"""cfg.json beside sae_weights.safetensors: what all generations of SAELens, and miStudio's exports, have in common."""

import re
from collections.abc import Iterable, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saes.numerics.formats.files import (
    FLOATS,
    FormatError,
    MissingFact,
    Place,
    TensorInfo,
    read_json,
    read_tensors,
    tensor_headers,
    weight_files,
)

CONFIG, WEIGHTS, SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
FILES = (CONFIG, WEIGHTS, SPARSITY)  # of one SAE; what saving again replaces

Files = dict[str, dict[str, TensorInfo]]


def has_sae(place: Place) -> bool:
    """Whether a folder holds cfg.json and the weights (or the index of their shards). Either file means its folder."""
    weights = place.has(WEIGHTS) or place.has(f"{WEIGHTS}.index.json")
    return place.entry in ("", CONFIG, WEIGHTS) and weights and place.has(CONFIG)


def read_cfg(place: Place) -> dict[str, Any]:
    return read_json(place.folder / CONFIG)


def is_mistudio(cfg: Mapping[str, Any]) -> bool:
    """miStudio writes its own keys into a cfg.json of the old kind."""
    return "mistudio_training_id" in cfg


def major_version(cfg: Mapping[str, Any]) -> int:
    """SAELens' major version of a config; 0 where it names none, as configs of before version 6 may."""
    version = cfg.get("sae_lens_version") or metadata_of(cfg).get("sae_lens_version") or "0"
    number = re.match(r"\d{1,6}", str(version))
    if number is None:
        raise FormatError(f"sae_lens_version in {CONFIG} is {version!r:.40}, which is not a version.")
    return int(number[0])


def metadata_of(cfg: Mapping[str, Any]) -> dict[str, Any]:
    metadata = cfg.get("metadata", {})
    if not isinstance(metadata, dict):
        raise FormatError(f"metadata in {CONFIG} must be an object, but is {metadata!r:.40}.")
    return metadata


def field(cfg: Mapping[str, Any], name: str, kind: type, default: Any = None) -> Any:
    """A value of cfg.json, which must be there unless it has a default, and of its kind."""
    value = cfg.get(name, default)
    if value is None:
        raise FormatError(f"{CONFIG} does not say {name}.")
    if type(value) is not kind:
        raise FormatError(f"{name} in {CONFIG} must be of type {kind.__name__}, but is {value!r:.40}.")
    return value


def taken_name(key: str, metadata: dict[str, Any], facts: Mapping[str, Any]) -> str:
    """A name (model_name, hook_name, hook_name_out) from the facts, or else from the file; out of the metadata."""
    said = metadata.pop(key, None)
    value = facts.get(key) or said or ""
    if not isinstance(value, str):
        raise FormatError(f"{key} in {CONFIG} must be text, but is {value!r:.40}.")
    return value


def k_from(given: Any, facts: Mapping[str, Any], kinds: tuple[type, ...] = (int,), source: str = CONFIG) -> Any:
    """k of a file, or else of the facts. Raises FormatError when they differ, MissingFact when neither says it."""
    fact = facts.get("k")
    if given is None and fact is None:
        raise MissingFact(f"{source} does not say k, the number of features kept per row; give it as a fact.", "k")
    if given is not None and fact is not None and given != fact:
        raise FormatError(f"{source} says k {given!r:.40}, but {fact!r:.40} was given; leave k out to use the file's.")
    k, place = (fact, "given") if given is None else (given, f"in {source}")
    if type(k) not in kinds:
        raise FormatError(f"k {place} must be of type {kinds[0].__name__}, but is {k!r:.40}.")
    return k


def positive_number(name: str, value: Any) -> float:
    """A number above 0. Raises FormatError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not (isfinite(value) and value > 0):
        raise FormatError(f"{name} must be a number above 0, but is {value!r:.40}.")
    return float(value)


def weight_headers(folder: Path) -> tuple[Files, dict[str, TensorInfo]]:
    """The files of the weights, and name, type and shape of all their tensors; no weight is read."""
    files = weight_files(folder, WEIGHTS)
    return files, {name: info for header in files.values() for name, info in header.items()}


def read_weights(folder: Path, files: Files) -> dict[str, Tensor]:
    """All tensors as stored, mapped into memory. For after their headers were checked."""
    tensors: dict[str, Tensor] = {}
    for file, header in files.items():
        tensors |= read_tensors(folder / file, header)
    return tensors


def require_shape(headers: Mapping[str, TensorInfo], name: str, shape: Iterable[int]) -> None:
    """For tensors that are folded and so are not in an SAE's own table. Raises FormatError."""
    info, wanted = headers[name], tuple(shape)
    if info.dtype not in FLOATS or info.shape != wanted:
        raise FormatError(
            f"{name} is {info.dtype} of the shape {list(info.shape)}, but must be floats of {list(wanted)}."
        )


def read_sparsity(folder: Path, d_sae: int, metadata: dict[str, Any]) -> Tensor | None:
    """log10 of how often each feature fired, (d_sae,) float32, where the files say it.

    The SAE is whole without it: a file of it that is wrong is left out, and `metadata` then says so.
    """
    if not (folder / SPARSITY).is_file():
        return None
    try:
        rates = _sparsity(folder / SPARSITY, d_sae)
    except FormatError as error:
        metadata["sparsity_left_out"] = str(error)
        return None
    metadata.pop("sparsity_left_out", None)
    return rates


def _sparsity(path: Path, d_sae: int) -> Tensor:
    headers = tensor_headers(path)
    if "sparsity" not in headers:
        raise FormatError(f"{path.name} holds no tensor named sparsity.")
    require_shape(headers, "sparsity", (d_sae,))
    rates = read_tensors(path, ["sparsity"])["sparsity"].to(torch.float32)
    if not bool(rates.isfinite().all()):
        raise FormatError(f"{path.name} holds rates that are not finite numbers.")
    return rates
