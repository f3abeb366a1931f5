"""circuit-tracer's files: sets of transcoders, one file a layer, and cross-layer transcoders, an encoder and a decoder a layer.

    mwhanna_transcoder   layer_L.safetensors: W_enc (d_sae, d_in) transposed, W_dec (d_sae, d_out), b_enc, b_dec,
                         [threshold: jumprelu], [W_skip (d_out, d_in)]; acts = relu(z), or topk where config.yaml says so
    mntss_clt            W_enc_L.safetensors: W_enc_L (d_sae, d_in), b_enc_L, b_dec_L, [threshold_L];
                         W_dec_L.safetensors: W_dec_L (d_sae, n_layers - L, d_out), to layer L and each one after it

b_dec is never subtracted. Hook points are of config.yaml, or of the published sets where it is missing. Of a cross-layer
transcoder one layer is read: its codes are right, and its decoders are summed, as SAELens does.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saes.numerics.formats.files import FormatError, Place
from saes.numerics.formats.gemma_scope_2 import ONE_LAYER
from saes.numerics.formats.orient import all_tensors, hold_against, renamed, widths
from saes.numerics.formats.stated import NOT_AN_AUTOENCODER, Stated, fact_text, k_of, repo_of
from saes.numerics.formats.weights import assemble, upcast
from saes.numerics.formats.yaml_files import read_yaml
from saes.numerics.sae import SAE, SAEConfig

CONFIG = "config.yaml"
TRAINING = ("wandb-config.yaml", "wanb-config.yaml")  # the second as it is spelt in real repositories
LAYER_FILE = re.compile(r"(?:layer_)?(\d+)(?:\.safetensors)?")
ENCODER_FILE = re.compile(r"(?:W_enc_|layer_)?(\d+)(?:\.safetensors)?")
READ, WRITTEN = "mlp.hook_in", "hook_mlp_out"  # hook points of the published sets
THRESHOLDS = ("threshold", "thresholds", "activation_function.threshold")
_NAMES = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}


# -- transcoder sets ---------------------------------------------------------------------------------------------------
def detect_transcoder(place: Place) -> bool:
    return _layer(place, LAYER_FILE, "layer_{}.safetensors") is not None and any(map(place.has, (CONFIG, *TRAINING)))


def load_transcoder(
    place: Place, facts: Mapping[str, Any], device: torch.device | str, dtype: torch.dtype | None
) -> SAE:
    """Facts: `model_name`, `hook_name`, `hook_name_out` take the place of config.yaml's. Raises FormatError."""
    layer = _layer(place, LAYER_FILE, "layer_{}.safetensors")
    name = f"layer_{layer}.safetensors"
    stated, training = _config(place), _training(place)
    stored = all_tensors(place.folder / name)
    optional = {"threshold": next((key for key in THRESHOLDS if key in stored), ""), "W_skip": "W_skip"}
    names = _NAMES | {ours: theirs for ours, theirs in optional.items() if theirs in stored}
    tensors = renamed(stored, names, name, flipped=("W_enc",))
    d_in, d_sae, d_out = widths(tensors, name)
    for key, size in (("d_model", d_in), ("d_feature", d_sae)):
        training.inner(key).agrees("value", size)
    kind = stated.text("activation", "jumprelu" if "threshold" in tensors else "relu").lower()
    config = SAEConfig(
        _architecture(kind, "threshold" in tensors, "W_skip" in tensors),
        d_in,
        d_sae,
        d_out=d_out,
        apply_b_dec_to_input=False,
        k=k_of(stated, facts) if kind == "topk" else None,
    )
    hold_against(tensors, config, name)
    return assemble(_named(config, layer, stated, place, facts), tensors, device, dtype)


def _architecture(kind: str, threshold: bool, skip: bool) -> str:
    starts = {"relu": "", "topk": "topk_", "jumprelu": "jumprelu_"}
    if kind not in starts or (kind == "jumprelu") != threshold:
        raise FormatError(f"activation {kind!r:.40} {'with' if threshold else 'without'} a threshold is not read here.")
    return f"{starts[kind]}{'skip_' if skip else ''}transcoder"


