"""SAELens 6 and later: cfg.json beside sae_weights.safetensors. Also our own form on disk.

Tensors are named and oriented as in `SAE`. cfg.json holds the architecture and its options, and under "metadata" the
model and hook point. What differs from our equations is folded into the weights when loading, exactly:

- `rescale_acts_by_decoder_norm` (TopK: choose by z * |W_dec row|, decode acts / |W_dec row|): with n the row norms,
  W_dec /= n, W_enc *= n, b_enc *= n gives the same codes and the same reconstruction.
- `expected_average_only_in` is a factor c of training that SAELens does not store; if the facts give it
  ("norm_scaling_factor"), W_enc *= c, W_dec /= c, b_dec /= c. Without it the tensors are used as they are, which is
  what SAELens does.

SAELens has no BatchTopK for inference: one is written as SAELens writes it, as the JumpReLU SAE that training made.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from saes.numerics.architectures import sae_class
from saes.numerics.folders import whole_folder
from saes.numerics.formats.files import FormatError, NotRepresentable, Place
from saes.numerics.formats.saelens_cfg import (
    CONFIG,
    FILES,
    SPARSITY,
    WEIGHTS,
    field,
    has_sae,
    is_mistudio,
    k_from,
    major_version,
    metadata_of,
    positive_number,
    read_cfg,
    read_sparsity,
    read_weights,
    taken_name,
    weight_headers,
)
from saes.numerics.formats.weights import (
    assemble,
    check_tensors,
    fold_decoder_norm,
    fold_scale,
    upcast,
)
from saes.numerics.formats.writing import json_of, refuse_unusable
from saes.numerics.sae import SAE, SAEConfig
from saes.numerics.topk import BatchTopKSAE

WRITTEN_VERSION = "6.0.0"  # the layout that is written; SAELens treats a config without a version as one of before 6
TRAINING_ONLY = ("batchtopk", "matryoshka_batchtopk")
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
OPTIONS = {  # of the architectures that have some, under SAELens' names, which are ours too
    "matching_pursuit": ("residual_threshold", "max_iterations", "stop_on_duplicate_support"),
    "temporal": ("n_heads", "n_attn_layers", "bottleneck_factor", "sae_diff_type", "kval_topk", "tied_weights"),
    "matryoshka_batchtopk": ("matryoshka_widths",),
}
ARCHITECTURES_HERE = ("standard", "gated", "topk", "abstopk", "jumprelu", "matching_pursuit", "temporal", *TRANSCODERS)
WITH_K = ("topk", "abstopk")
SCALE = "activation_normalization_factor"  # of temporal SAEs, with the normalisation below; no others have either
SCALED = "constant_scalar_rescale"

# cfg.json's own keys; any other is kept in the metadata.
_KNOWN = {
    *("architecture", "d_in", "d_sae", "d_out", "dtype", "device", "apply_b_dec_to_input", "normalize_activations"),
    *("reshape_activations", "metadata", "k", "rescale_acts_by_decoder_norm"),
}


def detect(place: Place) -> bool:
    """Whether a folder holds an SAE that SAELens 6 or later saved for inference."""
    if not has_sae(place):
        return False
    cfg = read_cfg(place)
    return not is_mistudio(cfg) and major_version(cfg) >= 6 and not is_training(place, cfg)


def is_training(place: Place, cfg: Mapping[str, Any]) -> bool:
    """Whether a SAELens 6 folder is a checkpoint of training."""
    return place.has("trainer_state.pt") or cfg.get("architecture") in TRAINING_ONLY or "decoder_init_norm" in cfg


def load(place: Place, facts: Mapping[str, Any], device: torch.device | str, dtype: torch.dtype | None) -> SAE:
    """Read an SAE of this format. Raises FormatError or SAEError, each with one sentence.

    Facts: `hook_name`, `hook_name_out` and `model_name` take the place of the file's; `k` where cfg.json has none;
    `norm_scaling_factor` as said above.
    """
    cfg = read_cfg(place)
    config = config_of(cfg, facts)
    files, headers = weight_headers(place.folder)
    check_tensors(headers, config, CONFIG)
    tensors = read_weights(place.folder, files)
    factor = facts.get("norm_scaling_factor")
    if factor is not None and config.normalize_activations == "expected_average_only_in":
        config = folded_scale(config, tensors, positive_number("norm_scaling_factor", factor))
    if rescales(cfg):
        tensors = upcast(tensors)
        fold_decoder_norm(tensors)
    return finished(place, config, tensors, device, dtype)


def rescales(cfg: Mapping[str, Any]) -> bool:
    """Whether features are chosen, and codes counted, by z * |W_dec row|; a flag that only TopK's relatives have."""
    said = field(cfg, "rescale_acts_by_decoder_norm", bool, False)
    return bool(said) and cfg.get("architecture") in (*WITH_K, *TRAINING_ONLY)


