"""Gemma Scope 2's weakly causal crosscoders: params_layer_0.safetensors and so on, one for each of a few layers.

    acts_l = relu(z_l) * [z_l > threshold_l],  z_l = x_l @ w_enc_l + b_enc_l        (n, m) for each layer l
    y_t    = sum over l of acts_l @ w_dec_l[:, t] + b_dec_t                         w_dec_l (m, layers, d)

A feature reads one layer and writes to that one and later ones. That it writes nothing to earlier ones is a matter of its
weights, not of the equation, so all of w_dec is read. `width` in config.json counts the features of all layers. b_dec is not
subtracted: the authors folded that, and each layer's scale, after training.

Source: the technical report of Gemma Scope 2 (sections 2.6, 3.1 and 3.2) and the class of several layers in its tutorial.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saes.numerics.formats.files import FormatError, MissingFact, Place, read_json
from saes.numerics.formats.orient import all_tensors, hold_against, renamed
from saes.numerics.formats.stated import NOT_AN_AUTOENCODER, Stated, path_of
from saes.numerics.formats.weights import assemble
from saes.numerics.sae import SAE, SAEConfig

LAYER_FILE = re.compile(r"params_layer_(\d+)(?:\.safetensors)?")
FOLDER = re.compile(r"(?:^|/)crosscoder/layer((?:_\d+)+)_[^/]*")
SEVERAL_LAYERS = re.compile(r"\{(\d+(?:, ?\d+)*)\}")
RESIDUAL = "model.layers.{}.output"
SEVERAL_PLACES = (
    "A crosscoder reads the residual stream of several layers at once, side by side; it cannot be run on, steer, or be "
    "trained from the activations of a single hook point."
)
_NAMES = {"W_enc": "w_enc", "W_dec": "w_dec", "b_enc": "b_enc", "b_dec": "b_dec", "threshold": "threshold"}


def is_crosscoder(place: Place, config: str) -> bool:
    """Whether the place's folder is one: by its config, or by its own name where it has none."""
    if not any(map(LAYER_FILE.fullmatch, place.names)):
        return False
    if place.has(config):
        return read_json(place.folder / config).get("type") == "crosscoder"
    return bool(FOLDER.search(path_of(place._replace(entry=""), {})))


def load_crosscoder(
    place: Place, stated: Stated, facts: Mapping[str, Any], model_name: str, device: torch.device | str,
    dtype: torch.dtype | None,
) -> SAE:  # fmt: skip
    """All layers of it. Raises FormatError, MissingFact."""
    if place.entry:
        raise FormatError(
            f"{place.entry} is one layer of a crosscoder, whose outputs take all of its files: choose its folder."
        )
    files = _files(place)
    hooks = _hook_points(stated, place, facts)
    layers = [renamed(all_tensors(place.folder / name), _NAMES, name) for name in files]
    _require_alike(layers, files, len(hooks), stated.file)
    d, m = layers[0]["W_enc"].shape
    stated.agrees("width", m * len(files))
    tensors = {name: torch.stack([one[name] for one in layers]) for name in _NAMES}
    config = SAEConfig(
        "causal_crosscoder",
        d_in=len(files) * d,
        d_sae=len(files) * m,
        model_name=model_name,
        apply_b_dec_to_input=False,
        options={"hooks": len(files), "activation": "jumprelu"},
        metadata=stated.rest("model_name", "hf_hook_point_in", "hf_hook_point_out", "width", "architecture")
        | {NOT_AN_AUTOENCODER: SEVERAL_PLACES, "hook_points": [lens_name for lens_name, _ in hooks]}
        | {"hf_hook_points": [name for _, name in hooks]},
    )
    hold_against(tensors, config, files[0])
    return assemble(config, tensors, device, dtype)


def _files(place: Place) -> list[str]:
    """params_layer_0 to the last, in order. Raises FormatError when one between them is missing."""
    numbers = sorted(int(found[1]) for name in place.names if (found := LAYER_FILE.fullmatch(name)))
    missing = sorted(set(range(numbers[-1] + 1)) - set(numbers))
    if missing:
        raise FormatError(f"params_layer_{missing[0]}.safetensors of this crosscoder is missing.")
    return [f"params_layer_{number}.safetensors" for number in numbers]


def _hook_points(stated: Stated, place: Place, facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(TransformerLens' name, the authors' name) of each layer's place, off config.json or the folder's name."""
    read, written = stated.text("hf_hook_point_in"), stated.text("hf_hook_point_out")
    if written and written != read:
        raise FormatError(
            f"{stated.file} of this crosscoder reads {read} but writes {written}, which is not read here."
        )
    in_config, in_path = SEVERAL_LAYERS.search(read), FOLDER.search(path_of(place, facts))
    if read and not in_config:
        raise FormatError(f"hf_hook_point_in in {stated.file} must name several layers, but is {read!r:.60}.")
    if not in_config and not in_path:
        raise MissingFact(
            f"{place.said} has no config.json, and its folder does not say which layers it reads; give repo_path.",
            "repo_path",
        )
    if in_config:
        layers, name = in_config[1].split(","), SEVERAL_LAYERS.sub("{}", read)
    else:
        layers, name = in_path[1].split("_")[1:], RESIDUAL  # type: ignore[index]
    numbers = [int(layer) for layer in layers]
    lens_name = "blocks.{}.hook_resid_post" if name == RESIDUAL else name
    return [(lens_name.format(number), name.format(number)) for number in numbers]


def _require_alike(layers: list[dict[str, Tensor]], files: list[str], hooks: int, config: str) -> None:
    """Raises FormatError unless every file has the same shapes, and there are as many as layers are named."""
    first = {name: tensor.shape for name, tensor in layers[0].items()}
    if len(first["W_enc"]) != 2 or not all(first["W_enc"]):
        raise FormatError(f"w_enc in {files[0]} must be a matrix, but has the shape {list(first['W_enc'])}.")
    if len(files) != hooks:
        raise FormatError(f"{config} or its folder's name says {hooks} layers, but there are {len(files)} files.")
    for file, tensors in zip(files, layers, strict=True):
        for name, tensor in tensors.items():
            if tensor.shape != first[name] or tensor.dtype != layers[0][name].dtype:
                raise FormatError(
                    f"{_NAMES[name]} in {file} has the shape {list(tensor.shape)}, in {files[0]} {list(first[name])}."
                )
