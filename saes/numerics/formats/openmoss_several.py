"""OpenMOSS' SAEs of several hook points: crosscoders and cross-layer transcoders (`saes.numerics.several`)."""

from typing import Any

import torch
from torch import Tensor

from saes.numerics.formats.files import FormatError
from saes.numerics.formats.openmoss_files import CONFIG, LOG_THRESHOLD, Stored
from saes.numerics.formats.orient import hold_against, over_norms
from saes.numerics.formats.stated import NOT_AN_AUTOENCODER
from saes.numerics.sae import SAEConfig

CROSSCODER = (
    "A crosscoder reads the activations of several hook points at once, side by side; it cannot be run on, steer, or be "
    "trained from the activations of a single one."
)
CLT = (
    "A cross-layer transcoder reads the inputs of all its layers at once, side by side, and predicts their outputs; it "
    "cannot be run on, steer, or be trained from the activations of a single hook point."
)


def crosscoder(stored: Stored, k: int | None) -> tuple[SAEConfig, dict[str, Tensor]]:
    """Config and tensors of a crosscoder: every hook point's scale folded into its own encoder and decoder."""
    hooks = stored.stated.texts("hook_points")
    W_enc, b_enc, W_dec = stored.take("W_E", "b_E", "W_D")
    _same_hooks(hooks, stored, W_E=W_enc, W_D=W_dec, b_E=b_enc)
    d = W_enc.shape[1]
    scales = torch.tensor([stored.scale(hook, d) for hook in hooks], dtype=W_enc.dtype)
    b_dec = stored.tensors.get("b_D", W_dec.new_zeros(len(hooks), d))
    tensors = {
        "W_enc": W_enc * scales[:, None, None],
        "b_enc": b_enc,
        "W_dec": W_dec / scales[:, None, None],
        "b_dec": b_dec / scales[:, None],
    }
    names = ["W_E", "b_E", "W_D", "b_D"]
    if stored.activation == "jumprelu":
        threshold = stored.take(LOG_THRESHOLD)[0].exp()  # z * n is held against it, and n is 1/s of what it was
        by_norm = stored.stated.flag("sparsity_include_decoder_norm", True)
        tensors["threshold"] = threshold.expand(len(hooks), -1) / (scales[:, None] if by_norm else 1)
        names.append(LOG_THRESHOLD)
    stored.only(names)
    config = SAEConfig(
        "crosscoder",
        d_in=len(hooks) * d,
        d_sae=W_enc.shape[2],
        apply_b_dec_to_input=False,
        k=k,
        options={
            "hooks": len(hooks),
            "activation": stored.activation,
            "by_decoder_norm": stored.stated.flag("sparsity_include_decoder_norm", True),
        },
        metadata={NOT_AN_AUTOENCODER: CROSSCODER, "hook_points": hooks},
    )
    hold_against(tensors, config, CONFIG)
    return config, tensors


def clt(stored: Stored, k: int | None) -> tuple[SAEConfig, dict[str, Tensor]]:
    """Config and tensors of a cross-layer transcoder; W_D.T (T + 1, d_sae, d) are the decoders of layers 0..T to T."""
    read, written = stored.stated.texts("hook_points_in"), stored.stated.texts("hook_points_out")
    layers = len(read)
    W_enc, b_enc = stored.take("W_E", "b_E")
    _same_hooks(read, stored, W_E=W_enc, b_E=b_enc)
    d, m = W_enc.shape[1], W_enc.shape[2]
    if k is not None and k > m:
        raise FormatError(f"top_k in {CONFIG} is {k}, but each layer has only {m} features.")
    decoders = stored.take(*(f"W_D.{target}" for target in range(layers)))
    for target, decoder in enumerate(decoders):
        if decoder.shape != (target + 1, m, d) or len(written) != layers:
            raise FormatError(f"W_D.{target} has the shape {list(decoder.shape)}, but must be {[target + 1, m, d]}.")
    s_in = torch.tensor([stored.scale(hook, d) for hook in read], dtype=W_enc.dtype)
    s_out = [stored.scale(hook, d) for hook in written]
    biases = [stored.tensors.get(f"b_D.{target}", W_enc.new_zeros(d)) for target in range(layers)]
    tensors = {
        "W_enc": W_enc * s_in[:, None, None],
        "b_enc": b_enc,
        "W_dec": torch.cat([decoder / scale for decoder, scale in zip(decoders, s_out, strict=True)]),
        "b_dec": torch.stack([bias / scale for bias, scale in zip(biases, s_out, strict=True)]),
    }
    names = ["W_E", "b_E", *(f"{name}.{target}" for name in ("W_D", "b_D") for target in range(layers))]
    by_norm = stored.stated.flag("sparsity_include_decoder_norm", True)
    if stored.activation == "jumprelu":
        threshold = stored.take(LOG_THRESHOLD)[0].exp()
        if threshold.shape != (layers, m):
            raise FormatError(f"{LOG_THRESHOLD} has the shape {list(threshold.shape)}, but must be {[layers, m]}.")
        flat = threshold.flatten()
        tensors["threshold"] = over_norms(flat, _all_decoders(decoders)) if by_norm else flat
        names.append(LOG_THRESHOLD)
    elif stored.activation == "topk" and by_norm:
        raise FormatError("A cross-layer transcoder that chooses its top k by decoder norm is not read here.")
    stored.only(names)
    options: dict[str, Any] = {"hooks": layers, "activation": stored.activation}
    config = SAEConfig(
        "clt",
        d_in=layers * d,
        d_sae=layers * m,
        apply_b_dec_to_input=False,
        k=k,
        options=options,
        metadata={NOT_AN_AUTOENCODER: CLT, "hook_points_in": read, "hook_points_out": written},
    )
    hold_against(tensors, config, CONFIG)
    return config, tensors


def _all_decoders(decoders: list[Tensor]) -> Tensor:
    """(layers * m, ...): what each feature writes, to all the layers it writes to, so that a row's norm is over them all."""
    layers = len(decoders)
    rows = []
    for source in range(layers):
        to = [decoders[target][source] for target in range(source, layers)]
        rows.append(torch.stack([part.norm(dim=-1) for part in to], dim=-1).norm(dim=-1, keepdim=True))
    return torch.cat(rows)


def _same_hooks(hooks: list[str], stored: Stored, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dim() != (2 if name == "b_E" else 3) or tensor.shape[0] != len(hooks):
            raise FormatError(
                f"{name} in {stored.file} has the shape {list(tensor.shape)}, but {CONFIG} names {len(hooks)} hook points."
            )
