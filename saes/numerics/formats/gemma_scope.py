"""Gemma Scope 1: one params.npz in layer_L/width_W/average_l0_N, and no config. SAEs and transcoders have the same files.

    acts = relu(z) * [z > threshold],  z = x @ W_enc + b_enc;   x_hat = acts @ W_dec + b_dec

Model and hook point are only in the name of the repository (google/gemma-scope-2b-pt-res), the layer only in the path. The
SAEs of embeddings were trained before Gemma scales them by sqrt(d_in): W_enc /= sqrt(d_in), W_dec *= sqrt(d_in) makes them
read, and write, what the model has at hook_embed.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saes.numerics.formats.archives import read_npz
from saes.numerics.formats.files import FormatError, MissingFact, Place
from saes.numerics.formats.orient import hold_against, renamed, widths, within
from saes.numerics.formats.stated import fact_text, layer_of, path_of, repo_of
from saes.numerics.formats.weights import assemble, upcast
from saes.numerics.sae import SAE, SAEConfig

WEIGHTS = "params.npz"
REPOSITORY = re.compile(r"gemma-scope-(2b|9b|27b)-(pt|it)-(res|mlp|att|transcoders)$")
HOOKS = {
    "res": "blocks.{}.hook_resid_post",
    "mlp": "blocks.{}.hook_mlp_out",
    "att": "blocks.{}.attn.hook_z",
    "transcoders": "blocks.{}.ln2.hook_normalized",  # before the norm's gain, unlike in Gemma Scope 2
}
_NAMES = {name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}


def detect(place: Place) -> bool:
    return bool(within(place, WEIGHTS)) and not _path_says_transcoder(place)


def detect_transcoder(place: Place) -> bool:
    """The same files; only what the folders are called tells them apart, as the repository's name does on the Hub."""
    return bool(within(place, WEIGHTS)) and _path_says_transcoder(place)


def load(place: Place, facts: Mapping[str, Any], device: torch.device | str, dtype: torch.dtype | None) -> SAE:
    """Facts: `repo_id`, and `repo_path` or `layer` where the folders do not say it; or else `hook_name`.

    Raises FormatError, or MissingFact when nothing says which hook point the SAE is of.
    """
    tensors = _tensors(place)
    d_in, d_sae, d_out = widths(tensors, WEIGHTS)
    config = SAEConfig("jumprelu_transcoder", d_in, d_sae, d_out=d_out, apply_b_dec_to_input=False)
    hold_against(tensors, config, WEIGHTS)  # what is wrong with the files is said before anything is asked
    config = _named(config, place, facts)
    if config.hook_name == "hook_embed":
        tensors = upcast(tensors)
        tensors["W_enc"] = tensors["W_enc"] / d_in**0.5
        tensors["W_dec"] = tensors["W_dec"] * d_in**0.5
    return assemble(config, tensors, device, dtype)


def _tensors(place: Place) -> dict[str, Tensor]:
    """The five arrays, whichever way their names are spelt: W_enc or w_enc, but not both."""
    stored = read_npz(place.folder / WEIGHTS)
    spelt: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        ours = next((known for known in _NAMES if known.lower() == name.lower()), name)
        if ours in spelt:
            raise FormatError(f"{WEIGHTS} holds both {ours} and {ours.lower()}, so it is not clear which is meant.")
        spelt[ours] = tensor
    return renamed(spelt, _NAMES, WEIGHTS)


def _path_says_transcoder(place: Place) -> bool:
    return any("transcoder" in part.lower() for part in place.folder.parts[-7:])


def _named(config: SAEConfig, place: Place, facts: Mapping[str, Any]) -> SAEConfig:
    """The config with architecture, model and hook points by the facts."""
    repository, hook = repo_of(place, facts), fact_text(facts, "hook_name")
    said = REPOSITORY.search(repository)
    if not hook and not said:
        raise MissingFact(
            f"{WEIGHTS} does not say which model and hook point it is of; give repo_id "
            "(such as google/gemma-scope-2b-pt-res), or hook_name and model_name.",
            *(("hook_name", "model_name") if repository else ("repo_id",)),
        )
    hook = hook or _hook(said[3] if said else "", place, facts)
    out = fact_text(facts, "hook_name_out")
    transcoder = said[3] == "transcoders" if said else bool(out) or hook.endswith("ln2.hook_normalized")
    if transcoder:
        out = out or re.sub(r"^(blocks\.\d+)\..*$", r"\1.hook_mlp_out", hook)
    model = f"gemma-2-{said[1]}" + ("-it" if said[2] == "it" else "") if said else ""
    return config.with_(
        architecture="jumprelu_transcoder" if transcoder else "jumprelu",
        hook_name=hook,
        hook_name_out=out if transcoder else "",
        model_name=fact_text(facts, "model_name") or model,
        metadata={"reshape_activations": "hook_z"} if hook.endswith("attn.hook_z") else {},
    )


def _hook(kind: str, place: Place, facts: Mapping[str, Any]) -> str:
    path = path_of(place, facts)
    if kind == "res" and re.search(r"(^|/)embedding(/|$)", path):
        return "hook_embed"
    layer = layer_of(path, facts)
    if layer is None:
        raise MissingFact(f"The path of {WEIGHTS} does not say its layer; give it as a fact.", "layer")
    return HOOKS[kind].format(layer)
