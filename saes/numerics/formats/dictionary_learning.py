"""dictionary_learning: ae.pt (a state dict of torch.save) beside config.json, whose trainer.dict_class says what it is.

Its classes and what they compute, xc = x - b_dec where b_dec is subtracted:

    AutoEncoder              relu(xc @ We + be)                      subtracted (its b_dec is called `bias`)
    AutoEncoderNew           relu(x @ We + be)                       not
    GatedAutoEncoder         [pi + gate_bias > 0] * relu(exp(r_mag) * pi + mag_bias),  pi = xc @ We
    JumpReluAutoEncoder      relu(z) * [z > threshold]               not
    AutoEncoderTopK          the k largest of relu(z) in each row    subtracted
    BatchTopKSAE, MatryoshkaBatchTopKSAE   relu(z) * [z > threshold] subtracted; one threshold for all features

The package's own loader rescales the decoder of an AutoEncoder to unit rows, and its codes with it; the numbers here are
those of the stored weights, as in SAELens. A threshold of -1 was never estimated and means plain relu.
"""

import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saes.numerics.folders import whole_folder
from saes.numerics.formats.archives import read_torch
from saes.numerics.formats.files import FormatError, MissingFact, NotRepresentable, Place, read_json
from saes.numerics.formats.orient import hold_against, renamed, spread, widths, within
from saes.numerics.formats.stated import Stated, fact_text, fact_whole, k_of, layer_of, path_of
from saes.numerics.formats.weights import assemble
from saes.numerics.formats.writing import json_of, refuse_extras, refuse_unusable
from saes.numerics.sae import SAE, SAEConfig

CONFIG, WEIGHTS = "config.json", "ae.pt"
STEP_FILE = re.compile(r"ae_\d+\.pt")  # of a folder `checkpoints` below the config
OURS = "saehub"  # the key of config.json under which what the format has no place for is written
_LINEAR = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight"}
_PLAIN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
# dict_class -> (architecture, b_dec is subtracted, our names -> its names); matrices of nn.Linear are transposed.
CLASSES: dict[str, tuple[str, bool, dict[str, str]]] = {
    "AutoEncoder": ("standard", True, _LINEAR | {"b_dec": "bias"}),
    "AutoEncoderNew": ("standard", False, _LINEAR | {"b_dec": "decoder.bias"}),
    "GatedAutoEncoder": (
        "gated",
        True,
        {
            "W_enc": "encoder.weight",
            "W_dec": "decoder.weight",
            "b_dec": "decoder_bias",
            "b_gate": "gate_bias",
            "b_mag": "mag_bias",
            "r_mag": "r_mag",
        },
    ),
    "JumpReluAutoEncoder": ("jumprelu", False, _PLAIN | {"threshold": "threshold"}),
    "AutoEncoderTopK": ("topk", True, _LINEAR | {"b_dec": "b_dec"}),
    "BatchTopKSAE": ("jumprelu", True, _LINEAR | {"b_dec": "b_dec", "threshold": "threshold"}),
    "MatryoshkaBatchTopKSAE": ("jumprelu", True, _PLAIN | {"threshold": "threshold"}),
}
BATCH_TOPK = {"BatchTopKSAE": "batchtopk", "MatryoshkaBatchTopKSAE": "matryoshka_batchtopk"}
SITES = {"resid_post": "hook_resid_post", "resid": "hook_resid_post", "mlp_out": "hook_mlp_out", "mlp": "hook_mlp_out"}
SITES |= {"attn_out": "hook_attn_out", "attn": "hook_attn_out", "resid_pre": "hook_resid_pre"}


def detect(place: Place) -> bool:
    """Raises FormatError for a config.json beside ae.pt that cannot be read."""
    config = _config_path(place)
    if config is None:
        return False
    trainer = read_json(config).get("trainer")
    return isinstance(trainer, dict) and "dict_class" in trainer


