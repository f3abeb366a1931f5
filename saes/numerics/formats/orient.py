"""From a file's tensors to ours: other names, other orientation, sizes read off the shapes."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from saes.numerics.formats.files import FLOATS, FormatError, Place, TensorInfo, read_tensors, tensor_headers
from saes.numerics.formats.weights import check_tensors, infos
from saes.numerics.sae import SAEConfig


def within(place: Place, *names: str) -> str:
    """The first of these names that the place's folder holds and its entry allows, "" if none.

    An entry that is the weights' file means the same as its folder.
    """
    return next((name for name in names if name in place.names and place.entry in ("", name)), "")


def all_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, memory-mapped. Raises FormatError."""
    return read_tensors(path, tensor_headers(path))


def renamed(
    tensors: Mapping[str, Tensor], names: Mapping[str, str], file: str, *, flipped: Iterable[str] = ()
) -> dict[str, Tensor]:
    """Tensors under our names: `names` is ours -> theirs, `flipped` are ours that they store transposed.

    Raises FormatError when one is missing, when there are others, or when one to be flipped is no matrix.
    """
    missing = sorted(theirs for theirs in names.values() if theirs not in tensors)
    if missing:
        raise FormatError(f"{file} lacks {', '.join(missing)}.")
    extra = sorted(set(tensors) - set(names.values()))
    if extra:
        raise FormatError(f"{file} holds {extra[0]:.60}, which an SAE of this format does not have.")
    flip = set(flipped)
    return {
        ours: transposed(tensors[theirs], theirs) if ours in flip else tensors[theirs] for ours, theirs in names.items()
    }


def transposed(tensor: Tensor, name: str) -> Tensor:
    if tensor.dim() != 2:
        raise FormatError(f"{name} must be a matrix, but has the shape {list(tensor.shape)}.")
    return tensor.t().contiguous()


def widths(tensors: Mapping[str, Tensor], file: str) -> tuple[int, int, int]:
    """(d_in, d_sae, d_out) off the shapes of W_enc (d_in, d_sae) and W_dec (d_sae, d_out). Raises FormatError."""
    for name in ("W_enc", "W_dec"):
        if tensors[name].dim() != 2 or not all(tensors[name].shape):
            raise FormatError(f"{name} in {file} must be a matrix, but has the shape {list(tensors[name].shape)}.")
    (d_in, d_sae), d_out = tensors["W_enc"].shape, tensors["W_dec"].shape[1]
    return d_in, d_sae, d_out


def hold_against(tensors: Mapping[str, Tensor], config: SAEConfig, source: str) -> None:
    """`check_tensors` for tensors that are mapped already; `source` is where the config's sizes came from."""
    headers: dict[str, TensorInfo] = infos(tensors)
    check_tensors(headers, config, source)


def require_floats(tensors: Mapping[str, Tensor], file: str) -> None:
    """Before any arithmetic with them. Raises FormatError."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS.values():
            raise FormatError(
                f"{name} in {file} is stored as {str(tensor.dtype).removeprefix('torch.')}, but must be floating point."
            )


def spread(value: Tensor, d_sae: int, name: str, file: str) -> Tensor:
    """One number for all features -> (d_sae,). Raises FormatError when it is not one number."""
    if value.numel() != 1:
        raise FormatError(f"{name} in {file} must be one number, but has the shape {list(value.shape)}.")
    return value.reshape(1).expand(d_sae).contiguous()


def over_norms(threshold: Tensor, W_dec: Tensor) -> Tensor:
    """Thresholds that z * |W_dec row| is held against, as thresholds of z. A feature without a decoder never fires."""
    norms = W_dec.norm(dim=-1)
    return torch.where(norms > 0, threshold / norms, torch.inf).clamp_max(torch.finfo(norms.dtype).max)