# -- cross-layer transcoders -------------------------------------------------------------------------------------------
def detect_clt(place: Place) -> bool:
    layer = _layer(place, ENCODER_FILE, "W_enc_{}.safetensors")
    return layer is not None and place.has(f"W_dec_{layer}.safetensors")


def load_clt(place: Place, facts: Mapping[str, Any], device: torch.device | str, dtype: torch.dtype | None) -> SAE:
    """One layer. Facts: `model_name`, `hook_name`, `hook_name_out` take the place of config.yaml's. Raises FormatError."""
    layer = _layer(place, ENCODER_FILE, "W_enc_{}.safetensors")
    encoder, decoder = f"W_enc_{layer}.safetensors", f"W_dec_{layer}.safetensors"
    stated = _config(place)
    stored = all_tensors(place.folder / encoder) | all_tensors(place.folder / decoder)
    names = {
        ours: f"{ours}_{layer}"
        for ours in (*_NAMES, "threshold")
        if ours != "threshold" or f"threshold_{layer}" in stored
    }
    tensors = renamed(stored, names, f"{encoder} with {decoder}", flipped=("W_enc",))
    if tensors["W_dec"].dim() != 3:
        raise FormatError(f"W_dec_{layer} in {decoder} must have three dimensions: features, layers and width.")
    tensors["W_dec"] = _summed(tensors["W_dec"])
    d_in, d_sae, d_out = widths(tensors, encoder)
    architecture = "jumprelu_transcoder" if "threshold" in tensors else "transcoder"
    config = SAEConfig(architecture, d_in, d_sae, d_out=d_out, apply_b_dec_to_input=False)
    hold_against(tensors, config, encoder)
    config = _named(config, layer, stated, place, facts)
    return assemble(config.with_(metadata=config.metadata | {NOT_AN_AUTOENCODER: ONE_LAYER}), tensors, device, dtype)


def _summed(W_dec: Tensor) -> Tensor:
    return upcast({"W_dec": W_dec})["W_dec"].sum(1)


# -- both --------------------------------------------------------------------------------------------------------------
def _layer(place: Place, entry: re.Pattern[str], file: str) -> str | None:
    """The layer's number where its file is there: by the entry, or by the only file of a folder."""
    if place.entry:
        found = entry.fullmatch(place.entry)
        return found[1] if found and place.has(file.format(found[1])) else None
    pattern = re.compile(re.escape(file).replace(r"\{\}", r"(\d+)"))
    layers = [found[1] for name in place.names if (found := pattern.fullmatch(name))]
    return layers[0] if len(layers) == 1 else None


def _config(place: Place) -> Stated:
    return Stated(CONFIG, read_yaml(place.folder / CONFIG) if place.has(CONFIG) else {})


def _training(place: Place) -> Stated:
    """Weights & Biases' record of the training: sizes as {name: {value: size}}."""
    name = next((name for name in TRAINING if place.has(name)), "")
    return Stated(name, read_yaml(place.folder / name) if name else {})


def _named(config: SAEConfig, layer: str | None, stated: Stated, place: Place, facts: Mapping[str, Any]) -> SAEConfig:
    read, written = stated.text("feature_input_hook", READ), stated.text("feature_output_hook", WRITTEN)
    return config.with_(
        hook_name=fact_text(facts, "hook_name") or f"blocks.{layer}.{read}",
        hook_name_out=fact_text(facts, "hook_name_out") or f"blocks.{layer}.{_output(written)}",
        model_name=fact_text(facts, "model_name") or stated.text("model_name") or _qwen3(repo_of(place, facts)),
        metadata=stated.rest("model_name", "feature_input_hook", "feature_output_hook"),
    )


def _output(name: str) -> str:
    """circuit-tracer calls the MLP's output in the residual stream mlp.hook_out, TransformerLens hook_mlp_out."""
    return WRITTEN if name == "mlp.hook_out" else name


def _qwen3(repository: str) -> str:
    """The largest published set has no config.yaml; only its repository's name says the model."""
    found = re.search(r"qwen3-(\d+(?:\.\d+)?)b", repository.lower())
    return f"Qwen/Qwen3-{found[1]}B" if found else ""
