"""miStudio's own checkpoints: one safetensors file whose keys begin with "model.", and nothing that describes it.

checkpoint.safetensors holds the state of one of five classes, named in the header or told apart by its tensors:

    SparseAutoencoder, SkipAutoencoder   encoder.{weight,bias}  decoder.weight  decoder_bias  [decoder.bias: to Feb 2026]
    TopKSAE                              encoder.{weight,bias}  decoder.weight  b_pre
    JumpReLUSAE                          W_enc  b_enc  W_dec  b_dec  activation.log_threshold
    Transcoder                           encoder.{weight,bias}  decoder.{weight,bias}  b_enc_center

encoder.weight and W_enc are (d_sae, d_in), decoder.weight and W_dec (d_out, d_sae), absent where they are tied. All
subtract their decoder's bias before encoding, but for files with the second bias of before February 2026, which did
not. How x is normalised and TopK's k are in no file: facts `normalize_activations` and `k`.

The form that miStudio's documents promise instead is read by `mistudio_documented`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saes.numerics.formats import mistudio_documented
from saes.numerics.formats.files import (
    FormatError,
    MissingFact,
    Place,
    TensorInfo,
    header_notes,
    read_tensors,
    tensor_headers,
)
from saes.numerics.formats.mistudio_words import normalization_of, require_facts
from saes.numerics.formats.saelens_cfg import k_from, require_shape, taken_name
from saes.numerics.formats.weights import assemble, check_tensors, upcast
from saes.numerics.sae import SAE, SAEConfig

CHECKPOINT, PREFIX, OPTIMIZER = "checkpoint.safetensors", "model.", "optimizer."
_LINEAR = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight"}
_NAMES = {  # theirs by ours
    "standard": _LINEAR | {"b_dec": "decoder_bias"},
    "skip_sae": _LINEAR | {"b_dec": "decoder_bias"},
    "topk": _LINEAR | {"b_dec": "b_pre"},
    "transcoder": _LINEAR | {"b_dec": "decoder.bias"},
    "jumprelu": {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    | {"threshold": "activation.log_threshold"},
}
_CLASSES = {
    "SparseAutoencoder": "standard",
    "SkipAutoencoder": "skip_sae",
    "TopKSAE": "topk",
    "JumpReLUSAE": "jumprelu",
    "Transcoder": "transcoder",
}
SECOND_BIAS, CENTRE = "decoder.bias", "b_enc_center"
_HOOKS = {"residual": "hook_resid_post", "mlp": "hook_mlp_out", "attention": "hook_attn_out"}


def detect(place: Place) -> bool:
    """Whether a folder, or a safetensors file, is a miStudio checkpoint in its own form."""
    if mistudio_documented.detect(place):
        return True
    path = _checkpoint(place)
    return path is not None and all(name.startswith((PREFIX, OPTIMIZER)) for name in tensor_headers(path))


def load(place: Place, facts: Mapping[str, Any], device: torch.device | str, dtype: torch.dtype | None) -> SAE:
    """Read an SAE of this format. Needs the fact `normalize_activations`, and `k` for TopK; `architecture` (standard
    or skip) where the header does not name the class. `apply_b_dec_to_input` is believed where it is given.

    Raises MissingFact, FormatError or SAEError, each with one sentence.
    """
    if mistudio_documented.detect(place):
        return mistudio_documented.load(place, facts, device, dtype)
    path = _checkpoint(place) or place.folder / CHECKPOINT
    theirs = {name.removeprefix(PREFIX): info for name, info in tensor_headers(path).items() if name.startswith(PREFIX)}
    notes = header_notes(path)
    architecture = _architecture(theirs, notes, facts)
    names = _names(architecture, theirs)
    config = _config(architecture, names, theirs, notes, facts)
    check_tensors(_oriented_headers(names, theirs), config, f"the biases in {path.name}")
    for name in set(theirs) - set(names.values()):
        require_shape(theirs, name, (config.d_in,))
    found = read_tensors(path, [PREFIX + name for name in theirs])
    tensors = _folded(names, {name.removeprefix(PREFIX): tensor for name, tensor in found.items()})
    return assemble(config, tensors, device, dtype)


def _checkpoint(place: Place) -> Path | None:
    name = place.entry or CHECKPOINT
    return place.folder / name if name.endswith(".safetensors") and place.has(name) else None


def _architecture(theirs: Mapping[str, TensorInfo], notes: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """By the class in the header, else by the tensors; a fact where these leave two."""
    said = notes.get("architecture")
    if said in _CLASSES:
        return _CLASSES[said]
    if said is not None:
        raise FormatError(f"The header of {CHECKPOINT} names the class {said!r:.40}, which miStudio does not have.")
    for mark, architecture in {"W_enc": "jumprelu", "b_pre": "topk", CENTRE: "transcoder"}.items():
        if mark in theirs:
            return architecture
    if facts.get("architecture") not in ("standard", "skip", "skip_sae"):
        raise MissingFact(f"{CHECKPOINT} does not say whether its architecture is standard or skip.", "architecture")
    return "standard" if facts["architecture"] == "standard" else "skip_sae"


def _names(architecture: str, theirs: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Their name of each of our tensors. Raises FormatError for what is missing and what is not known."""
    names = dict(_NAMES[architecture])
    if names["W_dec"] not in theirs:
        names["W_dec"] = names["W_enc"]  # tied: the same tensor, read the other way
    optional = {"standard": {SECOND_BIAS}, "skip_sae": {SECOND_BIAS}, "transcoder": {CENTRE}}.get(architecture, set())
    required = set(names.values()) | (optional if architecture == "transcoder" else set())
    if missing := sorted(required - set(theirs)):
        raise FormatError(f"The weights of this miStudio SAE lack {PREFIX}{missing[0]}.")
    if unknown := sorted(set(theirs) - set(names.values()) - optional):
        raise FormatError(f"A miStudio SAE of architecture {architecture} has no tensor {PREFIX}{unknown[0]:.60}.")
    return names


