"""SAELens 6 and later: cfg.json beside sae_weights.safetensors. Also our own form on disk.

Tensors are named and oriented as in `SAE`. cfg.json holds the architecture and its options, and under "metadata" the
model and hook point. What differs from our equations is folded into the weights when loading, exactly:

- `rescale_acts_by_decoder_norm` (TopK: choose by z * |W_dec row|, decode acts / |W_dec row|): with n the row norms,
  W_dec /= n, W_enc *= n, b_enc *= n gives the same codes and the same reconstruction.
- `expected_average_only_in` is a factor c of training that SAELens does not store; if the facts give it
  ("norm_scaling_factor"), W_enc *= c, W_dec /= c, b_dec /= c. Without it the tensors are used as they are, which is
  what SAELens does.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from saes.numerics.architectures import sae_class
from saes.numerics.folders import whole_folder
from saes.numerics.formats.files import (
    FormatError,
    NotRepresentable,
    Place,
    UnknownFormat,
    read_json,
    read_tensors,
    weight_files,
)
from saes.numerics.formats.weights import assemble, check_tensors, fold_decoder_norm, fold_scale, upcast
from saes.numerics.sae import SAE, SAEConfig

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
ARCHITECTURES_HERE = ("standard", "topk")  # what this format and we both have, under the same name
WRITTEN_VERSION = "6.0.0"  # the layout that is written; SAELens treats a config without a version as one of before 6

# cfg.json's own keys; any other is kept in the metadata.
_KNOWN = {
    *("architecture", "d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input", "normalize_activations"),
    *("reshape_activations", "metadata", "k", "rescale_acts_by_decoder_norm"),
}


def detect(place: Place) -> bool:
    """Whether a folder holds this format. Raises UnknownFormat for a SAELens SAE of another generation."""
    folder = place.folder
    if place.entry:
        return False
    if not _has_weights(folder) or not (folder / CONFIG).is_file():
        return False
    cfg = read_json(folder / CONFIG)
    if "mistudio_training_id" in cfg:
        raise UnknownFormat(f"{folder.name} is a miStudio export in the SAELens layout, which cannot be read yet.")
    if _major_version(cfg) < 6:
        raise UnknownFormat(f"{folder.name} is a SAELens SAE from before version 6, which cannot be read yet.")
    if (folder / "trainer_state.pt").exists() or "decoder_init_norm" in cfg:
        raise UnknownFormat(f"{folder.name} is a SAELens training checkpoint; export it with save_inference_model.")
    return True


def load(place: Place, facts: Mapping[str, Any], device: torch.device | str, dtype: torch.dtype) -> SAE:
    """Read an SAE of this format. Raises FormatError or SAEError, each with one sentence.

    Facts: `hook_name` and `model_name` take the place of the file's; `k` where cfg.json has none;
    `norm_scaling_factor` as said above.
    """
    folder = place.folder
    cfg = read_json(folder / CONFIG)
    config = _config(cfg, facts)
    tensors = _tensors(folder, config)
    if cfg.get("rescale_acts_by_decoder_norm"):
        fold_decoder_norm(tensors)
    factor = _scaling_factor(config, facts)
    if factor is not None:
        fold_scale(tensors, factor)
        config = replace(config, normalize_activations="none")
    return assemble(config, tensors, device, dtype)


def save(sae: SAE, folder: Path) -> None:
    """Write an SAE in this format, so that SAELens 6 reads it. The folder appears whole or not at all.

    An SAE saved there before is replaced. Raises NotRepresentable, or FolderError when the folder cannot be written.
    """
    cfg = _cfg_of(sae)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sae.state_dict().items()}
    if any(not torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise NotRepresentable("This SAE has weights that are not finite numbers, so it is not worth saving.")
    try:
        text = json.dumps(cfg, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise NotRepresentable(f"The SAE's metadata cannot be written as JSON ({error}).") from error
    with whole_folder(folder, replaces=(CONFIG, WEIGHTS)) as partial:
        save_file(tensors, partial / WEIGHTS)
        (partial / CONFIG).write_text(text, encoding="utf-8")


def _has_weights(folder: Path) -> bool:
    return (folder / WEIGHTS).is_file() or (folder / f"{WEIGHTS}.index.json").is_file()


def _metadata(cfg: Mapping[str, Any]) -> dict[str, Any]:
    metadata = cfg.get("metadata", {})
    if not isinstance(metadata, dict):
        raise FormatError(f"metadata in {CONFIG} must be an object, but is {metadata!r:.40}.")
    return metadata


def _major_version(cfg: Mapping[str, Any]) -> int:
    """SAELens' major version of a config; 0 where it names none, as configs of before version 6 may."""
    version = cfg.get("sae_lens_version") or _metadata(cfg).get("sae_lens_version") or "0"
    number = re.match(r"\d{1,6}", str(version))
    if number is None:
        raise FormatError(f"sae_lens_version in {CONFIG} is {version!r:.40}, which is not a version.")
    return int(number[0])


