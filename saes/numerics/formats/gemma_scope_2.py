"""Gemma Scope 2 (Gemma 3): params.safetensors, with a config.json that some folders lack.

    acts = relu(z) * [z > threshold],  z = x @ w_enc + b_enc;   y_hat = acts @ w_dec + b_dec [+ x @ affine_skip_connection]

Transcoders read the MLP's input with the norm's gain, which TransformerLens calls mlp.hook_in; SAELens' name for it
(hook_mlp_in) means another place there, the residual stream. `hf_hook_name` in the metadata is the authors' own name.

A cross-layer transcoder has one file per source layer, params_layer_L.safetensors, with w_dec (d_sae, n_layers, d_out).
One layer alone gives its features' codes, but no layer's reconstruction: w_dec is then summed over the target layers, as
SAELens does, and the metadata says what that x_hat is not. `width` in config.json counts the features of all layers.
Crosscoders have such files too, and are read whole: `gemma_scope_2_crosscoder`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from saes.numerics.formats.files import FormatError, MissingFact, Place, read_json, tensor_headers
from saes.numerics.formats.gemma_scope_2_crosscoder import LAYER_FILE, is_crosscoder, load_crosscoder
from saes.numerics.formats.orient import all_tensors, hold_against, renamed, transposed, widths, within
from saes.numerics.formats.stated import NOT_AN_AUTOENCODER, Stated, fact_text, layer_of, path_of, repo_of
from saes.numerics.formats.weights import assemble, upcast
from saes.numerics.sae import SAE, SAEConfig

CONFIG, WEIGHTS, SKIP = "config.json", "params.safetensors", "affine_skip_connection"
ONE_LAYER = (
    "This is one layer of a cross-layer transcoder: its feature activations are right, but a reconstruction takes all "
    "layers. What decode and forward give is the sum over target layers, not any layer's output."
)
_NAMES = {"W_enc": "w_enc", "W_dec": "w_dec", "b_enc": "b_enc", "b_dec": "b_dec", "threshold": "threshold"}
# Module and side in a block of the transformers model -> TransformerLens.
PLACES = {
    "output": "hook_resid_post",
    "self_attn.o_proj.input": "attn.hook_z",
    "post_feedforward_layernorm.output": "hook_mlp_out",
    "pre_feedforward_layernorm.output": "mlp.hook_in",
}
SITES = {
    "resid_post": ("output", "output"),
    "attn_out": ("self_attn.o_proj.input", "self_attn.o_proj.input"),
    "mlp_out": ("post_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
    "transcoder": ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
    "clt": ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
}


def detect(place: Place) -> bool:
    name = _weights(place)
    if is_crosscoder(place, CONFIG):
        return True
    return bool(name) and {"w_enc", "w_dec", "threshold"} <= set(tensor_headers(place.folder / name))


def load(place: Place, facts: Mapping[str, Any], device: torch.device | str, dtype: torch.dtype | None) -> SAE:
    """Facts: `hook_name`, `hook_name_out` and `model_name` take the place of config.json's; `repo_id` and `repo_path` say
    them where there is no config.json. Raises FormatError, MissingFact.
    """
    name = _weights(place)
    stated = Stated(CONFIG, read_json(place.folder / CONFIG) if place.has(CONFIG) else {})
    model_name = fact_text(facts, "model_name") or _model(stated.text("model_name"), repo_of(place, facts))
    if stated.text("architecture", "jump_relu") not in ("jump_relu", "jumprelu"):
        raise FormatError(f"architecture in {CONFIG} is {stated.text('architecture')!r:.40}, but must be jump_relu.")
    if is_crosscoder(place, CONFIG):
        return load_crosscoder(place, stated, facts, model_name, device, dtype)
    stored = all_tensors(place.folder / name)
    skip = stored.pop(SKIP, None)
    tensors = renamed(stored, _NAMES, name)
    one_layer = tensors["W_dec"].dim() == 3
    layers = tensors["W_dec"].shape[1] if one_layer else 1
    if one_layer:
        tensors["W_dec"] = upcast({"W_dec": tensors["W_dec"]})["W_dec"].sum(1)
    if skip is not None:
        tensors["W_skip"] = transposed(skip, SKIP)
    d_in, d_sae, d_out = widths(tensors, name)
    if stated.whole("width") != d_sae * layers:  # of a cross-layer transcoder the features of all its files
        stated.agrees("width", d_sae)
    crosses = one_layer or _is_transcoder(stated, place, facts) or skip is not None or d_in != d_out
    architecture = f"jumprelu{'_skip' if skip is not None else ''}{'_transcoder' if crosses else ''}"
    config = SAEConfig(architecture, d_in, d_sae, d_out=d_out, apply_b_dec_to_input=False)
    hold_against(tensors, config, name)
    config = _named(config, stated, place, facts).with_(model_name=model_name)
    if one_layer:
        config = config.with_(metadata=config.metadata | {NOT_AN_AUTOENCODER: ONE_LAYER})
    return assemble(config, tensors, device, dtype)


def _weights(place: Place) -> str:
    """The weights' file: the folder's own, or that of one layer ("params_layer_3", with or without its ending)."""
    found = LAYER_FILE.fullmatch(place.entry)
    if found:
        name = f"params_layer_{found[1]}.safetensors"
        return name if place.has(name) else ""
    return within(place, WEIGHTS)


def _site(place: Place, facts: Mapping[str, Any]) -> str:
    """The collection that the SAE's path is in, "" where it is in none."""
    path = path_of(place, facts)
    found = re.findall(r"(?:^|/)(resid_post|attn_out|mlp_out|transcoder|clt)(?:_all)?(?=/|$)", path)
    return found[-1] if found else ""


