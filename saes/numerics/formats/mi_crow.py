"""mi_crow: one file of torch.save with the state of its autoencoder engine and a dict of metadata.

    sae_state_dict     encoder.final_block.0.weight (d_sae, d_in)  encoder.final_block.0.bias (d_sae,)
                       dictionary._weights (d_sae, d_in)           dictionary.multiplier ()
    mi_crow_metadata   n_latents  n_inputs  k (TopK only)  concepts_state  layer_signature  model_id  device

    acts = relu(x @ weight.T + bias) [the k largest of it];   x_hat = acts @ (w / (|w| + 1e-8)) * exp(multiplier)

The dictionary is brought to unit rows whenever it is read, so the stored rows need not be. There is no decoder bias and
no normalisation. Files of its trainer lack k; meta.json or metadata.json beside them says the class, and k is a fact.
`concepts_state` scales codes when steering; it is kept in the metadata and changes nothing here. What mi_crow has no
place for (hook point by our name, metadata, firing rates) is written beside its own metadata, under "saehub".
"""

import json
from collections.abc import Mapping
from math import exp, isfinite, log
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saes.numerics.folders import whole_folder
from saes.numerics.formats.archives import read_torch
from saes.numerics.formats.files import FormatError, NotRepresentable, Place, read_json
from saes.numerics.formats.saelens_cfg import k_from, taken_name
from saes.numerics.formats.weights import UNIT, assemble, upcast
from saes.numerics.formats.writing import refuse_unusable
from saes.numerics.sae import SAE, SAEConfig

STATE, METADATA = "sae_state_dict", "mi_crow_metadata"
WEIGHTS = "model.pt"  # what is written; any name is read
SUFFIXES = (".pt", ".pth")
NAMES = {  # theirs by ours
    "W_enc": "encoder.final_block.0.weight",
    "b_enc": "encoder.final_block.0.bias",
    "W_dec": "dictionary._weights",
}
MULTIPLIER = "dictionary.multiplier"
ROUNDING = UNIT * torch.finfo(torch.float32).eps  # by which the norm of a unit row may be off
EPS = 1e-8  # overcomplete's, added to the norm of a dictionary row
OURS = "saehub"
NEVER_OPENED = ("trainer_state.pt", "training_state.pt", "optimizer.pt")
BESIDE = ("meta.json", "metadata.json")  # of its trainer; of its server
CONCEPTS = ("multiplication", "bias")
_KNOWN = ("n_latents", "n_inputs", "k", "layer_signature", "model_id", "device", "concepts_state")


def detect(place: Place) -> bool:
    """Whether a file, or the only torch file of a folder, is one of mi_crow."""
    path = _weights(place)
    return path is not None and METADATA in read_torch(path)


def load(place: Place, facts: Mapping[str, Any], device: torch.device | str, dtype: torch.dtype | None) -> SAE:
    """Read an SAE of this format. Fact `k` for a TopK SAE whose file lacks it; names override those of the file.

    Raises MissingFact, FormatError or SAEError, each with one sentence.
    """
    path = _weights(place)
    if path is None:
        raise FormatError(f"{place.said} holds no torch file.")
    said = read_torch(path)
    state, metadata = (_part(said, name, path) for name in (STATE, METADATA))
    tensors = {ours: _tensor(state, theirs, path) for ours, theirs in NAMES.items()}
    tensors["W_enc"] = tensors["W_enc"].T
    scale = exp(_number(_tensor(state, MULTIPLIER, path)))
    tensors["W_dec"] = _dictionary(tensors["W_dec"], scale)
    tensors["b_dec"] = torch.zeros(_size(metadata, "n_inputs"), dtype=tensors["W_dec"].dtype)
    sae = assemble(_config(place, metadata, facts), tensors, device, dtype)
    sae.log_sparsity = _rates(metadata, sae.config)
    return sae


def _rates(metadata: Mapping[str, Any], config: SAEConfig) -> Tensor | None:
    """Firing rates, in files of ours."""
    rates = _ours(metadata).get("log_sparsity")
    return rates if isinstance(rates, Tensor) and rates.shape == (config.d_sae,) else None


