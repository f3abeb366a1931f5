"""SAEs that are one torch file: Goodfire, DeepSeek R1 (qresearch), the hook_z SAEs of Kissane et al., and Qwen Scope.

goodfire, deepseek_r1   nn.Linear names, acts = relu(x @ We + be), b_dec not subtracted; model and layer in the file's name
connor_rob_hook_z       <stem>.pt beside <stem>_cfg.json, acts = relu((x - b_dec) @ W_enc + b_enc)
qwen_scope              layerL.sae.pt beside config.json, W_enc (d_sae, d_in) and W_dec (d_in, d_sae): transposed;
                        acts = relu of the k largest of x @ W_enc.T + b_enc in each row
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saes.numerics.formats.archives import read_state, read_torch
from saes.numerics.formats.files import FormatError, MissingFact, Place, read_json
from saes.numerics.formats.orient import hold_against, renamed, widths
from saes.numerics.formats.stated import Stated, fact_text, k_of, layer_of, path_of, repo_of
from saes.numerics.formats.weights import assemble
from saes.numerics.sae import SAE, SAEConfig

CONFIG = "config.json"
_PLAIN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
GOODFIRE = {
    "W_enc": "encoder_linear.weight",
    "b_enc": "encoder_linear.bias",
    "W_dec": "decoder_linear.weight",
    "b_dec": "decoder_linear.bias",
}
DEEPSEEK = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight", "b_dec": "decoder.bias"}
OWNERS = {"llama": "meta-llama", "deepseek": "deepseek-ai", "qwen": "Qwen", "gemma": "google"}
QWEN_FILE = re.compile(r"layer(\d+)\.sae(?:\.pt)?")


# -- goodfire, deepseek_r1 ---------------------------------------------------------------------------------------------
def detect_goodfire(place: Place) -> bool:
    """Raises FormatError for a lone torch file that cannot be read."""
    return "encoder_linear.weight" in _keys(place)


def detect_deepseek(place: Place) -> bool:
    return {"encoder.weight", "decoder.bias"} <= _keys(place)


def load_goodfire(place: Place, facts: Mapping[str, Any], device: torch.device | str, dtype: torch.dtype | None) -> SAE:
    """Facts: `hook_name`, `model_name`, `layer` where the file's name does not say them. Raises FormatError."""
    return _linear(place, facts, GOODFIRE, device, dtype)


def load_deepseek(place: Place, facts: Mapping[str, Any], device: torch.device | str, dtype: torch.dtype | None) -> SAE:
    """As `load_goodfire`."""
    return _linear(place, facts, DEEPSEEK, device, dtype)


