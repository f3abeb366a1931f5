"""Temporal SAEs as published: latest_ckpt.safetensors (D, b, [E], attn_layers.*) beside conf.yaml.

D (d_sae, d_in) is W_dec, b is b_dec and, where encoder and decoder are not tied, E is W_enc. conf.yaml has the sizes under
`llm` and `sae`; its scaling_factor is what x is multiplied with. The layer is only in the path, and its hook point is
resid_post.
"""

from collections.abc import Mapping
from typing import Any

import torch

from saes.numerics.formats.files import FormatError, MissingFact, Place
from saes.numerics.formats.orient import all_tensors, hold_against, renamed, within
from saes.numerics.formats.stated import Stated, fact_text, layer_of, path_of
from saes.numerics.formats.weights import assemble
from saes.numerics.formats.yaml_files import read_yaml
from saes.numerics.sae import SAE, SAEConfig

CONFIG, WEIGHTS = "conf.yaml", "latest_ckpt.safetensors"
_SIZES = ("n_heads", "n_attn_layers", "bottleneck_factor")


def detect(place: Place) -> bool:
    return bool(within(place, WEIGHTS)) and place.has(CONFIG)


def load(place: Place, facts: Mapping[str, Any], device: torch.device | str, dtype: torch.dtype | None) -> SAE:
    """Facts: `hook_name` or `layer` where the path does not say it, `model_name`. Raises FormatError, MissingFact."""
    whole = Stated(CONFIG, read_yaml(place.folder / CONFIG))
    said = whole.inner("sae")
    stored = all_tensors(place.folder / WEIGHTS)
    names = {"W_dec": "D", "b_dec": "b"} | ({"W_enc": "E"} if "E" in stored else {})
    names |= {name: name for name in stored if name.startswith("attn_layers.")}
    tensors = renamed(stored, names, WEIGHTS)
    if tensors["W_dec"].dim() != 2:
        raise FormatError(f"D in {WEIGHTS} must be a matrix, but has the shape {list(tensors['W_dec'].shape)}.")
    d_sae, d_in = tensors["W_dec"].shape
    whole.inner("llm").agrees("dimin", d_in)
    factor = said.number("exp_factor")
    if factor is not None and int(d_in * factor) != d_sae:
        raise FormatError(f"By {CONFIG} there are {int(d_in * factor)} features, but the weights have {d_sae}.")
    config = SAEConfig("temporal", d_in, d_sae, apply_b_dec_to_input=True, options=_options(said, "E" in stored))
    hold_against(tensors, config, CONFIG)
    hook = fact_text(facts, "hook_name")
    layer = layer_of(path_of(place, facts), facts)
    if not hook and layer is None:
        raise MissingFact(f"The path of {WEIGHTS} does not say which layer it is of; give hook_name.", "hook_name")
    config = config.with_(
        hook_name=hook or f"blocks.{layer}.hook_resid_post", model_name=fact_text(facts, "model_name")
    )
    return assemble(config, tensors, device, dtype)


def _options(said: Stated, untied: bool) -> dict[str, Any]:
    if said.flag("tied_weights", not untied) == untied:
        raise FormatError(f"{WEIGHTS} {'holds' if untied else 'lacks'} E, but tied_weights in {CONFIG} says otherwise.")
    options: dict[str, Any] = {name: size for name in _SIZES if (size := said.whole(name)) is not None}
    return options | {
        "sae_diff_type": said.text("sae_diff_type", "topk"),
        "kval_topk": said.whole("kval_topk"),
        "tied_weights": not untied,
        "activation_normalization_factor": said.number("scaling_factor", 1.0),
    }
