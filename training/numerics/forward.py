"""Activations of the stored tokens of contexts: one forward pass for all hook points, in float32 or bfloat16."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from saes.numerics.hooks import decoder_blocks
from saes.numerics.lm import LM


@contextmanager
def precision(lm: LM, hook_names: Sequence[str], autocast: bool) -> Iterator[None]:
    """Within this block the model runs in bfloat16 autocast, if `autocast`: matrix products and attention in bfloat16,
    the residual stream and the norms in float32.

    Weights of linear layers up to the deepest hook point are cast once, here, instead of at every forward pass, which
    is what autocast does with weights that need no gradient; the results are the same to the bit. They are put back at
    the end, so the model belongs to the caller alone meanwhile.
    """
    if not autocast:
        yield
        return
    kept = _halved(lm, hook_names)
    try:
        with torch.autocast(torch.device(lm.device).type, dtype=torch.bfloat16):
            yield
    finally:
        for module, name, parameter in kept:
            setattr(module, name, parameter)


def _halved(lm: LM, hook_names: Sequence[str]) -> list[tuple[nn.Module, str, nn.Parameter]]:
    layers = [point.layer for point in map(lm.resolve, hook_names)]
    deepest = max((layer for layer in layers if layer is not None), default=-1)
    kept: list[tuple[nn.Module, str, nn.Parameter]] = []
    for block in decoder_blocks(lm.model)[1][: deepest + 1]:
        for module in block.modules():
            if isinstance(module, nn.Linear | Conv1D):
                for name, parameter in list(module.named_parameters(recurse=False)):
                    kept.append((module, name, parameter))
                    setattr(module, name, nn.Parameter(parameter.to(torch.bfloat16), requires_grad=False))
    return kept


@torch.inference_mode()
def stored_rows(
    lm: LM,
    ids: np.ndarray,
    stored: np.ndarray,
    hook_names: Sequence[str],
    *,
    lengths: np.ndarray | None = None,
    batch_contexts: int | None = None,
) -> dict[str, Tensor]:
    """Activations (n, d) of the tokens marked in `stored` (c, t), for contexts ids (c, t), in the order of contexts and
    positions.

    lengths (c,): tokens of each context that are not padding. Contexts of like length then share a forward pass of
    `batch_contexts` contexts, cut at the longest of them, so that little of it is spent on padding. No attention mask
    is needed: padding comes last and attention is causal.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in hook_names}
    order = np.arange(len(ids)) if lengths is None else np.argsort(lengths, kind="stable")
    size = batch_contexts or len(ids)
    for start in range(0, len(ids), size):
        group = order[start : start + size]
        t = ids.shape[1] if lengths is None else int(lengths[group].max())
        x = lm.activations(torch.from_numpy(ids[group, :t]).long().to(lm.device), hook_names)
        mask = torch.from_numpy(stored[group, :t]).to(lm.device)
        for name, values in x.items():
            found[name].append(values[mask])
    rows = {name: torch.cat(values) for name, values in found.items()}
    if lengths is None:
        return rows
    back = torch.from_numpy(np.argsort(np.repeat(order, stored[order].sum(axis=1)), kind="stable")).to(lm.device)
    return {name: values[back] for name, values in rows.items()}


def outliers(x: dict[str, Tensor], limits: dict[str, float]) -> Tensor:
    """True for the rows (n,) whose norm is above the limit at any of the hook points."""
    over = [values.float().norm(dim=-1) > limits[name] for name, values in x.items() if name in limits]
    return torch.stack(over).any(dim=0)


def fidelity(x: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """How far activations x (n, d) are from the exact ones, for each hook point.

    relative_error: mean of |x - exact| / |exact|. unexplained: sum |x - exact|^2 / sum |exact - mean(exact)|^2, the
    FVU that an SAE could not get below. cosine, least_cosine: mean and least over the rows.
    """
    found = {}
    for name, values in x.items():
        a, b = values.double(), exact[name].double()
        error = (a - b).norm(dim=-1)
        cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1)
        found[name] = {
            "relative_error": float((error / b.norm(dim=-1).clamp_min(1e-30)).mean()),
            "unexplained": float(error.square().sum() / (b - b.mean(0)).square().sum().clamp_min(1e-30)),
            "cosine": float(cosine.mean()),
            "least_cosine": float(cosine.min()),
            "n": len(b),
        }
    return found
