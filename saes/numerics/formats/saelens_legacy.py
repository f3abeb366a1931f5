"""SAELens 0.x to 5.x: the files of `saelens`, with a flat cfg.json that went through several sets of names.

Versions 0 to 2 wrote the whole training run (`hook_point`, `activation_fn`, `normalize_activations: false`), 3 to 5 a
list of their own (`hook_name`, `activation_fn_str`, `activation_fn_kwargs`). TopK is `activation_fn` topk, whatever
`architecture` says; tanh-relu, which SAELens 6 passes over in silence, is an architecture of ours. A `scaling_factor`
(finetuned afterwards) multiplies the codes when they are decoded: x_hat = (acts * s) @ W_dec + b_dec, so it is folded:
W_dec = s[:, None] * W_dec.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saes.numerics.architectures import sae_class
from saes.numerics.formats.files import FormatError, Place, TensorInfo
from saes.numerics.formats.saelens import finished
from saes.numerics.formats.saelens_cfg import (
    CONFIG,
    field,
    has_sae,
    is_mistudio,
    k_from,
    major_version,
    metadata_of,
    read_cfg,
    read_weights,
    require_shape,
    taken_name,
    weight_headers,
)
from saes.numerics.formats.weights import check_tensors, upcast
from saes.numerics.sae import SAE, SAEConfig

SCALES = ("scaling_factor", "finetuning_scaling_factor")  # up to version 2, from version 3
ARCHITECTURES_THEN = ("standard", "gated", "jumprelu", "topk")
RENAMED = {
    "hook_point": "hook_name",
    "hook_point_layer": "hook_layer",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
# cfg.json's own keys; any other is kept in the metadata.
_KNOWN = {
    *("architecture", "d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input", "normalize_activations"),
    *("activation_fn", "activation_fn_kwargs", "finetuning_scaling_factor", "k", "metadata", "sae_lens_version"),
}


def detect(place: Place) -> bool:
    """Whether a folder holds an SAE that SAELens saved before version 6."""
    if not has_sae(place):
        return False
    cfg = read_cfg(place)
    return not is_mistudio(cfg) and major_version(cfg) < 6


def load(place: Place, facts: Mapping[str, Any], device: torch.device | str, dtype: torch.dtype | None) -> SAE:
    """Read an SAE of this format; facts `hook_name`, `model_name`, and `k` where the files lack it.

    Raises FormatError or SAEError, each with one sentence.
    """
    config = _config(read_cfg(place), facts)
    files, headers = weight_headers(place.folder)
    check_tensors(_without_scales(headers, config), config, CONFIG)
    tensors = read_weights(place.folder, files)
    _fold_finetuning(tensors)
    return finished(place, config, tensors, device, dtype)


def _config(cfg: Mapping[str, Any], facts: Mapping[str, Any]) -> SAEConfig:
    cfg = {RENAMED.get(name, name): value for name, value in cfg.items() if RENAMED.get(name) not in cfg}
    architecture = _architecture(cfg)
    metadata = metadata_of(cfg) | {name: value for name, value in cfg.items() if name not in _KNOWN}
    if isinstance(cfg.get("sae_lens_version"), str):  # of the release that saved it, which is not the layout we write
        metadata.setdefault("sae_lens_training_version", cfg["sae_lens_version"])
    hook = taken_name("hook_name", metadata, facts).replace("{layer}", str(cfg.get("hook_layer")))
    if "hook_z" in hook:
        metadata["reshape_activations"] = "hook_z"
    return SAEConfig(
        architecture=architecture,
        d_in=field(cfg, "d_in", int),
        d_sae=_d_sae(cfg),
        apply_b_dec_to_input=field(cfg, "apply_b_dec_to_input", bool, True),
        normalize_activations=_normalization(cfg),
        k=k_from(_activation_options(cfg).get("k", cfg.get("k")), facts) if architecture == "topk" else None,
        hook_name=hook,
        model_name=taken_name("model_name", metadata, facts),
        metadata=metadata,
    )


def _architecture(cfg: Mapping[str, Any]) -> str:
    """By name and by activation. Raises SAEError or FormatError for those we do not have."""
    architecture = field(cfg, "architecture", str, "standard")
    sae_class(architecture)
    if architecture not in ARCHITECTURES_THEN:
        raise FormatError(f"SAELens before version 6 had no architecture {architecture!r}.")
    activation = field(cfg, "activation_fn", str, "relu")
    if activation == "topk" and architecture in ("standard", "topk"):
        return "topk"
    if activation == "tanh-relu" and architecture == "standard":
        return "tanh_relu"
    if activation != "relu" and architecture != "topk":
        raise FormatError(f"The activation function of this SAE is {activation!r:.40}, which is not supported.")
    return architecture


def _activation_options(cfg: Mapping[str, Any]) -> dict[str, Any]:
    return field({"activation_fn_kwargs": cfg.get("activation_fn_kwargs") or {}}, "activation_fn_kwargs", dict)


def _normalization(cfg: Mapping[str, Any]) -> str:
    """true and false are of version 2 and before."""
    said = cfg.get("normalize_activations")
    if said is None or said is False:
        return "none"
    return "expected_average_only_in" if said is True else field(cfg, "normalize_activations", str)


def _d_sae(cfg: Mapping[str, Any]) -> int:
    """The oldest configs give a factor of d_in instead."""
    if cfg.get("d_sae") is None and type(cfg.get("expansion_factor")) is int:
        return int(cfg["expansion_factor"] * field(cfg, "d_in", int))
    return int(field(cfg, "d_sae", int))


def _without_scales(headers: Mapping[str, TensorInfo], config: SAEConfig) -> dict[str, TensorInfo]:
    for name in SCALES:
        if name in headers:
            require_shape(headers, name, (config.d_sae,))
    return {name: info for name, info in headers.items() if name not in SCALES}


def _fold_finetuning(tensors: dict[str, Tensor]) -> None:
    for name in SCALES:
        scale = tensors.pop(name, None)
        if scale is not None and not bool((scale == 1).all()):
            tensors |= upcast(tensors)
            tensors["W_dec"] = tensors["W_dec"] * scale.to(tensors["W_dec"].dtype)[:, None]