def _config(
    architecture: str,
    names: Mapping[str, str],
    theirs: Mapping[str, TensorInfo],
    notes: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> SAEConfig:
    needed: dict[str, Any] = {}
    if architecture != "transcoder":
        needed["normalize_activations"] = facts.get("normalize_activations")
    if architecture == "topk":
        needed["k"] = facts.get("k")
    require_facts(needed)
    encoder = theirs[names["W_enc"]].shape
    if len(encoder) != 2:
        raise FormatError(f"{PREFIX}{names['W_enc']} must be a matrix, but has the shape {list(encoder)}.")
    metadata = {"mistudio": dict(notes)} if notes else {}
    subtracts = facts.get("apply_b_dec_to_input")
    subtracts = subtracts if isinstance(subtracts, bool) else True
    return SAEConfig(
        architecture=architecture,
        d_in=encoder[1],
        d_sae=encoder[0],
        d_out=theirs[names["b_dec"]].shape[0] if architecture == "transcoder" else None,  # type: ignore[arg-type]
        apply_b_dec_to_input=architecture != "transcoder" and SECOND_BIAS not in theirs and subtracts,
        normalize_activations=normalization_of(needed.get("normalize_activations"), "The fact"),
        k=k_from(None, facts) if architecture == "topk" else None,
        hook_name=taken_name("hook_name", {}, facts) or _hook(notes),
        hook_name_out=taken_name("hook_name_out", {}, facts) if architecture == "transcoder" else "",
        model_name=taken_name("model_name", {}, facts),
        metadata=metadata,
    )


def _hook(notes: Mapping[str, Any]) -> str:
    layer, kind = notes.get("layer_idx"), _HOOKS.get(str(notes.get("hook_type")))
    return f"blocks.{layer}.{kind}" if kind and str(layer).isdigit() else ""


def _oriented_headers(names: Mapping[str, str], theirs: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Our names and orientation. W_dec as it is where it is tied to the encoder, which is (d_sae, d_in)."""
    headers = {ours: theirs[name] for ours, name in names.items()}
    for ours in _turned(names):
        headers[ours] = headers[ours]._replace(shape=headers[ours].shape[::-1])
    return headers


def _turned(names: Mapping[str, str]) -> tuple[str, ...]:
    return ("W_enc",) if names["W_dec"] == names["W_enc"] else ("W_enc", "W_dec")


def _folded(names: Mapping[str, str], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors = {ours: theirs[name] for ours, name in names.items()}
    for ours in _turned(names):
        tensors[ours] = tensors[ours].T
    if names["W_dec"] == names["W_enc"]:
        tensors["W_dec"] = tensors["W_dec"].clone()  # from here on two parameters, not one memory
    if "threshold" in tensors:
        tensors["threshold"] = tensors["threshold"].exp()
    if CENTRE in theirs:
        tensors |= upcast(tensors)
        tensors["b_enc"] = tensors["b_enc"] - theirs[CENTRE].to(tensors["W_enc"].dtype) @ tensors["W_enc"]
    elif SECOND_BIAS in theirs and names["b_dec"] != SECOND_BIAS:
        tensors["b_dec"] = tensors["b_dec"] + theirs[SECOND_BIAS]
    return tensors
