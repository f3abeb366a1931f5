"""Llama Scope (OpenMOSS 2024) and its continuation for DeepSeek R1: nn.Linear names, inputs scaled by one number.

Training saw x * s_in with s_in = sqrt(d_in) / mean |x|, and the reconstruction is scaled back with s_out:

    z     = (x * s_in) @ W_enc + b_enc
    acts  = z * [z * n > t],  n = |W_dec row|        (n only with `sparsity_include_decoder_norm`)
    x_hat = (acts @ W_dec + b_dec) / s_out

t is exp(log_jumprelu_threshold) for R1. Llama Scope's one jump_relu_threshold is of codes as they weigh in the unscaled
output: t is s_out times it (s_in times, where the decoder's norms do not count).
Folded when loading, exactly: W_enc *= s_in, W_dec and b_dec /= s_out and, as in the authors' own reader, the
decoder's norms: W_dec /= n, W_enc and b_enc *= n, so that codes weigh unit directions. Codes stay in the scaled units.
Where n is 1, as far as the stored type can say it, this is what SAELens reads; it takes no account of other norms or s_out.

Llama Scope says its means in hyperparams.json. The R1 files do not: there `norm_scaling_factor` (s_in) is a fact to give.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saes.numerics.formats.files import FormatError, MissingFact, Place, read_json, tensor_headers
from saes.numerics.formats.orient import all_tensors, hold_against, renamed, require_floats, widths, within
from saes.numerics.formats.stated import Stated, fact_positive, fact_text
from saes.numerics.formats.weights import assemble, fold_decoder_norm, upcast
from saes.numerics.sae import SAE, SAEConfig

HYPERPARAMS, CONFIG, R1_WEIGHTS = "hyperparams.json", "config.json", "sae_weights.safetensors"
CHECKPOINTS = ("final.safetensors", "pruned.safetensors")
LOG_THRESHOLD = "log_jumprelu_threshold"
SAME = 0.01  # by how much a factor that was given may differ from the file's: published ones are rounded
LINEAR = {
    "W_enc": "encoder.weight",
    "b_enc": "encoder.bias",
    "W_dec": "decoder.weight",
    "b_dec": "decoder.bias",
}
R1_MODEL = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
MODEL = "meta-llama/Llama-3.1-8B"


def detect(place: Place) -> bool:
    folder = _root(place)
    return (folder / HYPERPARAMS).is_file() and _checkpoint(folder) is not None


def detect_r1(place: Place) -> bool:
    if not within(place, R1_WEIGHTS) or not place.has(CONFIG):
        return False
    return {"encoder.weight", LOG_THRESHOLD} <= set(tensor_headers(place.folder / R1_WEIGHTS))


def load(place: Place, facts: Mapping[str, Any], device: torch.device | str, dtype: torch.dtype | None) -> SAE:
    """Facts: `model_name`, `hook_name`; `norm_scaling_factor` where hyperparams.json has no means. Raises FormatError."""
    folder = _root(place)
    weights = _checkpoint(folder)
    if weights is None:
        raise FormatError(f"{folder.name}/checkpoints holds neither {' nor '.join(CHECKPOINTS)}.")
    stated = Stated(HYPERPARAMS, read_json(folder / HYPERPARAMS))
    _refuse_others(stated)
    tensors = _read(weights, stated)
    threshold = stated.number("jump_relu_threshold", stated.number("jumprelu_threshold", 0.0)) or 0.0
    tensors["threshold"] = torch.full_like(tensors["b_enc"], threshold, dtype=torch.float32)
    return _scaled(place, tensors, stated, facts, device, dtype, MODEL)


def load_r1(place: Place, facts: Mapping[str, Any], device: torch.device | str, dtype: torch.dtype | None) -> SAE:
    """Facts: `norm_scaling_factor` must be given; `model_name`, `hook_name`. Raises FormatError, MissingFact."""
    stated = Stated(CONFIG, read_json(place.folder / CONFIG))
    _refuse_others(stated)
    tensors = _read(place.folder / R1_WEIGHTS, stated, LOG_THRESHOLD)
    tensors["threshold"] = upcast(tensors)["threshold"].exp()
    return _scaled(place, tensors, stated, facts, device, dtype, R1_MODEL)


def _root(place: Place) -> Path:
    """The SAE's folder, also where the weights in its `checkpoints` were named."""
    return place.folder.parent if place.entry in CHECKPOINTS and place.folder.name == "checkpoints" else place.folder


def _checkpoint(folder: Path) -> Path | None:
    paths = (folder / "checkpoints" / name for name in CHECKPOINTS)
    return next((path for path in paths if path.is_file()), None)