def _field(cfg: Mapping[str, Any], name: str, kind: type, default: Any = None) -> Any:
    """A value of cfg.json, which must be there unless it has a default, and of its kind."""
    value = cfg.get(name, default)
    if value is None:
        raise FormatError(f"{CONFIG} does not say {name}.")
    if type(value) is not kind:
        raise FormatError(f"{name} in {CONFIG} must be of type {kind.__name__}, but is {value!r:.40}.")
    return value


def _config(cfg: Mapping[str, Any], facts: Mapping[str, Any]) -> SAEConfig:
    architecture = _field(cfg, "architecture", str)
    sae_class(architecture)
    if architecture not in ARCHITECTURES_HERE:
        raise FormatError(f"The saelens format has no architecture {architecture!r} that can be read here.")
    _field(cfg, "dtype", str, "float32")
    metadata = _metadata(cfg) | {key: value for key, value in cfg.items() if key not in _KNOWN}
    reshape = _field(cfg, "reshape_activations", str, "none")
    if reshape not in ("none", "hook_z"):
        raise FormatError(f"reshape_activations in {CONFIG} is {reshape!r:.40}; it must be none or hook_z.")
    if reshape == "hook_z":  # the heads' outputs side by side, which is how a transformers model holds them anyway
        metadata["reshape_activations"] = reshape
    if _field(cfg, "rescale_acts_by_decoder_norm", bool, False):
        metadata["rescale_acts_by_decoder_norm"] = "folded into the weights"
    return SAEConfig(
        architecture=architecture,
        d_in=_field(cfg, "d_in", int),
        d_sae=_field(cfg, "d_sae", int),
        apply_b_dec_to_input=_field(cfg, "apply_b_dec_to_input", bool, True),
        normalize_activations=_field(cfg, "normalize_activations", str, "none"),
        k=_k(cfg, facts) if architecture == "topk" else None,
        hook_name=_name("hook_name", metadata, facts),
        model_name=_name("model_name", metadata, facts),
        metadata=metadata,
    )


def _name(key: str, metadata: dict[str, Any], facts: Mapping[str, Any]) -> str:
    """A name from the facts, or else from the file, taken out of the metadata."""
    said = metadata.pop(key, None)
    value = facts.get(key) or said or ""
    if not isinstance(value, str):
        raise FormatError(f"{key} in {CONFIG} must be text, but is {value!r:.40}.")
    return value


def _k(cfg: Mapping[str, Any], facts: Mapping[str, Any]) -> int:
    given, fact = cfg.get("k"), facts.get("k")
    if given is None and fact is None:
        raise FormatError(f"{CONFIG} does not say k, the number of features kept per row; give it as a fact.")
    if given is not None and fact is not None and given != fact:
        raise FormatError(f"{CONFIG} says k {given!r:.40}, but {fact!r:.40} was given; leave k out to use the file's.")
    return int(_field({"k": fact if given is None else given}, "k", int))


def _scaling_factor(config: SAEConfig, facts: Mapping[str, Any]) -> float | None:
    factor = facts.get("norm_scaling_factor")
    if factor is None or config.normalize_activations != "expected_average_only_in":
        return None
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not (isfinite(factor) and factor > 0):
        raise FormatError(f"norm_scaling_factor must be a number above 0, but is {factor!r:.40}.")
    return float(factor)


def _tensors(folder: Path, config: SAEConfig) -> dict[str, Tensor]:
    """The weights as float32 (or float64), after their names, types and shapes were checked in the file's header."""
    files = weight_files(folder, WEIGHTS)
    headers = {name: info for header in files.values() for name, info in header.items()}
    check_tensors(headers, config, CONFIG)
    tensors: dict[str, Tensor] = {}
    for file, header in files.items():
        tensors |= read_tensors(folder / file, header)
    return upcast(tensors)


def _cfg_of(sae: SAE) -> dict[str, Any]:
    config = sae.config
    if config.architecture not in ARCHITECTURES_HERE:
        raise NotRepresentable(f"The saelens format has no architecture {config.architecture!r}.")
    if config.d_out != config.d_in:
        raise NotRepresentable(f"The saelens format has no {config.architecture} SAE with d_out other than d_in.")
    metadata = dict(config.metadata)
    reshape = metadata.pop("reshape_activations", "none")
    metadata.setdefault("sae_lens_version", WRITTEN_VERSION)
    cfg = {
        "architecture": config.architecture,
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "dtype": str(sae.W_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": config.apply_b_dec_to_input,
        "normalize_activations": config.normalize_activations,
        "reshape_activations": reshape,
        "metadata": metadata | {"model_name": config.model_name, "hook_name": config.hook_name},
    }
    if config.architecture == "topk":
        cfg |= {"k": config.k, "rescale_acts_by_decoder_norm": False}
    return cfg