def _is_transcoder(stated: Stated, place: Place, facts: Mapping[str, Any]) -> bool:
    kind = stated.text("type") or ("transcoder" if _site(place, facts) in ("transcoder", "clt") else "sae")
    if kind not in ("sae", "transcoder", "clt"):
        raise FormatError(f"type in {CONFIG} is {kind!r:.40}, which is not read here.")
    return kind != "sae"


def _named(config: SAEConfig, stated: Stated, place: Place, facts: Mapping[str, Any]) -> SAEConfig:
    layer = layer_of(path_of(place, facts), facts)
    read, written = (_hf_name(stated, key, layer) for key in ("hf_hook_point_in", "hf_hook_point_out"))
    site = _site(place, facts)
    if not read and site and layer is not None:
        read, written = (f"model.layers.{layer}.{where}" for where in SITES[site])
    hook = fact_text(facts, "hook_name") or _lens_name(read)
    if not hook:
        raise MissingFact(
            f"{place.said} has no {CONFIG}, and its folders do not say its hook point; give hook_name or repo_path.",
            "hook_name",
        )
    crosses = config.architecture != "jumprelu"
    metadata = stated.rest("model_name", "hf_hook_point_in", "hf_hook_point_out", "width", "architecture")
    metadata |= {"hf_hook_name": read} if read else {}
    metadata |= {"hf_hook_name_out": written} if crosses and written else {}
    return config.with_(
        hook_name=hook,
        hook_name_out=(fact_text(facts, "hook_name_out") or _lens_name(written)) if crosses else "",
        metadata=metadata,
    )


def _hf_name(stated: Stated, key: str, layer: int | None) -> str:
    """The authors' name of a hook point; of a cross-layer transcoder "{all}" stands for the layer."""
    name = stated.text(key)
    return name if layer is None else name.replace("{all}", str(layer))


def _lens_name(hf_name: str) -> str:
    found = re.fullmatch(r"(?:model\.)?(?:language_model\.)?layers\.(\d+)\.(.+)", hf_name)
    return f"blocks.{found[1]}.{PLACES[found[2]]}" if found and found[2] in PLACES else hf_name


def _model(said: str, repository: str) -> str:
    """The model as the Hub has it: with google/, without the -v3 of drafts, and no -pt for the smallest."""
    name = said or (repository.replace("gemma-scope-2", "gemma-3") if "gemma-scope-2" in repository else "")
    if not name:
        return ""
    name = (name if name.startswith("google/") else f"google/{Path(name).name}").replace("-v3", "-3")
    return name.replace("-pt", "") if "270m" in name else name
