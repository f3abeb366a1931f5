"""sparsify (EleutherAI): cfg.json beside sae.safetensors, in a folder called after the module it is of ("layers.3.mlp").

    z     = (x - b_dec) @ encoder.weight.T + encoder.bias            x as it is with `transcode`
    acts  = the k largest of relu(z) in each row                     `activation: topk`
            relu of the largest of each of k runs of features        `activation: groupmax`
            the k largest |z|, with their signs                      `signed`, in files of before 2025
    x_hat = acts @ W_dec + b_dec [+ x @ W_skip.T]

W_dec is (d_sae, d_in) here, not transposed. `num_latents` 0 means d_in * expansion_factor. Files without the key `transcode`
are of before that option: they subtract b_dec, skip transcoders too. A transcoder, or an SAE with a skip, reads the
module's input and predicts its output; any other SAE is of the module's output.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from saes.numerics.folders import whole_folder
from saes.numerics.formats.files import (
    FormatError,
    MissingFact,
    NotRepresentable,
    Place,
    read_json,
    read_tensors,
    weight_files,
)
from saes.numerics.formats.orient import hold_against, renamed, widths, within
from saes.numerics.formats.stated import Stated, fact_text, k_of, path_of
from saes.numerics.formats.weights import assemble
from saes.numerics.formats.writing import json_of, refuse_extras, refuse_unusable
from saes.numerics.sae import SAE, SAEConfig

CONFIG, WEIGHTS, ROOT = "cfg.json", "sae.safetensors", "config.json"
OURS = "saehub"  # the key of cfg.json under which what the format has no place for is written
_NAMES = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}
# (activation, reads the input and predicts the output, with a skip) -> architecture
ARCHITECTURES = {
    ("topk", False, False): "topk",
    ("topk", True, False): "topk_transcoder",
    ("topk", True, True): "topk_skip_transcoder",
    ("groupmax", False, False): "groupmax",
    ("signed", False, False): "abstopk",
}
MODULE = re.compile(r"(?:^|/)((?:[a-z_]+\.)*(?:layers|h)\.(\d+)(?:\.([a-z_.]+))?)$", re.IGNORECASE)
MLP, ATTENTION = ("mlp", "feed_forward"), ("attention", "attn", "self_attn")
NORM_AFTER = re.compile(r"gemma-?[23]", re.IGNORECASE)  # models whose modules' outputs are not TransformerLens' places


def detect(place: Place) -> bool:
    """Raises FormatError for a cfg.json that cannot be read."""
    if not place.has(CONFIG) or not within(place, WEIGHTS, f"{WEIGHTS}.index.json"):
        return False
    cfg = read_json(place.folder / CONFIG)
    return "d_in" in cfg and ("k" in cfg or "expansion_factor" in cfg)


def load(place: Place, facts: Mapping[str, Any], device: torch.device | str, dtype: torch.dtype | None) -> SAE:
    """Facts: `hook_name` (and `hook_name_out`) where the folder's name is not the module's, `model_name`, `k`.

    Raises FormatError, MissingFact.
    """
    cfg = Stated(CONFIG, read_json(place.folder / CONFIG))
    stored = _stored(place.folder)
    skip = stored.pop("W_skip", None)
    tensors = renamed(stored, _NAMES, WEIGHTS, flipped=("W_enc",))
    if skip is not None:
        tensors["W_skip"] = skip
    d_in, d_sae, d_out = widths(tensors, WEIGHTS)
    cfg.agrees("d_in", d_in)
    _check_latents(cfg, d_in, d_sae)
    if cfg.flag("skip_connection", skip is not None) != (skip is not None):
        held = "holds a W_skip" if skip is not None else "holds no W_skip"
        raise FormatError(f"{WEIGHTS} {held}, but skip_connection in {CONFIG} says the opposite.")
    transcode = cfg.flag("transcode", False)
    crosses = transcode or skip is not None
    config = SAEConfig(
        _architecture(cfg, crosses, skip is not None),
        d_in,
        d_sae,
        d_out=d_out,
        apply_b_dec_to_input=not transcode,
        k=k_of(cfg, facts),
    )
    hold_against(tensors, config, CONFIG)
    return assemble(_named(config, cfg, place, facts, crosses), tensors, device, dtype)


def _stored(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, header in weight_files(folder, WEIGHTS).items():
        tensors |= read_tensors(folder / name, header)
    return tensors


def _check_latents(cfg: Stated, d_in: int, d_sae: int) -> None:
    said = cfg.whole("num_latents") or 0
    factor = cfg.number("expansion_factor")
    wanted = said or (round(d_in * factor) if factor else d_sae)
    if wanted != d_sae:
        raise FormatError(
            f"By {CONFIG} there are {wanted} latents, but the weights have {d_sae}; one of the two is wrong."
        )


def _architecture(cfg: Stated, crosses: bool, skip: bool) -> str:
    activation = "signed" if cfg.flag("signed", False) else cfg.text("activation", "topk")
    found = ARCHITECTURES.get((activation, crosses, skip))
    if found is None:
        what = " with a skip connection" if skip else " of a transcoder" if crosses else ""
        raise FormatError(f"The activation {activation!r:.40}{what} in {CONFIG} is not read here.")
    return found


# -- names -------------------------------------------------------------------------------------------------------------
def _named(config: SAEConfig, cfg: Stated, place: Place, facts: Mapping[str, Any], crosses: bool) -> SAEConfig:
    """The config with model and hook points: by the facts, by what was written here, by the folder and the run's config."""
    own, root = cfg.inner(OURS), _root(place)
    model = fact_text(facts, "model_name") or own.text("model_name") or root.text("model")
    hook, out = fact_text(facts, "hook_name"), fact_text(facts, "hook_name_out")
    if own.values:
        hook, out = hook or own.text("hook_name"), out or own.text("hook_name_out")
        return config.with_(hook_name=hook, hook_name_out=out, model_name=model, metadata=own.inner("metadata").values)
    path = _module(place, facts, root)
    if not path and not hook:
        raise MissingFact(
            f"The folder {place.folder.name} is not called after a module of the model (such as layers.3.mlp), so it does "
            "not say where this SAE is from; give hook_name.",
            "hook_name",
        )
    metadata = cfg.rest("d_in", "k", "num_latents")
    if path:
        metadata["hf_hook_name"] = f"{path}.{'input' if crosses else 'output'}"
        hook = hook or _lens_name(path, model, "in" if crosses else "out")
    if crosses:
        out = out or (_lens_name(path, model, "out") if path else "")
    return config.with_(hook_name=hook, hook_name_out=out if crosses else "", model_name=model, metadata=metadata)


