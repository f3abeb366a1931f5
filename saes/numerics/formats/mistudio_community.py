"""miStudio's exports: cfg.json in the manner of SAELens 2 beside sae_weights.safetensors.

The file does not mean what SAELens reads in it. cfg.json always says `apply_b_dec_to_input: false`, yet miStudio's
models subtract b_dec since February 2026; files of before, known by `top_k_sparsity` in `extra_metadata`, did not.
`k` of a TopK SAE is `extra_metadata.top_k`. Some exports left tensors behind; what, is kept in the metadata under
"mistudio_lost", and the numbers are then not those the SAE was trained with:

- TopK: `b_pre`, subtracted and added back, counts as 0 (unless the file has a b_dec, as ours do)
- Transcoder: `b_enc_center`, subtracted before encoding, counts as 0
- standard SAEs of before February 2026: one of their two output biases

Written is a cfg.json that miStudio and SAELens both read to the same numbers: miStudio's keys, SAELens' names of
architectures, `apply_b_dec_to_input: true` and `k`. Everything else about the SAE is under `extra_metadata`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from saes.numerics.formats.files import FormatError, MissingFact, NotRepresentable, Place, TensorInfo
from saes.numerics.formats.mistudio_words import architecture_of, normalization_of
from saes.numerics.formats.saelens import finished, for_inference, write
from saes.numerics.formats.saelens_cfg import (
    CONFIG,
    WEIGHTS,
    field,
    has_sae,
    is_mistudio,
    k_from,
    read_cfg,
    read_weights,
    taken_name,
    weight_headers,
)
from saes.numerics.formats.weights import check_tensors
from saes.numerics.sae import SAE, SAEConfig

EXTRA, LOST, KEPT = "extra_metadata", "mistudio_lost", "metadata"
WRITTEN = ("standard", "jumprelu", "topk")
NORMALIZATIONS_WRITTEN = ("none", "constant_norm_rescale")
_OWN = {  # what every cfg.json of miStudio has and is not a part of our config, with what stands there when not known
    "hook_point_head_index": None,
    "context_size": 128,
    "dataset_path": None,
    "prepend_bos": True,
    "l1_coefficient": None,
    "lr": None,
    "total_training_tokens": None,
    "train_batch_size": None,
    "finetuning_scaling_factor": False,
    "mistudio_training_id": None,
    "mistudio_checkpoint_step": None,
}
# cfg.json's keys that become a part of our config; any other is kept in the metadata.
_KNOWN = {
    *(
        "model_name",
        "hook_point",
        "hook_point_layer",
        "hook_name",
        "architecture",
        "activation_fn_str",
        "d_in",
        "d_sae",
    ),
    *("normalize_activations", "apply_b_dec_to_input", "dtype", "device", "expansion_factor", "k"),
}
_NO_BIAS = "TopK exports lack b_pre, which is subtracted and added back; it counts as 0 here."
_NO_CENTRE = "Transcoder exports lack b_enc_center, which is subtracted before encoding; it counts as 0 here."
_ONE_BIAS = "Standard exports of before February 2026 lack one of two output biases; it counts as 0 here."


def detect(place: Place) -> bool:
    """Whether a folder holds an export of miStudio."""
    return has_sae(place) and is_mistudio(read_cfg(place))


def load(place: Place, facts: Mapping[str, Any], device: torch.device | str, dtype: torch.dtype | None) -> SAE:
    """Read an SAE of this format. Facts: names, `k` where the file lacks it, and `apply_b_dec_to_input` where nothing
    tells when the file was written.

    Raises MissingFact, FormatError or SAEError, each with one sentence.
    """
    cfg = read_cfg(place)
    files, headers = weight_headers(place.folder)
    config = _config(cfg, headers, facts)
    lacks_bias = config.architecture == "topk" and "b_dec" not in headers
    check_tensors(headers | ({"b_dec": TensorInfo("F32", (config.d_in,))} if lacks_bias else {}), config, CONFIG)
    tensors = read_weights(place.folder, files)
    if lacks_bias:
        tensors["b_dec"] = torch.zeros(config.d_in, dtype=tensors["W_dec"].dtype)
    return finished(place, config, tensors, device, dtype)


def _config(cfg: Mapping[str, Any], headers: Mapping[str, TensorInfo], facts: Mapping[str, Any]) -> SAEConfig:
    architecture = architecture_of(cfg.get("architecture"), CONFIG)
    extra = field({EXTRA: cfg.get(EXTRA) or {}}, EXTRA, dict)
    metadata = {name: value for name, value in cfg.items() if name not in _KNOWN}
    if KEPT in extra:  # of an SAE that was not miStudio's: what we knew of it
        metadata = field(extra, KEPT, dict)
    names = {"model_name": cfg.get("model_name"), "hook_name": cfg.get("hook_name") or cfg.get("hook_point")}
    transcoder = architecture == "transcoder"
    subtracts = not transcoder and _subtracts(cfg, extra, facts)
    if lost := _lost(architecture, subtracts, headers):
        metadata[LOST] = lost
    return SAEConfig(
        architecture=architecture,
        d_in=field(cfg, "d_in", int),
        d_sae=field(cfg, "d_sae", int),
        d_out=_width(headers) if transcoder else None,  # type: ignore[arg-type]  # None: d_in
        apply_b_dec_to_input=subtracts,
        normalize_activations="none" if transcoder else normalization_of(cfg.get("normalize_activations"), CONFIG),
        k=_k(cfg, extra, facts) if architecture == "topk" else None,
        hook_name=taken_name("hook_name", names, facts),
        hook_name_out=taken_name("hook_name_out", {}, facts) if transcoder else "",
        model_name=taken_name("model_name", names, facts),
        metadata=metadata,
    )


def _subtracts(cfg: Mapping[str, Any], extra: Mapping[str, Any], facts: Mapping[str, Any]) -> bool:
    """Whether b_dec is subtracted; `false` in the file says nothing. Raises MissingFact when nothing else does."""
    if cfg.get("apply_b_dec_to_input") is True or "top_k" in extra or str(cfg["architecture"]).startswith("standard_"):
        return True
    if "top_k_sparsity" in extra:
        return False
    fact = facts.get("apply_b_dec_to_input")
    if not isinstance(fact, bool):
        raise MissingFact(
            f"{CONFIG} does not tell whether it is from before February 2026, when miStudio began to subtract b_dec; "
            "say it as the fact apply_b_dec_to_input.",
            "apply_b_dec_to_input",
        )
    return fact


def _lost(architecture: str, subtracts: bool, headers: Mapping[str, TensorInfo]) -> str:
    if architecture == "topk":
        return "" if "b_dec" in headers else _NO_BIAS
    if architecture == "transcoder":
        return _NO_CENTRE
    return _ONE_BIAS if architecture == "standard" and not subtracts else ""


def _width(headers: Mapping[str, TensorInfo]) -> int:
    """d_out, which only the bias of the decoder tells."""
    shape = headers["b_dec"].shape if "b_dec" in headers else ()
    if len(shape) != 1:
        raise FormatError(f"{WEIGHTS} has no vector b_dec, which a transcoder needs.")
    return shape[0]


def _k(cfg: Mapping[str, Any], extra: Mapping[str, Any], facts: Mapping[str, Any]) -> Any:
    return k_from(extra.get("top_k") if cfg.get("k") is None else cfg["k"], facts)


# -- writing ----------------------------------------------------------------------------------------------------------


def save(sae: SAE, folder: Path) -> None:
    """Write an SAE so that miStudio and SAELens read it to the same numbers. The folder appears whole or not at all.

    Raises NotRepresentable, or FolderError when the folder cannot be written.
    """
    sae = for_inference(sae)
    _refuse_what_has_no_place(sae)
    write(folder, _cfg_of(sae), sae)


def _refuse_what_has_no_place(sae: SAE) -> None:
    config = sae.config
    if config.architecture not in WRITTEN:
        raise NotRepresentable(f"miStudio's export has no {config.architecture} SAE; it has {', '.join(WRITTEN)}.")
    if config.normalize_activations not in NORMALIZATIONS_WRITTEN:
        raise NotRepresentable(f"miStudio has no normalisation {config.normalize_activations!r}.")
    if config.d_out != config.d_in or config.options.get("glu"):
        raise NotRepresentable("miStudio's export has no SAE with d_out other than d_in, or with a gated encoder.")
    if not config.apply_b_dec_to_input and bool(sae.b_dec.any()):
        raise NotRepresentable("miStudio always subtracts b_dec from the input, which this SAE does not.")
    if config.architecture == "jumprelu" and bool((sae.tensor("threshold") < 0).any()):
        raise NotRepresentable("miStudio takes the logarithm of the thresholds, and some of this SAE's are below 0.")
    if _layer(config.hook_name) is None:
        raise NotRepresentable("miStudio's export needs the layer, and the hook point does not name one.")


def _layer(hook_name: str) -> int | None:
    found = re.search(r"\.(\d+)(?:\.|$)", hook_name)
    return int(found[1]) if found else None


def _cfg_of(sae: SAE) -> dict[str, Any]:
    config, metadata = sae.config, dict(sae.config.metadata)
    cfg = {
        "model_name": config.model_name,
        "hook_point": config.hook_name,
        "hook_point_layer": _layer(config.hook_name),
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "hook_name": config.hook_name,
        "architecture": config.architecture,
        "activation_fn_str": "relu" if config.architecture == "standard" else config.architecture,
        "normalize_activations": config.normalize_activations,
        "apply_b_dec_to_input": True,
        "dtype": str(sae.W_dec.dtype),
        "device": "cpu",
        "expansion_factor": config.d_sae / config.d_in,
    }
    if config.k is not None:
        cfg["k"] = config.k
    cfg |= {name: metadata.get(name, unknown) for name, unknown in _OWN.items()}
    said = metadata.pop(EXTRA, None)
    if isinstance(said, dict):  # an SAE of miStudio's
        metadata.pop("sae_lens_version", None)  # SAELens would take the file for one of its own of today
        return {EXTRA: {"hf_model_name": None, "top_k": config.k} | said} | metadata | cfg
    return cfg | {EXTRA: {"hf_model_name": None, "top_k": config.k, KEPT: metadata}}
