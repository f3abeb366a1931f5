"""From tensors of a file to an SAE: what every format module does once it knows the config."""

from collections.abc import Mapping
from functools import reduce

import torch
from torch import Tensor

from saes.numerics.architectures import sae_class
from saes.numerics.formats.files import FLOATS, FormatError, TensorInfo
from saes.numerics.sae import SAE, SAEConfig

UNIT = 8  # roundings by which the norm of a unit row may be off


def check_tensors(headers: Mapping[str, TensorInfo], config: SAEConfig, source: str) -> None:
    """Hold names, types and shapes against what the architecture has; `source` is where the config came from.

    Before any weight is read. Names are ours (`SAE.parameter_shapes`); a format that has others renames and orients
    first. Raises FormatError naming the tensor.
    """
    shapes = sae_class(config.architecture).parameter_shapes(config)
    _check_names(set(headers), set(shapes), config.architecture)
    for name, shape in shapes.items():
        info = headers[name]
        if info.dtype not in FLOATS:
            raise FormatError(f"{name} is stored as {info.dtype}, but must be floating point ({', '.join(FLOATS)}).")
        if info.shape != shape:
            raise FormatError(
                f"{name} has the shape {_times(info.shape)}, but by {source} (d_in {config.d_in}, d_sae {config.d_sae}) "
                f"it must be {_times(shape)}; one of the two is wrong."
            )


def infos(tensors: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    """Headers of tensors that are in memory already, for `check_tensors`."""
    names = {dtype: name for name, dtype in FLOATS.items()}
    return {
        name: TensorInfo(names.get(t.dtype, str(t.dtype).removeprefix("torch.")), tuple(t.shape))
        for name, t in tensors.items()
    }


def upcast(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As float32 (float64 stays): folds are done at full precision."""
    return {name: t if t.dtype == torch.float64 else t.to(torch.float32) for name, t in tensors.items()}


def assemble(
    config: SAEConfig, tensors: Mapping[str, Tensor], device: torch.device | str, dtype: torch.dtype | None
) -> SAE:
    """The SAE of a config and its tensors, named and oriented as ours. dtype None keeps that of the tensors.

    Raises FormatError when a tensor is missing, unknown or of another shape; SAEError when the architecture cannot
    have this config. That all numbers are finite is checked by `load_sae`, for every format.
    """
    check_tensors(infos(tensors), config, "the config")
    dtype = dtype or common_dtype(tensors)
    ready = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
    sae = sae_class(config.architecture)(config, device="meta", dtype=dtype)
    sae.load_state_dict(ready, strict=True, assign=True)
    return sae


def common_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The one that holds every tensor: of bfloat16 weights with a float32 threshold, float32."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))


def _sums(tensor: Tensor) -> Tensor:
    """Sums of the rows of a matrix of floats; anything else as it is."""
    if tensor.ndim < 2 or not tensor.is_floating_point():
        return tensor
    return tensor.flatten(0, -2) @ tensor.new_ones(tensor.shape[-1])


def refuse_non_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raises FormatError for the first tensor with NaN or infinite values, saying how many.

    A sum with such a value in it is not finite, and summing is the fastest pass there is, by a product with ones: twice as
    fast as `sum` in float32, and thirty times in bfloat16. Of a sum that is not finite, which large numbers can make as
    well, the values themselves are looked at.
    """
    for name, tensor in tensors.items():
        if bool(_sums(tensor).sum(dtype=torch.float32).isfinite()):
            continue
        count = int((~torch.isfinite(tensor)).sum())
        if count:
            are = "value that is not a finite number" if count == 1 else "values that are not finite numbers"
            raise FormatError(f"{name} holds {count} {are}, so the SAE is unusable.")


# -- identities: x_hat stays what it was, exactly up to rounding ------------------------------------------------------------


def fold_decoder_norm(tensors: dict[str, Tensor]) -> None:
    """Unit decoder rows: with n = |W_dec row|, W_dec /= n, W_enc *= n, b_enc and threshold *= n; codes become n times."""
    norms = tensors["W_dec"].norm(dim=-1)
    if bool(((norms - 1).abs() <= UNIT * torch.finfo(norms.dtype).eps).all()):
        return  # folded before: the tensors stay as they are, to the bit
    tiny = torch.finfo(norms.dtype).tiny  # a row of zeros stays zeros and its feature never fires
    tensors["W_dec"] = tensors["W_dec"] / norms.clamp_min(tiny)[:, None]
    for name in ("W_enc", "b_enc", "threshold", "b_gate", "b_mag"):
        if name in tensors:
            tensors[name] = tensors[name] * norms


def fold_scale(tensors: dict[str, Tensor], factor: float) -> None:
    """Inputs that were multiplied by `factor` in training: W_enc *= c, W_dec /= c, b_dec /= c. Codes stay scaled."""
    tensors["W_enc"] = tensors["W_enc"] * factor
    tensors["W_dec"] = tensors["W_dec"] / factor
    tensors["b_dec"] = tensors["b_dec"] / factor


def fold_whitening(tensors: dict[str, Tensor], whitening: Mapping[str, Tensor], subtracts: bool) -> None:
    """Inputs that were (x - mean) @ M in training, and outputs mapped back, with `mean`, `matrix` M and `inverse_matrix`.

    W_enc = M @ W_enc, W_dec = W_dec @ M^-1, b_dec = b_dec @ M^-1 + mean; codes stay as they are. Where b_dec is not
    subtracted from the input the biases take the mean: b_enc -= mean @ W_enc. In float64, as the matrices are.
    """
    mean, matrix, inverse = (whitening[name].to(torch.float64) for name in ("mean", "matrix", "inverse_matrix"))
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    W_enc = matrix @ tensors["W_enc"].to(torch.float64)
    folded = {
        "W_enc": W_enc,
        "W_dec": tensors["W_dec"].to(torch.float64) @ inverse,
        "b_dec": tensors["b_dec"].to(torch.float64) @ inverse + mean,
    }
    if not subtracts:
        shift = mean @ W_enc
        folded |= {name: tensors[name] - shift for name in ("b_enc", "b_gate") if name in tensors}
        if "b_mag" in tensors:
            folded["b_mag"] = tensors["b_mag"] - shift * tensors["r_mag"].exp()
    tensors |= {name: tensor.to(dtypes[name]) for name, tensor in folded.items()}


def _check_names(found: set[str], wanted: set[str], architecture: str) -> None:
    if wanted - found:
        raise FormatError(f"The weights of this {architecture} SAE lack {', '.join(sorted(wanted - found))}.")
    if found - wanted:
        extra = sorted(found - wanted)
        raise FormatError(
            f"The weights hold {len(extra)} tensors that a {architecture} SAE does not have (first: {extra[0]:.60})."
        )


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(str(n) for n in shape) or "a single number"
