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
    device, passes = splice.lm.device, _Passes(splice)
    for start in range(0, len(contexts.ids), batch_contexts):
        part = slice(start, start + batch_contexts)
        ids = torch.from_numpy(contexts.ids[part].astype(np.int64)).to(device)
        mask = torch.from_numpy(contexts.replaced[part]).to(device)
        counted = torch.from_numpy(contexts.predicted[part]).to(device)
        for name, value in passes.sums(ids, mask, counted).items():
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


class _Passes:
    """The passes of a model over batches of contexts: as it is, with the SAE in it, and with what it reads there erased."""

    def __init__(self, splice: Splice) -> None:
        self.splice = splice
        self.prefix = Prefix(splice.lm, (splice.reads, splice.writes))
        self.known: dict[str, tuple[Tensor, Tensor]] = {}  # of an ablation: a stream (t, d), its log-probabilities

    def sums(self, ids: Tensor, mask: Tensor, counted: Tensor) -> dict[str, float]:
        """Sums over the counted (b, t - 1) predictions of contexts ids (b, t)."""
        with self.prefix.recorded():
            original = _log_probs(self.splice.lm, ids)
        changed = self._spliced(ids, mask)
        sums = {
            "ce_original": _cross_entropy(original, ids, counted),
            "ce_with_sae": _cross_entropy(changed, ids, counted),
            "kl": _kl(changed, original, counted),
        }
        changed = self._ablated("zero", torch.zeros_like(self.splice.mean), ids, mask)
        sums["ce_zero_ablated"] = _cross_entropy(changed, ids, counted)
        sums["kl_zero_ablated"] = _kl(changed, original, counted)
        changed = self._ablated("mean", self.splice.mean, ids, mask)
        sums["ce_mean_ablated"] = _cross_entropy(changed, ids, counted)
        return sums

    def _spliced(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Log-probabilities (b, t - 1, vocabulary) with what the SAE makes of the replaced tokens in their place."""
        sae, at, read = self.splice.sae, self.splice, {}

        def record(x: Tensor) -> None:
            read["x"] = x[mask]

        def spliced(y: Tensor) -> Tensor:
            x = y[mask] if at.reads == at.writes else read["x"]
            y = y.clone()
            y[mask] = sae(x.to(sae.W_dec)).to(y)
            return y

        reading = {} if at.reads == at.writes else {at.reads: record}
        with self.prefix.replayed(), hooked(at.lm, {**reading, at.writes: spliced}):
            return _log_probs(at.lm, ids)

    def _ablated(self, name: str, value: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Log-probabilities (b, t - 1, vocabulary) with value (d,) at the replaced tokens.

        Where that is the residual stream between two blocks, nothing else of a context reaches the blocks above: contexts
        that are left with the same stream, mostly all of them, have the same predictions, and these are computed once.
        """
        if not self.prefix.ends_at(self.splice.writes):
            return self._erased(value, ids, mask, None)
        left = torch.where(mask.unsqueeze(-1), value.to(self.prefix.hidden), self.prefix.hidden)
        found = [self.known[name]] if name in self.known else []
        streams = [stream for stream, _ in found]
        kinds, new = [], []
        for row, stream in enumerate(left):
            kind = next((n for n, other in enumerate(streams) if torch.equal(other, stream)), len(streams))
            if kind == len(streams):
                streams.append(stream)
                new.append(row)
            kinds.append(kind)
        log_probs = [values for _, values in found]
        if new:
            log_probs.extend(self._erased(value, ids[new], mask[new], new))
        self.known.setdefault(name, (streams[0].clone(), log_probs[0].clone()))
        return torch.stack([log_probs[kind] for kind in kinds])

    def _erased(self, value: Tensor, ids: Tensor, mask: Tensor, rows: list[int] | None) -> Tensor:
        def erased(y: Tensor) -> Tensor:
            return torch.where(mask.unsqueeze(-1), value.to(y), y)

        with self.prefix.replayed(rows), hooked(self.splice.lm, {self.splice.writes: erased}):
            return _log_probs(self.splice.lm, ids)


def _log_probs(lm: LM, ids: Tensor) -> Tensor:
    """Log-probabilities (b, t - 1, vocabulary) of every next token, float32."""
    logits = lm.model(input_ids=ids, use_cache=False).logits
    return logits.float().log_softmax(-1)[:, :-1]  # cut afterwards, where it is a view


def _cross_entropy(log_probs: Tensor, ids: Tensor, counted: Tensor) -> float:
    return -float(log_probs.gather(-1, ids[:, 1:, None]).squeeze(-1)[counted].sum(dtype=torch.float64))


def _kl(log_probs: Tensor, original: Tensor, counted: Tensor) -> float:
    each = F.kl_div(log_probs, original, reduction="none", log_target=True).sum(-1, dtype=torch.float64)
    return float(each[counted].sum())