def _linear(
    place: Place,
    facts: Mapping[str, Any],
    names: Mapping[str, str],
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> SAE:
    file = _lone(place)
    tensors = renamed(read_state(place.folder / file), names, file, flipped=("W_enc", "W_dec"))
    config = _checked("standard", tensors, file, subtracts=False)
    repository = repo_of(place, facts).rpartition("/")[2]
    said = next((text for text in (Path(file).stem, repository) if re.search(r"-SAE-l\d+", text)), "")
    hook = fact_text(facts, "hook_name")
    layer = layer_of(said or file, facts)
    if not hook and layer is None:
        raise MissingFact(f"The name of {file} does not say which layer it is of; give hook_name.", "hook_name")
    config = config.with_(
        hook_name=hook or f"blocks.{layer}.hook_resid_post",
        model_name=fact_text(facts, "model_name") or _model(said.partition("-SAE-l")[0]),
    )
    return assemble(config, tensors, device, dtype)


def _lone(place: Place) -> str:
    """The torch file that is meant: the entry, or the only one of the folder; "" where there is none or there are others."""
    torch_files = [name for name in place.names if name.endswith((".pt", ".pth"))]
    if place.entry:
        return next(
            (name for name in torch_files if name in (place.entry, f"{place.entry}.pt", f"{place.entry}.pth")), ""
        )
    others = [name for name in place.names if name.endswith((".safetensors", ".npz"))]
    return torch_files[0] if len(torch_files) == 1 and not others else ""


def _keys(place: Place) -> set[str]:
    file = _lone(place)
    return {name for name in read_torch(place.folder / file) if isinstance(name, str)} if file else set()


def _model(name: str) -> str:
    """The model on the Hub whose name starts the file's: its owner is known for the families that are published so."""
    owner = next((owner for word, owner in OWNERS.items() if name.lower().startswith(word)), "")
    return f"{owner}/{name}" if owner else name


def _checked(
    architecture: str, tensors: Mapping[str, Tensor], source: str, *, subtracts: bool, k: int | None = None
) -> SAEConfig:
    d_in, d_sae, d_out = widths(tensors, source)
    config = SAEConfig(architecture, d_in, d_sae, d_out=d_out, apply_b_dec_to_input=False, k=k)
    hold_against(tensors, config, source)
    if d_in != d_out:
        raise FormatError(f"{source} reads {d_in} numbers and gives {d_out}, so it is no autoencoder.")
    return config.with_(apply_b_dec_to_input=subtracts)


# -- hook_z ------------------------------------------------------------------------------------------------------------
def detect_hook_z(place: Place) -> bool:
    """Raises FormatError for a config that cannot be read."""
    file = _lone(place)
    config = f"{Path(file).stem}_cfg.json"
    return bool(file) and place.has(config) and {"act_name", "dict_size"} <= set(read_json(place.folder / config))


def load_hook_z(place: Place, facts: Mapping[str, Any], device: torch.device | str, dtype: torch.dtype | None) -> SAE:
    """Facts: `hook_name`, `model_name` take the place of the config's. Raises FormatError."""
    file = _lone(place)
    stated = Stated(f"{Path(file).stem}_cfg.json", read_json(place.folder / f"{Path(file).stem}_cfg.json"))
    tensors = renamed(read_state(place.folder / file), _PLAIN, file)
    config = _checked("standard", tensors, file, subtracts=True)
    stated.agrees("act_size", config.d_in)
    stated.agrees("dict_size", config.d_sae)
    config = config.with_(
        hook_name=fact_text(facts, "hook_name") or stated.text("act_name"),
        model_name=fact_text(facts, "model_name") or stated.text("model_name", "gpt2-small"),
        metadata=stated.rest("act_name", "model_name", "act_size", "dict_size") | {"reshape_activations": "hook_z"},
    )
    return assemble(config, tensors, device, dtype)


# -- qwen_scope --------------------------------------------------------------------------------------------------------
def detect_qwen(place: Place) -> bool:
    return bool(_qwen_file(place))


def load_qwen(place: Place, facts: Mapping[str, Any], device: torch.device | str, dtype: torch.dtype | None) -> SAE:
    """Facts: `repo_id` or `k` where there is no config.json, `model_name`, `hook_name`. Raises FormatError, MissingFact."""
    file = _qwen_file(place)
    tensors = renamed(read_state(place.folder / file), _PLAIN, file, flipped=("W_enc", "W_dec"))
    stated = _qwen_config(place.folder)
    k = _qwen_k(stated, place, facts)
    config = _checked("topk", tensors, file, subtracts=False, k=k)
    stated.agrees("d_model", config.d_in)
    stated.agrees("d_sae", config.d_sae)
    found = QWEN_FILE.fullmatch(file)
    layer = found[1] if found else layer_of(path_of(place, facts), facts)
    site = stated.text("hook_point", "resid_post")
    config = config.with_(
        hook_name=fact_text(facts, "hook_name") or f"blocks.{layer}.hook_{site}",
        model_name=fact_text(facts, "model_name") or stated.text("base_model") or _qwen_model(repo_of(place, facts)),
        metadata=stated.rest("d_model", "d_sae", "k", "base_model", "hook_point")
        | {"hf_hook_name": f"model.layers.{layer}"},
    )
    return assemble(config, tensors, device, dtype)


def _qwen_file(place: Place) -> str:
    files = [name for name in place.names if name.endswith(".pt") and QWEN_FILE.fullmatch(name)]
    if place.entry:
        return next((name for name in files if place.entry in (name, name[: -len(".pt")], name.partition(".")[0])), "")
    return files[0] if len(files) == 1 else ""


def _qwen_config(folder: Path) -> Stated:
    path = folder / CONFIG
    return Stated(CONFIG, read_json(path) if path.is_file() else {})


def _qwen_k(stated: Stated, place: Place, facts: Mapping[str, Any]) -> int:
    found = re.search(r"-L0_(\d+)$", repo_of(place, facts))
    if stated.whole("k") is None and facts.get("k") is None and found:
        return int(found[1])
    return k_of(stated, facts)


def _qwen_model(repository: str) -> str:
    found = re.search(r"SAE-Res-(.+)-W\d+K-L0_\d+$", repository)
    return f"Qwen/{found[1]}" if found else ""