def finished(
    place: Place,
    config: SAEConfig,
    tensors: Mapping[str, Tensor],
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> SAE:
    """The SAE of a folder's config and folded tensors, with the firing rates beside them."""
    rates = read_sparsity(place.folder, config.d_sae, config.metadata)
    sae = assemble(config, tensors, device, dtype)
    sae.log_sparsity = rates
    return sae


def folded_scale(config: SAEConfig, tensors: dict[str, Tensor], factor: float) -> SAEConfig:
    """Fold the factor of `expected_average_only_in` into the tensors (upcast); the config that fits them then.

    Matching pursuit reads and writes with the same tensor, which must keep its scale: there the codes change by the
    factor instead, and with them the residual it stops at. Raises FormatError for a temporal SAE, which cannot be.
    """
    if config.architecture == "temporal":
        raise FormatError("A temporal SAE cannot have a scaling factor folded in; leave norm_scaling_factor out.")
    tensors |= upcast(tensors)
    if config.architecture == "matching_pursuit":
        tensors["b_dec"] = tensors["b_dec"] / factor
        limit = positive_number("residual_threshold", config.options.get("residual_threshold", 1e-2))
        config = replace(config, options=config.options | {"residual_threshold": limit / factor})
    else:
        fold_scale(tensors, factor)
    return replace(config, normalize_activations="none")


def config_of(cfg: Mapping[str, Any], facts: Mapping[str, Any]) -> SAEConfig:
    """The config in a cfg.json of version 6. Raises FormatError or SAEError."""
    architecture = field(cfg, "architecture", str)
    if architecture != "matryoshka_batchtopk":  # a way of training; the SAE is a BatchTopK one
        sae_class(architecture)
    if architecture not in (*ARCHITECTURES_HERE, *TRAINING_ONLY):
        raise FormatError(f"The saelens format has no architecture {architecture!r} that can be read here.")
    field(cfg, "dtype", str, "float32")
    options, normalization = _options(cfg, architecture)
    metadata = _metadata(cfg, architecture)
    transcoder = architecture in TRANSCODERS
    subtracts = field(cfg, "apply_b_dec_to_input", bool, not transcoder)
    if transcoder and subtracts:
        raise FormatError(f"{CONFIG} says apply_b_dec_to_input, which a transcoder cannot have.")
    return SAEConfig(
        architecture="batchtopk" if architecture in TRAINING_ONLY else architecture,
        d_in=field(cfg, "d_in", int),
        d_sae=field(cfg, "d_sae", int),
        d_out=field(cfg, "d_out", int) if transcoder else None,  # type: ignore[arg-type]  # None: d_in
        apply_b_dec_to_input=subtracts,
        normalize_activations=normalization,
        k=_k(cfg, architecture, facts),
        hook_name=taken_name("hook_name", metadata, facts),
        hook_name_out=taken_name("hook_name_out", metadata, facts if transcoder else {}),
        model_name=taken_name("model_name", metadata, facts),
        options=options,
        metadata=metadata,
    )


def _k(cfg: Mapping[str, Any], architecture: str, facts: Mapping[str, Any]) -> Any:
    if architecture in TRAINING_ONLY:
        return k_from(cfg.get("k"), facts, (int, float))
    return k_from(cfg.get("k"), facts) if architecture in WITH_K else None


def _options(cfg: Mapping[str, Any], architecture: str) -> tuple[dict[str, Any], str]:
    """The architecture's own settings, and the normalisation."""
    options = {name: cfg[name] for name in OPTIONS.get(architecture, ()) if name in cfg}
    normalization = field(cfg, "normalize_activations", str, "none")
    if architecture == "temporal" and normalization == SCALED:
        return options | {SCALE: positive_number(SCALE, cfg.get(SCALE, 1.0))}, "none"
    return options, normalization


def _metadata(cfg: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    known = _KNOWN | {*OPTIONS.get(architecture, ()), SCALE}
    metadata = metadata_of(cfg) | {key: value for key, value in cfg.items() if key not in known}
    reshape = field(cfg, "reshape_activations", str, "none")
    if reshape not in ("none", "hook_z"):
        raise FormatError(f"reshape_activations in {CONFIG} is {reshape!r:.40}; it must be none or hook_z.")
    if reshape == "hook_z":  # the heads' outputs side by side, which is how a transformers model holds them anyway
        metadata["reshape_activations"] = reshape
    if rescales(cfg):
        metadata["rescale_acts_by_decoder_norm"] = "folded into the weights"
    return metadata


# -- writing ----------------------------------------------------------------------------------------------------------


def save(sae: SAE, folder: Path) -> None:
    """Write an SAE in this format, so that SAELens 6 reads it. The folder appears whole or not at all.

    An SAE saved there before is replaced. Raises NotRepresentable, or FolderError when the folder cannot be written.
    """
    sae = for_inference(sae)
    write(folder, _cfg_of(sae), sae)


def for_inference(sae: SAE) -> SAE:
    """A BatchTopK SAE as the JumpReLU SAE it is after training; any other as it is."""
    if not isinstance(sae, BatchTopKSAE):
        return sae
    made = sae.for_inference()
    made.log_sparsity = sae.log_sparsity
    return made


def write(folder: Path, cfg: Mapping[str, Any], sae: SAE) -> None:
    """Write cfg.json, the weights as they are and, if known, the firing rates. Raises NotRepresentable, FolderError."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sae.state_dict().items()}
    refuse_unusable(tensors)
    text = json_of(cfg)
    with whole_folder(folder, replaces=FILES) as partial:
        save_file(tensors, partial / WEIGHTS)
        if sae.log_sparsity is not None:
            save_file({"sparsity": sae.log_sparsity.cpu().contiguous()}, partial / SPARSITY)
        (partial / CONFIG).write_text(text, encoding="utf-8")


def _cfg_of(sae: SAE) -> dict[str, Any]:
    config = sae.config
    _refuse_what_has_no_place(config)
    metadata = dict(config.metadata)
    reshape = metadata.pop("reshape_activations", "none")
    if major_version({"metadata": metadata}) < 6:
        metadata["sae_lens_version"] = WRITTEN_VERSION
    names = {"model_name": config.model_name, "hook_name": config.hook_name}
    if config.hook_name_out:
        names["hook_name_out"] = config.hook_name_out
    scale = config.options.get(SCALE, 1.0)
    cfg = {
        "architecture": config.architecture,
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "dtype": str(sae.W_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": config.apply_b_dec_to_input,
        "normalize_activations": config.normalize_activations if scale == 1 else SCALED,
        "reshape_activations": reshape,
        "metadata": metadata | names,
    }
    if config.architecture in TRANSCODERS:
        cfg["d_out"] = config.d_out
    if config.architecture in WITH_K:
        cfg |= {"k": config.k, "rescale_acts_by_decoder_norm": False}
    places = (*OPTIONS.get(config.architecture, ()), SCALE)
    return cfg | {name: value for name, value in config.options.items() if name in places}


def _refuse_what_has_no_place(config: SAEConfig) -> None:
    """Raises NotRepresentable for what SAELens has no class or no field for."""
    if config.architecture not in ARCHITECTURES_HERE:
        raise NotRepresentable(f"The saelens format has no architecture {config.architecture!r}.")
    if config.architecture not in TRANSCODERS and config.d_out != config.d_in:
        raise NotRepresentable(f"The saelens format has no {config.architecture} SAE with d_out other than d_in.")
    if config.architecture in TRANSCODERS and config.apply_b_dec_to_input:
        raise NotRepresentable("The saelens format has no transcoder that subtracts b_dec from its input.")
    places = OPTIONS.get(config.architecture, ())
    lost = sorted(name for name, value in config.options.items() if name not in (*places, SCALE) and value)
    if lost:
        raise NotRepresentable(f"The saelens format has no place for {', '.join(lost)} of a {config.architecture} SAE.")
    if config.options.get(SCALE, 1.0) != 1 and config.normalize_activations != "none":
        raise NotRepresentable(f"The saelens format has either {SCALE} or {config.normalize_activations}, not both.")
