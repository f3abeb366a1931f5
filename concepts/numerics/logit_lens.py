"""What a feature writes: the logits its decoder direction raises and lowers, and the features that point the same way.

logits_i = (w_i * gain) @ W_U, where w_i is the decoder row at norm 1 (its mean over d_model removed first when the
final norm is a LayerNorm, which removes the mean of what it is given) and gain that of the model's final norm. This is
the direct path from the feature to the logits: later blocks are skipped, the per-token division by the norm is left out
(it scales all logits of a token alike), and so are a final soft-cap or a constant logit scale, which keep the order.
cosine_ij = w_i . w_j
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from concepts.featurefile import HISTOGRAM_BINS, LENS_FACTS, LENS_VERSION, ViewError, open_view
from saes.numerics.hooks import decoder_blocks
from saes.numerics.lm import LM, UnknownHookPoint
from saes.numerics.sae import SAE
from training.numerics.shards import write_json

COLUMNS = (
    "decoder_norm", "neighbour_ids", "neighbour_cosines", "logits_pos_ids", "logits_pos_values", "logits_neg_ids",
    "logits_neg_values", "directions", "logits_histogram",
)  # fmt: skip
CHUNK_NUMBERS = 2**24  # products held at once, 4 bytes each
RESIDUAL = ("hook_embed", "hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")

Progress = Callable[[int, int | None, str], None]


class LogitLensError(ValueError):
    """The logit lens cannot be computed; the message is one sentence."""


@torch.inference_mode()
def logit_lens(
    sae: SAE,
    lm: LM,
    view_dir: str | Path,
    *,
    k: int = 10,
    neighbours: int = 50,
    progress: Progress = lambda done, total, step: None,
) -> dict[str, Any]:
    """Add logits, neighbours, directions and decoder norms of every feature to a harvested view; returns what was done.

    k: logits kept on each side. neighbours: kept by falling cosine. The result's `how` says in words how the logits
    came to be; where the hook point is not written into the residual stream there are none (`logits` False) and `how`
    says why. Columns already there are replaced. Raises LogitLensError when SAE, model and view do not belong together.
    """
    folder = Path(view_dir)
    _check(sae, lm, open_view(folder).n_features)
    norm = sae.W_dec.float().norm(dim=1)
    directions = F.normalize(sae.W_dec.float(), dim=1)
    reason = _not_residual(sae, lm)
    total = sae.config.d_sae * (1 if reason else 2)
    (folder / LENS_FACTS).unlink(missing_ok=True)  # written last: until then the view has no lens
    _save(folder, "decoder_norm", norm)
    count = min(neighbours, sae.config.d_sae - 1)
    ids, cosines = _neighbours(directions, count, lambda done: progress(done, total, "comparing directions"))
    _save(folder, "neighbour_ids", ids.int())
    _save(folder, "neighbour_cosines", cosines)
    _save(folder, "directions", directions.half())
    if reason is None:
        unembedding, how = effective_unembedding(lm)
        k = min(k, unembedding.shape[1])
        start = total - sae.config.d_sae
        sides, counts = _extremes(
            directions.to(unembedding), unembedding, k, lambda n: progress(start + n, total, "logits of every feature")
        )
        _save(folder, "logits_histogram", counts)
        for side, (values, tokens) in sides.items():
            _save(folder, f"logits_{side}_values", values)
            _save(folder, f"logits_{side}_ids", tokens.int())
    result = {"logits": reason is None, "how": reason or how, "model": lm.name, "k": k, "neighbours": count}
    result["version"] = LENS_VERSION
    write_json(folder / LENS_FACTS, result)
    return result


def take_lens(old: Path, new: Path) -> bool:
    """Give a view the logits and neighbours of an older view of the same SAE and model, which depend on no tokens.

    Returns whether there were any of this version. The columns are links to the same files.
    """
    try:
        had, has = open_view(old), open_view(new)
    except ViewError:
        return False
    same = had.facts.get("source", {}).get("sae") == has.facts["source"]["sae"]
    if not had.logit_lens or had.lens_version < LENS_VERSION or not same:
        return False
    for file in (file for name in COLUMNS for file in old.glob(f"{name}.npy")):
        os.link(file, new / file.name)
    write_json(new / LENS_FACTS, had.logit_lens)
    return True


def _check(sae: SAE, lm: LM, n_features: int) -> None:
    if sae.config.d_sae != n_features:
        raise LogitLensError(f"The view has {n_features} features, the SAE {sae.config.d_sae}; harvest this SAE first.")
    if sae.config.d_out != lm.d_model and _not_residual(sae, lm) is None:
        raise LogitLensError(
            f"The SAE writes vectors of {sae.config.d_out} numbers and {lm.name or 'the model'} has {lm.d_model}; "
            "choose the model the SAE was trained on."
        )


def _not_residual(sae: SAE, lm: LM) -> str | None:
    """Why there are no logits, or None when the decoder's directions live in the residual stream."""
    name = sae.config.hook_name
    if not name:
        return None  # nothing is known against it; the width has been checked
    try:
        name = lm.resolve(name).name
    except UnknownHookPoint as error:
        raise LogitLensError(f"The SAE's hook point does not belong to this model: {error}") from error
    if name.rpartition(".")[2] in RESIDUAL:
        return None
    return f"no logits: {name} is not written into the residual stream, so its directions have no place in W_U"


