"""The form in which miStudio's documents say it saves SAEs: config.json beside model.safetensors.

config.json gives d_in (or input_dim), d_sae (or hidden_dim), architecture, model_name (or model), hook_name (or
hook_point) and `hyperparameters`; the weights are encoder.{weight,bias} and decoder.{weight,bias}, or W_enc, b_enc,
W_dec, b_dec as in SAELens, and threshold or log_threshold. The documents do not say which way round the matrices lie,
so the sizes of the config decide, and a square one is refused. training_metadata.json is kept where it is there.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from saes.numerics.formats.files import FormatError, Place, TensorInfo, read_json, read_tensors, tensor_headers
from saes.numerics.formats.mistudio_words import architecture_of, normalization_of, require_facts
from saes.numerics.formats.saelens_cfg import field, k_from, taken_name
from saes.numerics.formats.weights import assemble, check_tensors
from saes.numerics.sae import SAE, SAEConfig

CONFIG, WEIGHTS, PICKLE, NOTES = "config.json", "model.safetensors", "model.pt", "training_metadata.json"
_SAME = {"d_in": "input_dim", "d_sae": "hidden_dim", "model_name": "model", "hook_name": "hook_point"}
_OURS = {
    "encoder.weight": "W_enc",
    "encoder.bias": "b_enc",
    "decoder.weight": "W_dec",
    "decoder.bias": "b_dec",
    "decoder_bias": "b_dec",
    "log_threshold": "threshold",
    "activation.log_threshold": "threshold",
} | {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
_KNOWN = {
    *("d_in", "d_sae", "d_out", "dtype", "architecture", "model_name", "hook_name", "k", "top_k"),
    *("normalize_activations", "apply_b_dec_to_input"),
}


def detect(place: Place) -> bool:
    """Whether a folder holds this form: a config with an SAE's two sizes, and weights beside it."""
    if (
        place.entry not in ("", CONFIG, WEIGHTS)
        or not place.has(CONFIG)
        or not (place.has(WEIGHTS) or place.has(PICKLE))
    ):
        return False
    cfg = _config_file(place)
    return all(type(cfg.get(name)) is int for name in ("d_in", "d_sae"))


def load(place: Place, facts: Mapping[str, Any], device: torch.device | str, dtype: torch.dtype | None) -> SAE:
    """Read an SAE of this form. Needs what its config leaves out as facts: normalize_activations, architecture, k.

    Raises MissingFact, FormatError or SAEError, each with one sentence.
    """
    if not place.has(WEIGHTS):
        raise FormatError(f"The weights of this miStudio SAE are in {PICKLE}; only {WEIGHTS} is read, not pickles.")
    config = _config(place, _config_file(place), facts)
    path = place.folder / WEIGHTS
    headers = tensor_headers(path)
    names = _names(headers)
    turned = [ours for ours in ("W_enc", "W_dec") if ours in names and _is_turned(names[ours], headers, config, ours)]
    found = {ours: headers[name] for ours, name in names.items()}
    check_tensors(found | {o: found[o]._replace(shape=found[o].shape[::-1]) for o in turned}, config, CONFIG)
    tensors = {ours: read_tensors(path, [name])[name] for ours, name in names.items()}
    return assemble(config, _oriented(tensors, turned, names), device, dtype)


def _config_file(place: Place) -> dict[str, Any]:
    cfg = read_json(place.folder / CONFIG)
    return {name: cfg.pop(other) for name, other in _SAME.items() if name not in cfg and other in cfg} | cfg


def _config(place: Place, cfg: Mapping[str, Any], facts: Mapping[str, Any]) -> SAEConfig:
    details = field({"hyperparameters": cfg.get("hyperparameters") or {}}, "hyperparameters", dict)
    said = {name: _first(name, cfg, details, facts) for name in ("architecture", "normalize_activations")}
    k = next((one.get(name) for one in (cfg, details) for name in ("k", "top_k") if one.get(name) is not None), None)
    architecture = architecture_of(said["architecture"], CONFIG) if said["architecture"] is not None else None
    if architecture == "transcoder":
        said.pop("normalize_activations")
    require_facts(said | ({"k": k or facts.get("k")} if architecture == "topk" else {}))
    if architecture in ("skip_sae", None):
        raise FormatError(f"{CONFIG} says architecture {said['architecture']!r}, which this form has no tensors for.")
    metadata = {name: value for name, value in cfg.items() if name not in _KNOWN}
    if place.has(NOTES):
        metadata["training_metadata"] = read_json(place.folder / NOTES)
    names = {name: cfg.get(name) for name in ("model_name", "hook_name")}
    transcoder = architecture == "transcoder"
    return SAEConfig(
        architecture=str(architecture),
        d_in=field(cfg, "d_in", int),
        d_sae=field(cfg, "d_sae", int),
        d_out=cfg.get("d_out") if transcoder else None,  # type: ignore[arg-type]
        apply_b_dec_to_input=not transcoder and field(cfg, "apply_b_dec_to_input", bool, True),
        normalize_activations=normalization_of(said.get("normalize_activations"), CONFIG),
        k=k_from(k, facts, source=CONFIG) if architecture == "topk" else None,
        hook_name=taken_name("hook_name", names, facts),
        model_name=taken_name("model_name", names, facts),
        metadata=metadata,
    )


def _first(name: str, *places: Mapping[str, Any]) -> Any:
    return next((place[name] for place in places if place.get(name) is not None), None)


def _names(headers: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Their name of each of our tensors. Raises FormatError for one that is not known or is there twice."""
    names: dict[str, str] = {}
    for name in headers:
        ours = _OURS.get(name)
        if ours is None:
            raise FormatError(f"{WEIGHTS} holds a tensor {name:.60}, which no miStudio SAE has.")
        if ours in names:
            raise FormatError(f"{WEIGHTS} holds both {names[ours]} and {name}; keep only one of them.")
        names[ours] = name
    return names


def _is_turned(name: str, headers: Mapping[str, TensorInfo], config: SAEConfig, ours: str) -> bool:
    """Whether a matrix lies the other way round than ours."""
    wanted = (config.d_in, config.d_sae) if ours == "W_enc" else (config.d_sae, config.d_out)
    if name != ours and wanted[0] == wanted[1]:
        raise FormatError(f"{name} is square, and nothing in the files says which way round it lies.")
    return headers[name].shape == wanted[::-1] != wanted


def _oriented(tensors: Mapping[str, Tensor], turned: Sequence[str], names: Mapping[str, str]) -> dict[str, Tensor]:
    ready = {ours: tensor.T if ours in turned else tensor for ours, tensor in tensors.items()}
    if names.get("threshold", "threshold") != "threshold":
        ready["threshold"] = ready["threshold"].exp()
    return ready