def _root(place: Place) -> Stated:
    """The run's config.json, in the folder above; it is not needed, so one that is not readable says nothing."""
    path = place.folder.parent / ROOT
    try:
        return Stated(ROOT, read_json(path) if path.is_file() else {})
    except FormatError:
        return Stated(ROOT, {})


def _module(place: Place, facts: Mapping[str, Any], root: Stated) -> str:
    """The module's path without its prefix ("layers.3.mlp"), "" where no name says it."""
    path = path_of(place._replace(entry=""), facts)
    if found := MODULE.search(path):
        return found[1]
    name = path.rpartition("/")[2]
    hooks = root.values.get("hookpoints")
    return name if name == "embed_tokens" or (isinstance(hooks, list) and name in hooks) else ""


def _lens_name(path: str, model: str, side: str) -> str:
    """TransformerLens' name of a module's input or output, or where it has none for it the module's own."""
    if path == "embed_tokens" and side == "out":
        return "hook_embed"
    found = MODULE.search(path)
    place = _lens_place(found[3] or "", model, side) if found else ""
    return f"blocks.{found[2]}.{place}" if found and place else f"{path}.{side}put"


def _lens_place(module: str, model: str, side: str) -> str:
    if not module:
        return "hook_resid_post" if side == "out" else "hook_resid_pre"
    if module in MLP and side == "in":
        return "mlp.hook_in"
    if side == "in" or NORM_AFTER.search(model):
        return ""
    return "hook_mlp_out" if module in MLP else "hook_attn_out" if module in ATTENTION else ""


# -- writing -----------------------------------------------------------------------------------------------------------
def save(sae: SAE, folder: Path) -> None:
    """Write an SAE so that sparsify's SparseCoder.load_from_disk reads it. The folder appears whole or not at all.

    Raises NotRepresentable, naming what the format cannot hold; FolderError when the folder cannot be written.
    """
    config = sae.config
    activation, _crosses, skip = _kind_of(config)
    tensors = {theirs: sae.tensor(ours).detach().cpu() for ours, theirs in _NAMES.items()}
    tensors["encoder.weight"] = tensors["encoder.weight"].t()
    if skip:
        tensors["W_skip"] = sae.tensor("W_skip").detach().cpu()
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    refuse_unusable(tensors)
    cfg = {
        "activation": activation,
        "expansion_factor": max(1, config.d_sae // config.d_in),
        "normalize_decoder": False,  # of training; the rows are as they are
        "num_latents": config.d_sae,
        "k": config.k,
        "multi_topk": False,
        "skip_connection": skip,
        "transcode": not config.apply_b_dec_to_input,
        "d_in": config.d_in,
        OURS: {
            "model_name": config.model_name,
            "hook_name": config.hook_name,
            "hook_name_out": config.hook_name_out,
            "metadata": config.metadata,
        },
    }
    text = json_of(cfg)
    with whole_folder(folder, replaces=(CONFIG, WEIGHTS)) as partial:
        save_file(tensors, partial / WEIGHTS)
        (partial / CONFIG).write_text(text, encoding="utf-8")


def _kind_of(config: SAEConfig) -> tuple[str, bool, bool]:
    """(activation, transcoder, skip) of an architecture. Raises NotRepresentable."""
    refuse_extras(config, "sparsify")
    kind = next((kind for kind, name in ARCHITECTURES.items() if name == config.architecture), None)
    if kind is None or kind[0] == "signed":
        raise NotRepresentable(f"sparsify has no architecture {config.architecture!r}.")
    if config.d_out != config.d_in:
        raise NotRepresentable("sparsify has no SAE with d_out other than d_in.")
    _activation, crosses, skip = kind
    if not config.apply_b_dec_to_input and not crosses:
        raise NotRepresentable(
            "sparsify subtracts b_dec from the input of every SAE that is no transcoder; this one does not."
        )
    if config.apply_b_dec_to_input and crosses and not skip:
        raise NotRepresentable("sparsify does not subtract b_dec from the input of a transcoder; this one does.")
    return kind
