"""What an SAE's reconstruction does to a language model's predictions: cross-entropy and KL, against two ablations."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from saes.numerics.lm import LM, hooked
from saes.numerics.sae import SAE
from training.numerics.definitions import EvaluationError
from training.numerics.replay import Prefix

Progress = Callable[[int, int | None, str], None]


@dataclass(frozen=True)
class Splice:
    """Where an SAE reads in a model and where what it gives back is put: the same place, but for transcoders. mean
    (d_out,): what the second ablation puts there."""

    sae: SAE
    lm: LM
    reads: str
    writes: str
    mean: Tensor


@dataclass(frozen=True)
class Contexts:
    """ids (c, t), every token the model sees; replaced (c, t), False where its activations are left alone; lengths (c,),
    where contexts are padded at their end: no padding is predicted."""

    ids: np.ndarray
    replaced: np.ndarray
    lengths: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or not len(self.ids) or self.ids.shape[1] < 2 or self.replaced.shape != self.ids.shape:
            raise EvaluationError("Cross-entropy needs contexts of at least two tokens; capture more text.")

    @property
    def predicted(self) -> np.ndarray:
        """(c, t - 1) True where the next token is a real one."""
        c, t = self.ids.shape
        ends = np.full(c, t) if self.lengths is None else self.lengths
        return np.arange(1, t) < ends[:, None]

    @property
    def predictions(self) -> int:
        return int(self.predicted.sum())


@torch.no_grad()
def predictions(splice: Splice, contexts: Contexts, batch_contexts: int, progress: Progress) -> dict[str, float]:
    """Means over all predictions of the contexts, NaN where one is not defined."""
    sums: dict[str, float] = {}
    device = splice.lm.device
    prefix = Prefix(splice.lm, (splice.reads, splice.writes))
    for start in range(0, len(contexts.ids), batch_contexts):
        part = slice(start, start + batch_contexts)
        ids = torch.from_numpy(contexts.ids[part].astype(np.int64)).to(device)
        mask = torch.from_numpy(contexts.replaced[part]).to(device)
        counted = torch.from_numpy(contexts.predicted[part]).to(device)
        for name, value in _losses(splice, prefix, ids, mask, counted).items():
            sums[name] = sums.get(name, 0.0) + value
        progress(start + len(ids), len(contexts.ids), "comparing predictions")
    values = {name: value / contexts.predictions for name, value in sums.items()}
    original, spliced = values["ce_original"], values["ce_with_sae"]
    zero, mean = values["ce_zero_ablated"], values["ce_mean_ablated"]
    return values | {
        "ce_increase": spliced - original,
        "ce_recovered": _ratio(zero - spliced, zero - original),
        "ce_recovered_mean": _ratio(mean - spliced, mean - original),
        "kl_recovered": 1 - _ratio(values["kl"], values["kl_zero_ablated"]),
    }


def _ratio(above: float, below: float) -> float:
    return above / below if below else float("nan")


def _losses(splice: Splice, prefix: Prefix, ids: Tensor, mask: Tensor, counted: Tensor) -> dict[str, float]:
    """Sums over the counted (b, t - 1) predictions of contexts ids (b, t)."""
    sae, read = splice.sae, {}

    def record(x: Tensor) -> None:
        read["x"] = x[mask]

    def spliced(y: Tensor) -> Tensor:
        x = y[mask] if splice.reads == splice.writes else read["x"]
        y = y.clone()
        y[mask] = sae(x.to(sae.W_dec)).to(y)
        return y

    def zeros(y: Tensor) -> Tensor:
        return y.masked_fill(mask.unsqueeze(-1), 0)

    def mean(y: Tensor) -> Tensor:
        return torch.where(mask.unsqueeze(-1), splice.mean.to(y), y)

    with prefix.recorded():
        original = _log_probs(splice.lm, ids)
    sums = {"ce_original": _cross_entropy(original, ids, counted)}
    for change, ce, kl in (
        (spliced, "ce_with_sae", "kl"),
        (zeros, "ce_zero_ablated", "kl_zero_ablated"),
        (mean, "ce_mean_ablated", ""),
    ):
        reading = {splice.reads: record} if change is spliced and splice.reads != splice.writes else {}
        with prefix.replayed(), hooked(splice.lm, {**reading, splice.writes: change}):
            changed = _log_probs(splice.lm, ids)
        sums[ce] = _cross_entropy(changed, ids, counted)
        if kl:
            each = F.kl_div(changed, original, reduction="none", log_target=True).sum(-1, dtype=torch.float64)
            sums[kl] = float(each[counted].sum())
    return sums


def _log_probs(lm: LM, ids: Tensor) -> Tensor:
    """Log-probabilities (b, t - 1, vocabulary) of every next token, float32."""
    logits = lm.model(input_ids=ids, use_cache=False).logits
    return logits.float().log_softmax(-1)[:, :-1]  # cut afterwards, where it is a view


def _cross_entropy(log_probs: Tensor, ids: Tensor, counted: Tensor) -> float:
    return -float(log_probs.gather(-1, ids[:, 1:, None]).squeeze(-1)[counted].sum(dtype=torch.float64))