def _refuse_others(stated: Stated) -> None:
    """Options that these SAEs do not have; reading past one would give other numbers."""
    if (kind := stated.text("act_fn", "jumprelu").lower()) != "jumprelu":
        raise FormatError(f"act_fn in {stated.file} is {kind!r:.40}; the SAEs of this format are jumprelu.")
    for option in ("use_glu_encoder", "apply_decoder_bias_to_pre_encoder"):
        if stated.flag(option, False):
            raise FormatError(f"{stated.file} sets {option}, which is not read in this format.")


def _read(path: Path, stated: Stated, threshold: str = "") -> dict[str, Tensor]:
    stored = all_tensors(path)
    require_floats(stored, path.name)
    names = LINEAR | ({"threshold": threshold} if threshold else {})
    if not stated.flag("use_decoder_bias", True) and "decoder.bias" not in stored:
        stored["decoder.bias"] = stored["decoder.weight"].new_zeros(stored["decoder.weight"].shape[0])
    return renamed(stored, names, path.name, flipped=("W_enc", "W_dec"))


def _scaled(
    place: Place,
    tensors: dict[str, Tensor],
    stated: Stated,
    facts: Mapping[str, Any],
    device: torch.device | str,
    dtype: torch.dtype | None,
    model: str,
) -> SAE:
    d_in, d_sae, d_out = widths(tensors, "the weights")
    stated.agrees("d_model", d_in)
    stated.agrees("d_sae", d_sae)
    hook, out = stated.text("hook_point_in"), stated.text("hook_point_out")
    crosses = bool(out) and out != hook
    kind = "jumprelu_transcoder" if crosses else "jumprelu"
    config = SAEConfig(kind, d_in, d_sae, d_out=d_out, apply_b_dec_to_input=False)
    hold_against(tensors, config, stated.file)
    s_in, s_out = _scales(place, stated, facts, d_in, d_out, crosses)
    rounding = torch.finfo(tensors["W_dec"].dtype).eps / 2
    tensors = upcast(tensors)
    by_norm = stated.flag("sparsity_include_decoder_norm", True)
    if stated.file == HYPERPARAMS:
        tensors["threshold"] = tensors["threshold"] * (s_out if by_norm else s_in)
    if by_norm and bool(((tensors["W_dec"].norm(dim=-1) - 1).abs() > rounding).any()):
        threshold = tensors.pop("threshold")
        fold_decoder_norm(tensors)
        tensors["threshold"] = threshold  # it is what z * n is held against, and z is that now
    tensors["W_enc"] = tensors["W_enc"] * s_in
    tensors["W_dec"] = tensors["W_dec"] / s_out
    tensors["b_dec"] = tensors["b_dec"] / s_out
    config = config.with_(
        hook_name=fact_text(facts, "hook_name") or hook,
        hook_name_out=out if crosses else "",
        model_name=fact_text(facts, "model_name") or model,
        metadata=stated.rest("hook_point_in", "hook_point_out", "d_model", "d_sae")
        | {"norm_scaling_factor": "folded into the weights"},
    )
    return assemble(config, tensors, device, dtype)


def _scales(
    place: Place, stated: Stated, facts: Mapping[str, Any], d_in: int, d_out: int, crosses: bool
) -> tuple[float, float]:
    """(s_in, s_out): of the file's means, or of the fact. Raises MissingFact when neither says them."""
    given = fact_positive(facts, "norm_scaling_factor")
    how = stated.text("norm_activation", "dataset-wise")
    if how in ("none", "inference"):
        return 1.0, 1.0
    if how != "dataset-wise":
        raise FormatError(f"norm_activation in {stated.file} is {how!r:.40}, which is not read in this format.")
    means = stated.inner("dataset_average_activation_norm")
    if means.values:
        s_in = math.sqrt(d_in) / means.positive("in")
        if given is not None and abs(given / s_in - 1) > SAME:
            raise FormatError(
                f"norm_scaling_factor {given:g} was given, but by {stated.file} it is {s_in:.6g}; leave it out."
            )
        return s_in, math.sqrt(d_out) / means.positive("out") if crosses else s_in
    if given is None:
        raise MissingFact(
            f"{place.said} does not say by which factor its inputs were scaled; give norm_scaling_factor, which "
            "sae-lens' directory lists for each of these SAEs.",
            "norm_scaling_factor",
        )
    if crosses:
        raise FormatError(f"{place.said} is a transcoder whose output scale nothing says, so it cannot be used.")
    return given, given
