"""Checkpoints of SAELens 6 in training: the files of `saelens`, and beside them what training needs to go on.

trainer_state.pt (optimizer, a pickle) is never opened. What was still to be folded into the weights is folded here:

- activation_scaler.json `scaling_factor` c: training saw x * c, so W_enc *= c, W_dec /= c, b_dec /= c. Codes are those
  of training.
- activation_whitening.safetensors: training saw (x - mean) @ M.
- `rescale_acts_by_decoder_norm`, as in `saelens`.

BatchTopK and Matryoshka BatchTopK load as `batchtopk`, whose codes depend on the whole batch, with the threshold that
training learned so far; `for_inference()` gives the SAE to use.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from saes.numerics.formats.files import FormatError, Place, TensorInfo, read_json, read_tensors, tensor_headers
from saes.numerics.formats.saelens import config_of, finished, folded_scale, is_training, rescales
from saes.numerics.formats.saelens_cfg import (
    CONFIG,
    has_sae,
    is_mistudio,
    major_version,
    positive_number,
    read_cfg,
    read_weights,
    require_shape,
    weight_headers,
)
from saes.numerics.formats.weights import check_tensors, fold_decoder_norm, fold_whitening, upcast
from saes.numerics.sae import SAE, SAEConfig

SCALER, WHITENING = "activation_scaler.json", "activation_whitening.safetensors"
LEARNED = "topk_threshold"  # one float64 number


def detect(place: Place) -> bool:
    """Whether a folder holds a checkpoint of SAELens 6 or later."""
    if not has_sae(place):
        return False
    cfg = read_cfg(place)
    return not is_mistudio(cfg) and major_version(cfg) >= 6 and is_training(place, cfg)


def load(place: Place, facts: Mapping[str, Any], device: torch.device | str, dtype: torch.dtype | None) -> SAE:
    """Read an SAE of this format; facts as for `saelens`. Raises FormatError or SAEError, each with one sentence."""
    cfg = read_cfg(place)
    config = config_of(cfg, facts)
    files, headers = weight_headers(place.folder)
    check_tensors(_with_threshold(headers, config), config, CONFIG)
    tensors = read_weights(place.folder, files)
    learned = tensors.pop(LEARNED, None)
    factor = _scaling_factor(place, config, facts)
    if factor is not None:
        config = folded_scale(config, tensors, factor)
        if learned is not None and rescales(cfg):
            learned = learned / factor  # it is compared with z * |W_dec row|, and the rows were just divided
    if rescales(cfg):
        tensors = upcast(tensors)
        fold_decoder_norm(tensors)
    if learned is not None:
        tensors["threshold"] = torch.full((config.d_sae,), float(learned), dtype=tensors["b_enc"].dtype)
    return finished(place, _whitened(place, config, tensors), tensors, device, dtype)


def _with_threshold(headers: Mapping[str, TensorInfo], config: SAEConfig) -> dict[str, TensorInfo]:
    """The headers as if the one learned threshold were stored for every feature, which is how it is used."""
    if config.architecture != "batchtopk" or LEARNED not in headers:
        return dict(headers)
    require_shape(headers, LEARNED, ())
    rest = {name: info for name, info in headers.items() if name != LEARNED}
    return rest | {"threshold": TensorInfo(headers[LEARNED].dtype, (config.d_sae,))}


def _scaling_factor(place: Place, config: SAEConfig, facts: Mapping[str, Any]) -> float | None:
    """The factor that is not in the weights yet: of the scaler's file, else of the facts where the config needs one."""
    said = read_json(place.folder / SCALER).get("scaling_factor") if place.has(SCALER) else None
    if said is not None:
        return positive_number(f"scaling_factor in {SCALER}", said)
    fact = facts.get("norm_scaling_factor")
    if fact is None or config.normalize_activations != "expected_average_only_in":
        return None
    return positive_number("norm_scaling_factor", fact)


def _whitened(place: Place, config: SAEConfig, tensors: dict[str, Tensor]) -> SAEConfig:
    """Fold whitening that training still did outside of the weights; the config that fits them then."""
    if not place.has(SCALER) or not read_json(place.folder / SCALER).get("has_whitening"):
        return config
    if config.architecture in ("matching_pursuit", "temporal"):
        raise FormatError(f"{WHITENING} cannot be folded into a {config.architecture} SAE.")
    path = place.folder / WHITENING
    headers, d_in = tensor_headers(path), config.d_in
    for name, shape in {"mean": (d_in,), "matrix": (d_in, d_in), "inverse_matrix": (d_in, d_in)}.items():
        if name not in headers:
            raise FormatError(f"{WHITENING} lacks {name}.")
        require_shape(headers, name, shape)
    tensors |= upcast(tensors)
    fold_whitening(tensors, read_tensors(path, headers), config.apply_b_dec_to_input)
    return replace(config, normalize_activations="none")
