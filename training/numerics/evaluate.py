"""How good an SAE is, on activations it was not trained on: every number with its definition, its n and its data.

Sums run in float64 over a stream, so a result does not depend on the batch size. The definitions are the field's
(SAELens' for explained variance and the CE score); where others print something else under the same name, the formula
in DEFINITIONS says which one this is.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from saes.numerics.lm import LM, hooked
from saes.numerics.sae import SAE
from training.numerics.shards import Capture, Split, is_held_out
from training.numerics.tokens import TokenPolicy, stored_mask

Progress = Callable[[int, int | None, str], None]
Metric = dict[str, Any]

MAX_DENSE = 2**24  # entries of a dense (rows, d_sae) block: 64 MB in float32
DENSITY_EDGES = np.arange(-6.0, 0.01, 0.25)  # log10 of the firing rate
INTERVENED = "positions of tokens whose activations the token policy does not store are left as they are"

DEFINITIONS: dict[str, str] = {
    "l0": "mean over tokens of the number of features with acts_i != 0",
    "l1": "mean over tokens of sum_i |acts_i|",
    "mse": "mean over tokens of sum_d (x_hat - x)^2",
    "mse_per_dimension": "mse / d_out",
    "explained_variance": "1 - E|x - x_hat|^2 / (E|x|^2 - |E x|^2)",
    "fvu": "E|x - x_hat|^2 / (E|x|^2 - |E x|^2) = 1 - explained_variance",
    "cosine": "mean over tokens of cos(x, x_hat)",
    "l2_ratio": "mean over tokens of |x_hat| / |x|",
    "relative_reconstruction_bias": "E|x_hat|^2 / E[x . x_hat]; below 1 means shrinkage",
    "dead_features": "number of features with acts_i = 0 on every one of the n tokens (more tokens, fewer dead)",
    "alive_fraction": "1 - dead_features / d_sae",
    "dense_features": "number of features firing on more than 10 % of the n tokens",
    "density_histogram": "features by log10(firing rate), firing rate = tokens with acts_i != 0 / n; dead ones apart",
    "ce_original": "mean cross-entropy (nats) of the next token, model untouched",
    "ce_with_sae": f"the same with x replaced by x_hat at the hook point; {INTERVENED}",
    "ce_zero_ablated": f"the same with x replaced by 0 at the hook point; {INTERVENED}",
    "ce_increase": "ce_with_sae - ce_original",
    "ce_recovered": "(ce_zero_ablated - ce_with_sae) / (ce_zero_ablated - ce_original)",
    "kl": "mean over predictions of KL(p_original || p_with_sae), nats",
    "kl_zero_ablated": "mean over predictions of KL(p_original || p_zero_ablated), nats",
    "kl_recovered": "1 - kl / kl_zero_ablated",
}


class EvaluationError(ValueError):
    """An evaluation that cannot be made; the message is one sentence."""


def evaluate(
    sae: SAE,
    x_batches: Iterable[Tensor],
    *,
    lm: LM | None = None,
    contexts: np.ndarray | None = None,
    replaced: np.ndarray | None = None,
    hook_name: str | None = None,
    data: str = "",
    batch_contexts: int = 4,
    total: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Metric]:
    """Metrics {name: {"value", "definition", "n", "data"}} of an SAE.

    `definition` is a key of DEFINITIONS; `value` is None where it is not defined (a ratio to nothing).

    x_batches: (n, d_in) float32, in the model's own activation space. With `lm` and `contexts` (c, t) token ids, also
    what the reconstruction does to the model's predictions at `hook_name` (the SAE's own unless given); `replaced`
    (c, t) is False at positions to leave untouched. n counts tokens for the former, predictions for the latter.
    progress(done, total, step) is called per batch and may raise. Raises EvaluationError for no data, NaN, or a width
    that does not fit the SAE.
    """
    tick = progress or _silent
    metrics = _reconstruction(sae, x_batches, data, total, tick)
    if lm is not None and contexts is not None:
        mask = np.ones(contexts.shape, dtype=bool) if replaced is None else replaced
        metrics |= _predictions(sae, lm, contexts, mask, hook_name or sae.config.hook_name, data, batch_contexts, tick)
    return metrics


def evaluate_capture(
    sae: SAE,
    capture: Capture,
    hook: str | None = None,
    *,
    split: Split = "held_out",
    max_rows: int | None = None,
    lm: LM | None = None,
    max_contexts: int = 64,
    batch_size: int = 4096,
    progress: Progress | None = None,
) -> dict[str, Metric]:
    """`evaluate` on a split of a capture: at most `max_rows` rows, and with `lm` at most `max_contexts` contexts."""
    hook = hook or sae.config.hook_name
    rows = min(capture.split_rows(split), max_rows or capture.split_rows(split))
    batches = capture.batches(hook, batch_size, split=split, shuffle=False, n_rows=rows)
    contexts = replaced = None
    if lm is not None:
        contexts = capture.contexts()[_numbers(capture, split)[:max_contexts]]
        policy = TokenPolicy(**capture.manifest["policy"])
        replaced = stored_mask(contexts, policy, capture.manifest["special_ids"])
    return evaluate(
        sae,
        batches,
        lm=lm,
        contexts=contexts,
        replaced=replaced,
        hook_name=hook,
        data=f"{split.replace('_', '-')} contexts of capture {capture.manifest['run_id']}",
        total=rows,
        progress=progress,
    )


def _numbers(capture: Capture, split: Split) -> np.ndarray:
    """Context numbers of a split, in order."""
    numbers = np.arange(capture.n_contexts)
    if split == "all":
        return numbers
    held_out = is_held_out(numbers, capture.held_out_fraction)
    return numbers[held_out if split == "held_out" else ~held_out]


def _silent(done: int, total: int | None, step: str = "") -> None:
    return None


# ---------------------------------------------------------------------------------------------------- reconstruction


class ExplainedVariance:
    """Streaming 1 - E|x - x_hat|^2 / (E|x|^2 - |E x|^2), float64, over rows of (n, d) tensors."""

    def __init__(self) -> None:
        self.n = 0
        self.squared_error = self.squared_norm = 0.0
        self.sum: Tensor | float = 0.0

    def add(self, x: Tensor, x_hat: Tensor) -> None:
        x64, x_hat64 = x.double(), x_hat.double()
        self.n += len(x)
        self.squared_error += float((x64 - x_hat64).square().sum())
        self.squared_norm += float(x64.square().sum())
        self.sum = self.sum + x64.sum(0)

    @property
    def variance(self) -> float:
        """E|x|^2 - |E x|^2."""
        mean = torch.as_tensor(self.sum) / self.n
        return self.squared_norm / self.n - float(mean.square().sum())

    @property
    def value(self) -> float:
        return 1 - self.squared_error / self.n / self.variance if self.variance > 0 else float("nan")


@torch.no_grad()
def explained_variance(sae: SAE, x: Tensor) -> float:
    """Explained variance (see DEFINITIONS) of x (n, d_in), computed in blocks of bounded size."""
    running = ExplainedVariance()
    for part in blocks(sae, x):
        running.add(part, sae(part))
    return running.value


def blocks(sae: SAE, x: Tensor) -> Iterator[Tensor]:
    device = sae.W_dec.device
    for part in x.split(max(1, MAX_DENSE // sae.config.d_sae)):
        yield part.to(device, sae.W_dec.dtype)


@torch.no_grad()
def _reconstruction(
    sae: SAE, x_batches: Iterable[Tensor], data: str, total: int | None, progress: Progress
) -> dict[str, Metric]:
    variance = ExplainedVariance()
    sums: dict[str, float] = dict.fromkeys(("l0", "l1", "cosine", "l2_ratio", "norm", "dot"), 0.0)
    fired = torch.zeros(sae.config.d_sae, dtype=torch.int64, device=sae.W_dec.device)
    for batch in x_batches:
        for x in blocks(sae, batch):
            acts = sae.encode(x)
            x_hat = sae.decode(acts, x)
            variance.add(x, x_hat)
            fired += (acts != 0).sum(0)
            for name, value in _row_sums(acts, x.double(), x_hat.double()).items():
                sums[name] += float(value)
        progress(variance.n, total, "reconstructing")
    if not variance.n:
        raise EvaluationError("There are no activations to evaluate on; capture more text.")
    values = _reconstruction_values(sae, variance, sums, fired)
    if not np.isfinite(values["mse"]):
        raise EvaluationError("The SAE's reconstructions are NaN or infinite; its weights are damaged.")
    return {name: _metric(name, value, variance.n, data) for name, value in values.items()}


def _row_sums(acts: Tensor, x: Tensor, x_hat: Tensor) -> dict[str, Tensor]:
    norm, norm_hat, dot = x.norm(dim=-1), x_hat.norm(dim=-1), (x * x_hat).sum(-1)
    tiny = torch.finfo(torch.float64).tiny
    return {
        "l0": (acts != 0).sum(),
        "l1": acts.abs().sum(dtype=torch.float64),
        "cosine": (dot / (norm * norm_hat).clamp_min(tiny)).sum(),
        "l2_ratio": (norm_hat / norm.clamp_min(tiny)).sum(),
        "norm": norm_hat.square().sum(),
        "dot": dot.sum(),
    }


def _reconstruction_values(
    sae: SAE, variance: ExplainedVariance, sums: dict[str, float], fired: Tensor
) -> dict[str, Any]:
    n, d_sae = variance.n, sae.config.d_sae
    mse = variance.squared_error / n
    dead = int((fired == 0).sum())
    return {
        "l0": sums["l0"] / n,
        "l1": sums["l1"] / n,
        "mse": mse,
        "mse_per_dimension": mse / sae.config.d_out,
        "explained_variance": variance.value,
        "fvu": 1 - variance.value,
        "cosine": sums["cosine"] / n,
        "l2_ratio": sums["l2_ratio"] / n,
        "relative_reconstruction_bias": sums["norm"] / sums["dot"] if sums["dot"] else float("nan"),
        "dead_features": dead,
        "alive_fraction": 1 - dead / d_sae,
        "dense_features": int((fired > 0.1 * n).sum()),
        "density_histogram": density_histogram(fired.cpu().numpy(), n),
    }


def density_histogram(fired: np.ndarray, n: int) -> dict[str, Any]:
    """{"edges" (log10), "counts", "dead"} of the firing rates fired / n; rates below the first edge count in bin 0."""
    rates = np.log10(fired[fired > 0] / n).clip(DENSITY_EDGES[0], 0)
    counts, edges = np.histogram(rates, bins=DENSITY_EDGES)
    return {"edges": edges.tolist(), "counts": counts.tolist(), "dead": int((fired == 0).sum())}


def _metric(name: str, value: Any, n: int, data: str) -> Metric:
    defined = None if isinstance(value, float) and math.isnan(value) else value
    return {"value": defined, "definition": name, "n": n, "data": data}


# ---------------------------------------------------------------------------------------------------- predictions


@torch.no_grad()
def _predictions(
    sae: SAE,
    lm: LM,
    contexts: np.ndarray,
    replaced: np.ndarray,
    hook_name: str,
    data: str,
    batch_contexts: int,
    progress: Progress,
) -> dict[str, Metric]:
    if contexts.ndim != 2 or not len(contexts) or contexts.shape[1] < 2 or replaced.shape != contexts.shape:
        raise EvaluationError("Cross-entropy needs contexts of at least two tokens; capture more text.")
    sums = dict.fromkeys(("ce_original", "ce_with_sae", "ce_zero_ablated", "kl", "kl_zero_ablated"), 0.0)
    for start in range(0, len(contexts), batch_contexts):
        ids = torch.from_numpy(contexts[start : start + batch_contexts].astype(np.int64)).to(lm.device)
        mask = torch.from_numpy(replaced[start : start + batch_contexts]).to(lm.device)
        for name, value in _losses(sae, lm, ids, mask, hook_name).items():
            sums[name] += value
        progress(start + len(ids), len(contexts), "comparing predictions")
    n = contexts.shape[0] * (contexts.shape[1] - 1)
    values = {name: value / n for name, value in sums.items()}
    original, spliced, ablated = values["ce_original"], values["ce_with_sae"], values["ce_zero_ablated"]
    values["ce_increase"] = spliced - original
    values["ce_recovered"] = _ratio(ablated - spliced, ablated - original)
    values["kl_recovered"] = 1 - _ratio(values["kl"], values["kl_zero_ablated"])
    return {name: _metric(name, value, n, data) for name, value in values.items()}


def _ratio(above: float, below: float) -> float:
    return above / below if below else float("nan")


def _losses(sae: SAE, lm: LM, ids: Tensor, mask: Tensor, hook_name: str) -> dict[str, float]:
    """Sums over the predictions of contexts ids (b, t); the SAE and the zeros replace x where mask (b, t) is True."""

    def spliced(x: Tensor) -> Tensor:
        x = x.clone()
        x[mask] = sae(x[mask].to(sae.W_dec)).to(x)
        return x

    def ablated(x: Tensor) -> Tensor:
        return x.masked_fill(mask.unsqueeze(-1), 0)

    original = _log_probs(lm, ids)
    sums = {"ce_original": _cross_entropy(original, ids)}
    for function, ce, kl in ((spliced, "ce_with_sae", "kl"), (ablated, "ce_zero_ablated", "kl_zero_ablated")):
        with hooked(lm, {hook_name: function}):
            changed = _log_probs(lm, ids)
        sums[ce] = _cross_entropy(changed, ids)
        sums[kl] = float(F.kl_div(changed, original, reduction="none", log_target=True).sum(dtype=torch.float64))
    return sums


def _log_probs(lm: LM, ids: Tensor) -> Tensor:
    """Log-probabilities (b, t - 1, vocabulary) of every next token, float32."""
    logits = lm.model(input_ids=ids, use_cache=False).logits
    return logits[:, :-1].float().log_softmax(-1)


def _cross_entropy(log_probs: Tensor, ids: Tensor) -> float:
    return -float(log_probs.gather(-1, ids[:, 1:, None]).sum(dtype=torch.float64))