def load(place: Place, facts: Mapping[str, Any], device: torch.device | str, dtype: torch.dtype | None) -> SAE:
    """Facts: `model_name`, `hook_name`, `layer`, `k` where neither file has it, `apply_b_dec_to_input` of a JumpReLU SAE.

    Raises FormatError, MissingFact.
    """
    config = _config_path(place)
    if config is None:
        raise FormatError(f"{CONFIG} is missing.")
    whole = Stated(CONFIG, read_json(config))
    trainer = whole.inner("trainer")
    kind = trainer.text("dict_class")
    if kind not in CLASSES:
        raise FormatError(f"dict_class in {CONFIG} is {kind!r:.60}; those read here are {', '.join(CLASSES)}.")
    name = place.entry or WEIGHTS
    tensors, extra = _tensors(place.folder / name, kind)
    d_in, d_sae, _d_out = widths(tensors, name)
    trainer.agrees("activation_dim", d_in)
    trainer.agrees("dict_size", d_sae)
    architecture, subtracts, _names = CLASSES[kind]
    if kind == "JumpReluAutoEncoder":  # its class can, but does not store whether it does
        subtracts = Stated("the facts", facts).flag("apply_b_dec_to_input", subtracts)
    if kind in BATCH_TOPK:
        tensors["threshold"] = spread(tensors["threshold"], d_sae, "threshold", name).clamp_min(0)
    shape = SAEConfig(architecture, d_in, d_sae, apply_b_dec_to_input=subtracts)
    hold_against(tensors, shape, name)
    config_ = shape.with_(
        k=_k(trainer, extra, facts) if architecture == "topk" else None,
        hook_name=_hook(whole, place, facts),
        model_name=fact_text(facts, "model_name") or trainer.text("lm_name"),
        metadata=_metadata(whole, kind, extra, d_sae),
    )
    return assemble(config_, tensors, device, dtype)


def _config_path(place: Place) -> Path | None:
    if STEP_FILE.fullmatch(place.entry) and place.has(place.entry):
        path = place.folder.parent / CONFIG
        return path if path.is_file() else None
    return place.folder / CONFIG if within(place, WEIGHTS) and place.has(CONFIG) else None


def _tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The class's tensors under our names, and what else its state dict holds: k, threshold, group_sizes."""
    state: Any = read_torch(path)
    if "ae" in state and "optimizer" in state:
        raise FormatError(
            f"{path.name} is the backup of a training, not an SAE: its biases are not yet in the units of the activations; "
            f"take the {WEIGHTS} that was written when the training ended."
        )
    if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()):
        raise FormatError(f"{path.name} must hold tensors by name, but holds {', '.join(map(str, state))[:120]}.")
    _architecture, _subtracts, names = CLASSES[kind]
    extra = {name: state[name] for name in ("k", "threshold", "group_sizes") if name in state}
    kept = {name: tensor for name, tensor in state.items() if name not in extra or name in names.values()}
    flipped = [ours for ours, theirs in names.items() if theirs.endswith(".weight")]
    return renamed(kept, names, path.name, flipped=flipped), extra


def _k(trainer: Stated, extra: Mapping[str, Tensor], facts: Mapping[str, Any]) -> int:
    if "k" not in extra:
        return k_of(trainer, facts)
    if extra["k"].numel() != 1 or extra["k"].is_floating_point():
        raise FormatError(f"k in {WEIGHTS} must be one whole number.")
    k = int(extra["k"])
    trainer.agrees("k", k)
    if fact_whole(facts, "k") not in (None, k):
        raise FormatError(f"{WEIGHTS} says k {k}, but {facts['k']} was given; leave k out to use the file's.")
    return k


def _hook(whole: Stated, place: Place, facts: Mapping[str, Any]) -> str:
    """The hook point by submodule_name ("resid_post_layer_3", or a name of our own); resid_post where only a layer is said."""
    if given := fact_text(facts, "hook_name"):
        return given
    trainer = whole.inner("trainer")
    said = trainer.text("submodule_name") or next(iter(re.findall(r"[a-z_]+_layer_\d+", path_of(place, facts))), "")
    found = re.fullmatch(r"([a-z_]+)_layer_(\d+)", said)
    if found and found[1] in SITES:
        return f"blocks.{found[2]}.{SITES[found[1]]}"
    if said:
        return said
    if OURS in whole.values:
        return ""  # it had none when it was written
    layer = trainer.whole("layer")
    layer = layer_of(path_of(place, facts), facts) if layer is None else layer
    if layer is None:
        raise MissingFact(f"{CONFIG} does not say which layer this SAE is of; give hook_name.", "hook_name")
    return f"blocks.{layer}.hook_resid_post"


def _metadata(whole: Stated, kind: str, extra: Mapping[str, Tensor], d_sae: int) -> dict[str, Any]:
    """What was written here as it was; else the config, the class, and of BatchTopK its training, under SAELens' names."""
    if OURS in whole.values:
        return dict(whole.inner(OURS).values)
    metadata = whole.rest() | {"dict_class": kind}
    if "threshold" in extra and extra["threshold"].numel() == 1:
        metadata["stored_threshold"] = float(extra["threshold"])
    if kind in BATCH_TOPK:
        details: dict[str, Any] = {"k": int(extra["k"])} if "k" in extra else {}
        if "group_sizes" in extra:
            sizes = [int(size) for size in extra["group_sizes"].reshape(-1)]
            if sum(sizes) != d_sae or min(sizes) < 1:
                raise FormatError(f"group_sizes in {WEIGHTS} add up to {sum(sizes)}, but there are {d_sae} features.")
            details["matryoshka_widths"] = [sum(sizes[: n + 1]) for n in range(len(sizes))]
        metadata |= {"training_architecture": BATCH_TOPK[kind], "training_architecture_details": details}
    return metadata