def effective_unembedding(lm: LM) -> tuple[Tensor, str]:
    """(E (d_model, V) float32, how): a direction w adds w @ E to the logits, before the division by the norm.

    E = gain * W_U, with the mean over d_model removed when the final norm removes it. V is the number of tokens the
    tokenizer knows: padding rows of the embedding are left out. The gain is measured by running the model's own norm
    module, so every way to store it (Llama: w, Gemma: 1 + w) is the same.
    """
    head = lm.model.get_output_embeddings()
    if head is None:
        raise LogitLensError(f"{lm.name or 'This model'} has no output embedding, so features have no logits.")
    unembedding = head.weight[: len(lm.tokenizer)].float().T
    name, norm = _final_norm(lm)
    if norm is None:
        return unembedding, "unit W_dec @ W_U; the model has no final norm"
    gain, centred = _measure(norm, lm)
    unembedding = gain[:, None] * unembedding
    kind, tied = "RMSNorm", "tied to the embedding" if _is_tied(lm) else "an own matrix"
    if centred:
        unembedding = unembedding - unembedding.mean(0)
        kind = "LayerNorm, mean over d_model removed"
    return unembedding, f"unit W_dec @ (gain * W_U); gain of the final norm {name} ({kind}); W_U is {tied}"


def _is_tied(lm: LM) -> bool:
    return lm.model.get_output_embeddings().weight is lm.model.get_input_embeddings().weight


def _final_norm(lm: LM) -> tuple[str, nn.Module | None]:
    """The norm module that stands beside the stack of blocks (model.norm, transformer.ln_f, gpt_neox.final_layer_norm).

    Where several norms stand there (one after the embedding, as in BLOOM), the final one is the last registered.
    """
    parent = decoder_blocks(lm.model)[0].rpartition(".")[0]
    children = lm.model.get_submodule(parent).named_children()
    norms = [(name, module) for name, module in children if "norm" in type(module).__name__.lower()]
    return norms[-1] if norms else ("", None)


def _measure(norm: nn.Module, lm: LM) -> tuple[Tensor, bool]:
    """(gain (d_model,), does it remove the mean), from what the norm makes of a vector of mean 0.

    The odd part of norm(x) is gain * x / scale(x), whatever bias there is. x holds powers of two, exact in every dtype,
    and is large, so that the norm's epsilon does not matter.
    """
    x = torch.ones(lm.d_model)
    x[1::2] = -1
    if lm.d_model % 2:
        x[:3] = torch.tensor([2.0, -1, -1])
        x[3::2], x[4::2] = 1, -1
    x = 1024 * x
    batch = torch.stack([x, -x, x + 4096]).to(lm.device, lm.dtype)
    positive, negative, shifted = norm(batch[:, None]).float().cpu().squeeze(1)
    gain = (positive - negative) / 2 * x.pow(2).mean().sqrt() / x
    centred = bool((shifted - positive).norm() < 0.01 * positive.norm())
    return gain.to(lm.device), centred


# ---------------------------------------------------------------------------------------------------- in chunks


def _chunks(n: int, width: int) -> Iterator[slice]:
    step = max(1, CHUNK_NUMBERS // width)
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def _neighbours(directions: Tensor, k: int, report: Callable[[int], None]) -> tuple[Tensor, Tensor]:
    """Ids and cosines (d_sae, k) of the features whose decoder directions are nearest, itself left out."""
    n = len(directions)
    ids, cosines = torch.zeros(n, k, dtype=torch.int64), torch.zeros(n, k)
    for rows in _chunks(n, n):
        cosine = directions[rows] @ directions.T
        cosine[torch.arange(len(cosine)), torch.arange(rows.start, rows.stop)] = -torch.inf
        cosines[rows], ids[rows] = (part.cpu() for part in cosine.topk(k))
        report(rows.stop)
    return ids, cosines


def _extremes(
    directions: Tensor, unembedding: Tensor, k: int, report: Callable[[int], None]
) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
    """{"pos", "neg"}: values and token ids (d_sae, k) of the logits raised most and lowered most; and (d_sae, bins) int32,
    how many of all logits lie in each of HISTOGRAM_BINS equal bins from the lowest to the highest."""
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {"pos": [], "neg": []}
    counts: list[Tensor] = []
    for rows in _chunks(len(directions), unembedding.shape[1]):
        logits = directions[rows] @ unembedding
        for side, found in parts.items():
            values, tokens = logits.topk(k, largest=side == "pos")
            found.append((values.cpu(), tokens.cpu()))
        counts.append(_binned(logits, parts["neg"][-1][0][:, :1], parts["pos"][-1][0][:, :1]))
        report(rows.stop)
    sides = {
        side: (torch.cat([v for v, _ in found]), torch.cat([t for _, t in found])) for side, found in parts.items()
    }
    return sides, torch.cat(counts)


def _binned(logits: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Counts (n, HISTOGRAM_BINS) int32 of each row's values between its low and high (n, 1), the ends included."""
    low, high = low.to(logits), high.to(logits)
    scale = HISTOGRAM_BINS / (high - low).clamp_min(torch.finfo(logits.dtype).tiny)
    bins = ((logits - low) * scale).int().clamp_(0, HISTOGRAM_BINS - 1)
    bins += torch.arange(len(logits), device=logits.device, dtype=torch.int32)[:, None] * HISTOGRAM_BINS
    counts = torch.bincount(bins.flatten(), minlength=len(logits) * HISTOGRAM_BINS)
    return counts.view(len(logits), HISTOGRAM_BINS).int().cpu()


def _save(folder: Path, name: str, tensor: Tensor) -> None:
    """Through a temporary name: readers keep their memory map of an older column."""
    temporary = folder / f"{name}.tmp.npy"
    np.save(temporary, tensor.cpu().numpy())
    temporary.rename(folder / f"{name}.npy")
