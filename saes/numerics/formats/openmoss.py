"""OpenMOSS (lm_saes 2, llamascopium): config.json beside sae_weights.safetensors. SAEs, transcoders, crosscoders, CLTs.

    x'    = x * s_in                                  s = sqrt(d_model) / mean |x| of a hook point (dataset-wise), or of the
    z     = x' @ W_E + b_E                            row (token-wise), or 1 (inference: folded before)
            [* sigmoid(x' @ W_E_glu + b_E_glu)]
    acts  = act(z * n) / n,   n = |W_D row|           n = 1 without `sparsity_include_decoder_norm`
    x_hat = (acts @ W_D + b_D) / s_out

The scales are folded: W_E *= s_in, W_D and b_D /= s_out; codes stay in the scaled units. A JumpReLU threshold is divided
by n (of the W_D that is stored), which keeps the active set; the package's own folding does not. TopK chooses by z * n.
An SAE whose hook_point_out differs from its hook_point_in is a transcoder.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saes.numerics.formats.files import FormatError, Place, read_json, tensor_headers
from saes.numerics.formats.openmoss_files import (
    CONFIG,
    DISTRIBUTED,
    LOG_THRESHOLD,
    Stored,
    read_stored,
    weights_path,
)
from saes.numerics.formats.openmoss_several import clt, crosscoder
from saes.numerics.formats.orient import hold_against, over_norms, widths
from saes.numerics.formats.stated import fact_text, k_of
from saes.numerics.formats.weights import assemble
from saes.numerics.sae import SAE, SAEConfig

REFUSED = ("lorsa", "molt")  # kinds of the package that are no sparse codes of one hook point's vectors
_USED = ("d_model", "top_k", "hook_point_in", "hook_point_out", "model_name")


def detect(place: Place) -> bool:
    """Raises FormatError for a config.json that cannot be read."""
    if not place.has(CONFIG) or not (weights_path(place) or (place.folder / DISTRIBUTED).is_dir()):
        return False
    kind = read_json(place.folder / CONFIG).get("sae_type")
    path = weights_path(place)
    if kind is None or path is None or kind in REFUSED or path.suffix != ".safetensors":
        return kind is not None
    return "W_E" in tensor_headers(path)


def load(place: Place, facts: Mapping[str, Any], device: torch.device | str, dtype: torch.dtype | None) -> SAE:
    """Facts: `model_name`, which the files do not say, `hook_name`, `hook_name_out`. Raises FormatError."""
    stated_kind = read_json(place.folder / CONFIG).get("sae_type")
    if stated_kind in REFUSED:
        raise FormatError(f"{place.said} is a {stated_kind} of OpenMOSS, which is not read here.")
    stored = read_stored(place)
    k = k_of(stored.stated, facts, "top_k") if stored.activation == "topk" else None
    kinds = {"sae": _sae, "crosscoder": crosscoder, "clt": clt}
    kind = stored.stated.text("sae_type")
    if kind not in kinds:
        raise FormatError(f"sae_type in {CONFIG} is {kind!r:.40}; those read here are {', '.join(kinds)}.")
    config, tensors = kinds[kind](stored, k)
    _check_sizes(stored, config)
    config = config.with_(
        model_name=fact_text(facts, "model_name") or stored.stated.text("model_name"),
        hook_name=fact_text(facts, "hook_name") or config.hook_name,
        metadata=stored.stated.rest(*_USED) | config.metadata,
    )
    if config.hook_name_out:
        config = config.with_(hook_name_out=fact_text(facts, "hook_name_out") or config.hook_name_out)
    return assemble(config, tensors, device, dtype)


def _check_sizes(stored: Stored, config: SAEConfig) -> None:
    """d_model and expansion_factor are of one hook point, of one layer."""
    hooks = config.options.get("hooks", 1)
    d, m = config.d_in // hooks, config.d_sae // (hooks if config.architecture == "clt" else 1)
    stored.stated.agrees("d_model", d)
    factor = stored.stated.number("expansion_factor")
    if factor is not None and int(d * factor) != m:
        raise FormatError(f"By {CONFIG} there are {int(d * factor)} features, but the weights have {m}; one is wrong.")


def _sae(stored: Stored, k: int | None) -> tuple[SAEConfig, dict[str, Tensor]]:
    """Config and tensors of an SAE or a transcoder."""
    stated, kind = stored.stated, stored.activation
    hook, out = stated.text("hook_point_in"), stated.text("hook_point_out")
    crosses = bool(out) and out != hook
    by_norm = stated.flag("sparsity_include_decoder_norm", True)
    names = ["W_E", "b_E", "W_D"]
    W_enc, b_enc, W_dec = stored.take(*names)
    tensors = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec}
    d_in, d_sae, d_out = widths(tensors, stored.file)
    tensors["b_dec"] = stored.tensors.get("b_D", W_dec.new_zeros(d_out))
    glu = stated.flag("use_glu_encoder", False)
    if glu:
        tensors["W_gate"], tensors["b_gate"] = stored.take("W_E_glu", "b_E_glu")
        names += ["W_E_glu", "b_E_glu"]
    if kind == "jumprelu":
        threshold = stored.take(LOG_THRESHOLD)[0].exp()
        if threshold.shape != (d_sae,):
            raise FormatError(f"{LOG_THRESHOLD} has the shape {list(threshold.shape)}, but must be {[d_sae]}.")
        tensors["threshold"] = over_norms(threshold, W_dec) if by_norm else threshold
        names.append(LOG_THRESHOLD)
    stored.only([*names, "b_D"])
    config = SAEConfig(
        _architecture(kind, by_norm, crosses),
        d_in,
        d_sae,
        d_out=d_out,
        apply_b_dec_to_input=False,
        normalize_activations=_normalization(stored, crosses),
        k=k,
        hook_name=hook,
        hook_name_out=out if crosses else "",
        options={"glu": True} if glu else {},
    )
    hold_against(tensors, config, CONFIG)
    if config.normalize_activations == "none":
        _fold(tensors, stored.scale(hook, d_in), stored.scale(out or hook, d_out))
    return config, tensors


def _architecture(kind: str, by_norm: bool, crosses: bool) -> str:
    name = {"relu": "standard", "jumprelu": "jumprelu", "topk": "topk_by_decoder_norm" if by_norm else "topk"}[kind]
    if not crosses:
        return name
    return "transcoder" if name == "standard" else f"{name}_transcoder"


def _normalization(stored: Stored, crosses: bool) -> str:
    how = stored.stated.text("norm_activation", "dataset-wise")
    if how == "token-wise" and crosses:
        raise FormatError(
            "This transcoder scales its output by the norm of what it predicts (norm_activation token-wise), which is not "
            "known when it is used."
        )
    if how == "batch-wise":
        raise FormatError(
            "norm_activation is batch-wise: what a row gives depends on its neighbours, which is not read here."
        )
    return "constant_norm_rescale" if how == "token-wise" else "none"


def _fold(tensors: dict[str, Tensor], s_in: float, s_out: float) -> None:
    for name in ("W_enc", "W_gate"):
        if name in tensors:
            tensors[name] = tensors[name] * s_in
    for name in ("W_dec", "b_dec"):
        tensors[name] = tensors[name] / s_out