# -- writing -----------------------------------------------------------------------------------------------------------
def save(sae: SAE, folder: Path) -> None:
    """Write an SAE so that dictionary_learning's `load_dictionary` reads it. The folder appears whole or not at all.

    Raises NotRepresentable, naming what the format cannot hold; FolderError when the folder cannot be written.
    """
    config, kind = sae.config, _class_of(sae)
    state: dict[str, Tensor] = {}
    for ours, theirs in CLASSES[kind][2].items():
        tensor = sae.tensor(ours).detach().cpu()
        state[theirs] = (tensor.t() if theirs.endswith(".weight") else tensor).contiguous().clone()
    state |= _scalars(sae, kind)
    refuse_unusable(state)
    said = config.metadata.get("trainer")
    layer = re.match(r"blocks\.(\d+)\.", config.hook_name)
    trainer = (said if isinstance(said, dict) else {}) | {
        "dict_class": kind,
        "activation_dim": config.d_in,
        "dict_size": config.d_sae,
        "lm_name": config.model_name,
        "submodule_name": _submodule(config.hook_name),
        "layer": int(layer[1]) if layer else None,
    }
    if "k" in state:
        trainer["k"] = int(state["k"])
    buffer = config.metadata.get("buffer")
    whole = {"trainer": trainer, "buffer": buffer if isinstance(buffer, dict) else {}, OURS: config.metadata}
    text = json_of(whole)
    with whole_folder(folder, replaces=(CONFIG, WEIGHTS)) as partial:
        torch.save(state, partial / WEIGHTS)
        (partial / CONFIG).write_text(text, encoding="utf-8")


def _class_of(sae: SAE) -> str:
    """The dict_class that computes what this SAE does. Raises NotRepresentable."""
    config = sae.config
    refuse_extras(config, "dictionary_learning")
    if config.d_out != config.d_in:
        raise NotRepresentable("dictionary_learning has no SAE with d_out other than d_in.")
    kinds = [kind for kind, (name, _subtracts, _) in CLASSES.items() if name == config.architecture]
    if not kinds:
        raise NotRepresentable(f"dictionary_learning has no class for the architecture {config.architecture!r}.")
    kinds = [kind for kind in kinds if CLASSES[kind][1] == config.apply_b_dec_to_input]
    if not kinds:
        how = "does not subtract" if config.apply_b_dec_to_input else "always subtracts"
        raise NotRepresentable(
            f"dictionary_learning {how} b_dec in a {config.architecture} SAE; this one is the other way."
        )
    if kinds[0] not in BATCH_TOPK:
        return kinds[0]
    threshold = sae.tensor("threshold")
    if bool((threshold != threshold[0]).any()):
        raise NotRepresentable("dictionary_learning has one threshold for all features where b_dec is subtracted.")
    if type(_details(config).get("k")) is not int:
        raise NotRepresentable(
            "dictionary_learning stores a whole number k with a BatchTopK SAE, and this one has none."
        )
    return kinds[1] if _details(config).get("matryoshka_widths") else kinds[0]


def _details(config: SAEConfig) -> dict[str, Any]:
    details = config.metadata.get("training_architecture_details")
    return details if isinstance(details, dict) else {}


def _scalars(sae: SAE, kind: str) -> dict[str, Tensor]:
    """k, threshold and group_sizes, for the classes that keep them in the state dict."""
    if kind == "AutoEncoderTopK":
        threshold = sae.config.metadata.get("stored_threshold", -1.0)
        return {"k": torch.tensor(sae.config.k, dtype=torch.int), "threshold": torch.tensor(float(threshold))}
    if kind not in BATCH_TOPK:
        return {}
    details = _details(sae.config)
    scalars = {
        "k": torch.tensor(details["k"], dtype=torch.int),
        "threshold": sae.tensor("threshold")[0].detach().cpu().clone(),
    }
    ends = details.get("matryoshka_widths")
    if ends:
        scalars["group_sizes"] = torch.tensor([end - start for start, end in pairwise([0, *ends])])
    return scalars


def _submodule(hook_name: str) -> str:
    """The package's name of a hook point where it has one, and the hook point's own otherwise."""
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook_name)
    site = next((name for name, ours in SITES.items() if found and ours == found[2]), "")
    return f"{site}_layer_{found[1]}" if found and site else hook_name