def _ours(metadata: Mapping[str, Any]) -> dict[str, Any]:
    found = metadata.get(OURS)
    return found if isinstance(found, dict) else {}


def _size(metadata: Mapping[str, Any], name: str) -> int:
    """n_latents or n_inputs. Raises FormatError."""
    value = metadata.get(name)
    if type(value) is not int or value < 1:
        raise FormatError(f"{name} in {METADATA} must be a whole number of at least 1, but is {value!r:.40}.")
    return value


def _weights(place: Place) -> Path | None:
    if place.entry:
        return place.folder / place.entry if place.entry.endswith(SUFFIXES) and place.has(place.entry) else None
    found = [name for name in place.names if name.endswith(SUFFIXES)]
    return place.folder / found[0] if len(found) == 1 and found[0] not in NEVER_OPENED else None


def _part(said: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    part = said.get(name)
    if not isinstance(part, dict):
        raise FormatError(f"{path.name} holds no {name}.")
    return part


def _tensor(state: Mapping[str, Any], name: str, path: Path) -> Tensor:
    tensor = state.get(name)
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise FormatError(f"{path.name} lacks {name}, or it is no tensor of floating point numbers.")
    return tensor


def _number(tensor: Tensor) -> float:
    if tensor.numel() != 1 or not isfinite(float(tensor)) or abs(float(tensor)) > 80:
        raise FormatError(f"{MULTIPLIER} must be one number that an exponential can take.")
    return float(tensor)


def _dictionary(weights: Tensor, scale: float) -> Tensor:
    """Unit rows times the scale; rows that are of norm 1 already stay as they are, to the bit."""
    exact = upcast({"W": weights})["W"]
    norms = exact.norm(dim=-1, keepdim=True)
    if not bool(((norms - 1).abs() <= ROUNDING).all()):
        weights = exact / (norms + EPS)
    return weights if scale == 1 else upcast({"W": weights})["W"] * scale


def _config(place: Place, said: Mapping[str, Any], facts: Mapping[str, Any]) -> SAEConfig:
    topk = said.get("k") is not None or _is_topk(place, facts)
    names = {"model_name": said.get("model_id"), "hook_name": _ours(said).get("hook_name")}
    metadata: dict[str, Any] = {
        name: value for name, value in said.items() if name not in _KNOWN and isinstance(value, str | int)
    }
    metadata |= _part(_ours(said) or {"metadata": {}}, "metadata", Path(OURS))
    if said.get("layer_signature") is not None:
        metadata.setdefault("layer_signature", said["layer_signature"])
    if concepts := _concepts(said.get("concepts_state")):
        metadata["concepts_state"] = concepts
    return SAEConfig(
        architecture="topk" if topk else "standard",
        d_in=_size(said, "n_inputs"),
        d_sae=_size(said, "n_latents"),
        apply_b_dec_to_input=False,
        k=k_from(said.get("k"), facts, source=METADATA) if topk else None,
        hook_name=taken_name("hook_name", names, facts),
        model_name=taken_name("model_name", names, facts),
        metadata=metadata,
    )


def _is_topk(place: Place, facts: Mapping[str, Any]) -> bool:
    """For files without k: what the trainer or the server wrote beside it, or a person says."""
    for name in BESIDE:
        if place.has(name):
            kind = read_json(place.folder / name)
            said = str(kind.get("sae_type") or kind.get("sae_class") or "").lower()
            if said:
                return "topk" in said
    return facts.get("architecture") == "topk" or facts.get("k") is not None


def _concepts(state: Any) -> dict[str, Any]:
    """As plain numbers; a vector that is one number throughout (the default is ones) as that number."""
    if not isinstance(state, dict):
        return {}
    vectors = {name: state[name] for name in CONCEPTS if isinstance(state.get(name), Tensor) and state[name].numel()}
    return {name: _compact(vector.float().flatten()) for name, vector in vectors.items()}


def _compact(vector: Tensor) -> float | list[float]:
    return float(vector[0]) if bool((vector == vector[0]).all()) else vector.tolist()


# -- writing ----------------------------------------------------------------------------------------------------------


def save(sae: SAE, path: Path) -> None:
    """Write an SAE so that mi_crow's TopKSae.load or L1Sae.load reads it: model.pt in a new folder.

    Raises NotRepresentable, or FolderError when the folder cannot be written.
    """
    scale = _scale(sae)
    tensors = {name: tensor.detach().cpu() for name, tensor in sae.state_dict().items()}
    refuse_unusable(tensors)
    state = {
        NAMES["W_enc"]: tensors["W_enc"].T.clone(memory_format=torch.contiguous_format),
        NAMES["b_enc"]: tensors["b_enc"].clone(),  # torch.save writes all of the memory that a tensor is a part of
        NAMES["W_dec"]: tensors["W_dec"].clone() if scale == 1 else tensors["W_dec"] / scale,
        MULTIPLIER: torch.tensor(log(scale), dtype=tensors["W_dec"].dtype),
    }
    with whole_folder(path, replaces=(WEIGHTS,)) as partial:
        torch.save({STATE: state, METADATA: _metadata_of(sae)}, partial / WEIGHTS)


def _scale(sae: SAE) -> float:
    """The norm that all decoder rows have. Raises NotRepresentable when they differ, or for anything else."""
    config = sae.config
    if config.options.get("glu"):
        raise NotRepresentable("mi_crow has no encoder with a gate (glu), and this SAE has one.")
    if config.architecture not in ("standard", "topk"):
        raise NotRepresentable(f"mi_crow has no {config.architecture} SAE; it has standard and topk.")
    if config.d_out != config.d_in:
        raise NotRepresentable("mi_crow has no SAE with d_out other than d_in.")
    if config.normalize_activations != "none":
        raise NotRepresentable(f"mi_crow has no normalisation, and this SAE has {config.normalize_activations}.")
    if bool(sae.b_dec.any()):
        raise NotRepresentable("mi_crow has no bias of the decoder, and this SAE has one.")
    low, high = (float(norm) for norm in upcast(sae.state_dict())["W_dec"].norm(dim=-1).aminmax())
    if not low > 0 or high - low > 2 * ROUNDING * high:
        raise NotRepresentable(
            f"mi_crow's decoder rows all have one norm; this SAE's have norms of {low:.4g} to {high:.4g}."
        )
    return 1.0 if abs(high - 1) <= ROUNDING else high


def _metadata_of(sae: SAE) -> dict[str, Any]:
    config = sae.config
    ours = {name: value for name, value in config.metadata.items() if name != "concepts_state"}
    try:
        json.dumps(ours, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise NotRepresentable(f"The SAE's metadata cannot be written as plain values ({error}).") from error
    metadata = {
        "concepts_state": _vectors(config.metadata.get("concepts_state"), config.d_sae),
        "n_latents": config.d_sae,
        "n_inputs": config.d_in,
        "device": "cpu",
        "layer_signature": config.metadata.get("layer_signature") or config.hook_name or None,
        "model_id": config.model_name or None,
        OURS: {"hook_name": config.hook_name, "metadata": ours}
        | ({} if sae.log_sparsity is None else {"log_sparsity": sae.log_sparsity.cpu().clone()}),
    }
    return metadata | ({"k": config.k} if config.k is not None else {})


def _vectors(said: Any, d_sae: int) -> dict[str, Tensor]:
    """`concepts_state` as mi_crow has it. Raises NotRepresentable when it is of another width."""
    vectors = {}
    for name in CONCEPTS:
        value = (said or {}).get(name, 1.0)
        vectors[name] = (
            torch.tensor(value, dtype=torch.float32).expand(d_sae if isinstance(value, float) else -1).clone()
        )
        if vectors[name].shape != (d_sae,):
            raise NotRepresentable(f"concepts_state holds {len(vectors[name])} numbers for {d_sae} features.")
    return vectors
