"""Train a sparse autoencoder on a stream of activations: one loop, resumable to the bit, safe to kill at any moment."""

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saes.numerics.sae import SAE
from training.numerics.checkpoint import FILE as CHECKPOINT
from training.numerics.checkpoint import TrainingError, load_checkpoint, save_checkpoint
from training.numerics.evaluate import explained_variance
from training.numerics.losses import LOSSES, Outcome, Terms, gradients, variance
from training.numerics.optim import Optimizer, matmul_precision, ramp
from training.numerics.ranks import ALONE, Ranks
from training.numerics.shards import Capture
from training.numerics.sparse import Scratch

THRESHOLD_RATE = 0.01  # of BatchTopK's threshold
FIRST_THRESHOLD = 0.01  # of a JumpReLU SAE, in units of the activations' scale (SAELens)

Batches = Iterator[Tensor] | Callable[[int], Iterator[Tensor]]


@dataclass(frozen=True)
class TrainConfig:
    """How an SAE is trained (what it is, d_sae and k included, is its SAEConfig).

    n_tokens: rows to train on, in batches of batch_size; `steps`, when given, is used instead.
    lr: peak learning rate of Adam; None means 1e-3 / sqrt(d_sae / 2^14): the scaling of Gao et al. 2024 with a larger
        constant than theirs (2e-4), which suits runs of 0.1 to 10 million tokens. Measured on 524k tokens, TopK 4,608,
        held-out FVU: 0.147 with lr 1e-3, 0.125 with 2e-3 (the default there is 1.9e-3), 0.116 with 4e-3 but four times
        as many features silent on the held-out tokens.
    lr_warmup, lr_decay: shares of the steps in which the rate rises from 0 and falls back to 0, linearly.
    l1_coefficient, l1_warmup: ReLU only; the penalty's weight (for activations of mean norm sqrt(d_in)) and the share
        of the steps in which it rises from 0. Measured on the same tokens: 1 gives L0 219 and FVU 0.165, 2 gives 37 and
        0.326; activations with a larger mean, for their spread, want a smaller one. Gated uses both as well.
    l0_coefficient: JumpReLU only; weight of its L0 penalty, rising over l1_warmup too. target_l0: with it the penalty
        is quadratic around that L0. bandwidth: see losses.Terms. (Names and defaults of SAELens.)
    aux_coefficient: weight of the dead features' term. dead_after_tokens: a feature is dead after so many tokens
        without firing; None means a quarter of the run, at most 10 million (the usual number). Much less takes rare
        features for dead ones: the term then keeps them from firing.
    clip: bound on the norm of the gradient, or None for none: Adam makes the step nearly independent of its scale.
    precision: "fast" (see optim.matmul_precision) or "float32".
    seed: the order of the rows, see `capture_batches`. The loop itself draws no random numbers.
    log_every, checkpoint_every: in steps.
    """

    n_tokens: int = 1_000_000
    steps: int | None = None
    batch_size: int = 2048
    lr: float | None = None
    lr_warmup: float = 0.02
    lr_decay: float = 0.2
    betas: tuple[float, float] = (0.9, 0.999)
    l1_coefficient: float = 2.0
    l1_warmup: float = 0.05
    l0_coefficient: float = 1.0
    target_l0: float | None = None
    bandwidth: float = 0.05
    aux_coefficient: float = 1 / 32
    dead_after_tokens: int | None = None
    clip: float | None = None
    precision: str = "fast"
    seed: int = 0
    log_every: int = 20
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        for name in ("n_tokens", "steps", "batch_size", "dead_after_tokens", "log_every", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise TrainingError(f"{name} is {value}; it must be at least 1.")
        for name in ("lr", "l1_coefficient", "l0_coefficient", "aux_coefficient", "clip"):
            value = getattr(self, name)
            if value is not None and not (0 <= value < math.inf):
                raise TrainingError(f"{name} is {value}; it must be a number of at least 0.")
        for name in ("target_l0", "bandwidth"):
            value = getattr(self, name)
            if value is not None and not (0 < value < math.inf):
                raise TrainingError(f"{name} is {value}; it must be a number above 0.")
        for name in ("lr_warmup", "lr_decay", "l1_warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise TrainingError(f"{name} is {getattr(self, name)}; it is a share of the steps, from 0 to 1.")
        if self.precision not in ("fast", "float32"):
            raise TrainingError(f'precision is "{self.precision}"; choose "fast" or "float32".')
        object.__setattr__(self, "betas", tuple(self.betas))

    @property
    def total_steps(self) -> int:
        return self.steps or math.ceil(self.n_tokens / self.batch_size)

    @property
    def total_rows(self) -> int:
        return self.steps * self.batch_size if self.steps else self.n_tokens

    def lr_at(self, step: int, d_sae: int) -> float:
        peak = self.lr if self.lr is not None else 1e-3 / math.sqrt(d_sae / 2**14)
        return peak * ramp(step, self.total_steps, self.lr_warmup, self.lr_decay)

    @property
    def dead_after(self) -> int:
        return self.dead_after_tokens or min(10_000_000, max(self.total_rows // 4, self.batch_size))


@dataclass(frozen=True)
class StepReport:
    """Where training stands after `step` steps. Loss, parts, l0 and explained_variance are of the last batch, before
    its update; held_out_explained_variance is of the held-out tensor, after it (None without one). tokens_per_second is
    since the last report."""

    step: int
    tokens: int
    loss: float
    parts: dict[str, float]
    l0: float
    explained_variance: float
    held_out_explained_variance: float | None
    dead: int
    lr: float
    tokens_per_second: float
    seconds: float


@dataclass
class TrainState:
    """What training knows beside weights and Adam's moments.

    step and tokens (rows consumed); seconds spent; scale and variance: mean |x| / sqrt(d_in) and
    mean |x - mean(x)|^2 of the first batch, the units of the loss; silent: (d_sae,)
    int64, tokens since each feature fired; history: the reports so far.
    """

    silent: Tensor
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    scale: float = 1.0
    variance: float = 1.0
    history: list[StepReport] = field(default_factory=list)

    def count(self, fired: Tensor, n: int) -> None:
        """Account for a batch of n rows in which each feature fired so often."""
        self.step += 1
        self.tokens += n
        self.silent = torch.where(fired > 0, 0, self.silent + n)


@dataclass(frozen=True)
class TrainResult:
    """`stopped` is True when should_stop ended training or the batches ran out before the last step."""

    sae: SAE
    history: list[StepReport]
    steps: int
    tokens: int
    seconds: float
    state: TrainState
    stopped: bool


def capture_batches(capture: Capture, hook: str, config: TrainConfig) -> Callable[[int], Iterator[Tensor]]:
    """The training rows of a capture in the config's order, from any row on: the `batches` that `train` can resume."""

    def batches(start_row: int) -> Iterator[Tensor]:
        return capture.batches(hook, config.batch_size, seed=config.seed, n_rows=config.total_rows, start_row=start_row)

    return batches


def train(
    sae: SAE,
    batches: Batches,
    config: TrainConfig,
    on_step: Callable[[StepReport], None] | None = None,
    checkpoint_dir: str | Path | None = None,
    held_out: Tensor | None = None,
    should_stop: Callable[[], bool] | None = None,
    ranks: Ranks = ALONE,
) -> TrainResult:
    """Train `sae` in place until the config's last step, the end of the batches, or should_stop().

    batches: tensors (n, d_in) in the model's activation space; an iterator, or a function from the first row wanted to
    an iterator, which is what resuming needs (an iterator must already begin where the checkpoint stopped).
    on_step gets a report every `log_every` steps and may raise to stop at once; should_stop is asked at every step and
    stops with a checkpoint. With `checkpoint_dir`, a checkpoint found there is continued, to the bit on a CPU: the
    result is that of training without the interruption.
    The decoder's bias starts at the mean of the first batch unless it is already set.
    With several `ranks` each of them makes this call with the same arguments and batches, computes on its share of every
    batch, and ends with the same SAE; the first one alone reports, asks should_stop and writes checkpoints.

    Raises TrainingError: unknown architecture, other settings than the checkpoint's, batches of a wrong width, a loss
    that is not finite, a full disk.
    """
    _check(sae)
    folder = Path(checkpoint_dir) if checkpoint_dir is not None else None
    state, moments = _resume(folder, sae, config)
    folder = folder if ranks.first else None
    stream = _rows(sae, batches, state.tokens)
    if state.step == 0:
        stream = _start(sae, stream, state)
    optimizer = Optimizer(sae, config.betas, state.scale)
    optimizer.load_state(moments)
    ranks.equal(optimizer.tensors)
    clock, scratch = _Clock(state), Scratch()
    stopped = False
    try:
        while state.step < config.total_steps:
            stop = ranks.told(ranks.first and should_stop is not None and should_stop())
            x = None if stop else next(stream, None)
            if x is None:
                stopped = True
                break
            lr = config.lr_at(state.step, sae.config.d_sae)
            with matmul_precision(config.precision):
                share = ranks.share(x)
                outcome = ranks.sum(gradients(sae, share, _terms(config, state, ranks), scratch))
            if not math.isfinite(outcome.loss):
                raise TrainingError(_diverged(state, lr, folder))
            optimizer.step(outcome.grads, lr, config.clip)
            follow_codes(sae, outcome.least, state.step)
            state.count(outcome.fired, len(x))
            if state.step % config.log_every == 0 or state.step == config.total_steps:
                report = _report(sae, x, config, state, outcome, lr, held_out if ranks.first else None, clock)
                state.history.append(report)
                if on_step is not None and ranks.first:
                    on_step(report)
            if folder is not None and state.step % config.checkpoint_every == 0:
                _save(folder, config, state, optimizer, clock)
        if folder is not None:
            _save(folder, config, state, optimizer, clock)
    finally:
        optimizer.release()
    return TrainResult(sae, state.history, state.step, state.tokens, clock.seconds, state, stopped)


# ---------------------------------------------------------------------------------------------------- the pieces


def _check(sae: SAE) -> None:
    config = sae.config
    if config.architecture not in LOSSES:
        raise TrainingError(f"A {config.architecture} SAE cannot be trained here; choose {' or '.join(LOSSES)}.")
    if config.d_in != config.d_out:
        raise TrainingError(
            f"This SAE reads {config.d_in} numbers and writes {config.d_out}; only equal ones can be trained."
        )
    if sae.W_dec.dtype != torch.float32:
        raise TrainingError("SAEs are trained with float32 weights; load this one as float32.")


def _rows(sae: SAE, batches: Batches, start_row: int) -> Iterator[Tensor]:
    """Batches on the SAE's device, in the space its encoder reads."""
    for x in batches(start_row) if callable(batches) else batches:
        if x.ndim != 2 or x.shape[1] != sae.config.d_in:
            raise TrainingError(
                f"The SAE takes activations of width {sae.config.d_in}, but a batch has shape {tuple(x.shape)}; choose "
                "the hook point it is for."
            )
        with torch.no_grad():  # left before the yield: the mode would otherwise reach whoever asked for the batch
            x = sae.normalise(x.to(sae.W_dec.device))
        yield x


@torch.no_grad()
def _start(sae: SAE, stream: Iterator[Tensor], state: TrainState) -> Iterator[Tensor]:
    """Set the scales, and b_dec unless it is already set, from the first batch; returns the stream with it."""
    x = next(stream, None)
    if x is None:
        raise TrainingError("There are no activations to train on; capture more text.")
    state.scale = float(x.norm(dim=-1).mean()) / math.sqrt(sae.config.d_in)
    state.variance = float(variance(x))
    if not (0 < state.scale < math.inf and 0 < state.variance < math.inf):
        raise TrainingError("The first batch has no variance, or is not finite; check the capture.")
    if not sae.b_dec.any():
        sae.b_dec.copy_(x.mean(0))
    if sae.config.architecture == "jumprelu" and not sae.tensor("threshold").any():
        sae.tensor("threshold").fill_(FIRST_THRESHOLD * state.scale)
    return itertools.chain([x], stream)


def _terms(config: TrainConfig, state: TrainState, ranks: Ranks) -> Terms:
    risen = ramp(state.step, config.total_steps, config.l1_warmup)
    return Terms(
        dead=(state.silent >= config.dead_after).nonzero().flatten(),
        scale=state.scale,
        variance=state.variance,
        l1=config.l1_coefficient * risen,
        l0=config.l0_coefficient * risen,
        aux=config.aux_coefficient,
        bandwidth=config.bandwidth,
        target_l0=config.target_l0,
        ranks=ranks,
    )


@torch.no_grad()
def follow_codes(sae: SAE, least: float | None, step: int) -> None:
    """BatchTopK's threshold: the running mean of each batch's smallest code above 0, with weight 0.01 (as in SAELens),
    beginning at the first batch's own. Other architectures have none that follows."""
    if sae.config.architecture != "batchtopk" or least is None:
        return
    threshold = sae.tensor("threshold")
    threshold.copy_(threshold + (least - threshold) * (THRESHOLD_RATE if step else 1.0))


def _report(
    sae: SAE,
    x: Tensor,
    config: TrainConfig,
    state: TrainState,
    outcome: Outcome,
    lr: float,
    held_out: Tensor | None,
    clock: "_Clock",
) -> StepReport:
    total_variance = float(variance(x)) if len(x) > 1 else state.variance
    return StepReport(
        step=state.step,
        tokens=state.tokens,
        loss=outcome.loss,
        parts=outcome.parts,
        l0=int(outcome.fired.sum()) / len(x),
        explained_variance=1 - outcome.squared_error / max(total_variance, 1e-30),
        held_out_explained_variance=explained_variance(sae, held_out) if held_out is not None else None,
        dead=int((state.silent >= config.dead_after).sum()),
        lr=lr,
        tokens_per_second=clock.rate(state.tokens),
        seconds=clock.seconds,
    )


def _diverged(state: TrainState, lr: float, folder: Path | None) -> str:
    kept = " The last checkpoint is kept." if folder is not None and (folder / CHECKPOINT).exists() else ""
    return f"The loss is not a finite number at step {state.step + 1}; lower the learning rate (now {lr:.2g}).{kept}"


class _Clock:
    """Seconds of a run, those before a resume included, and the rate since it was last asked."""

    def __init__(self, state: TrainState) -> None:
        self._start = time.monotonic() - state.seconds
        self._last = time.monotonic(), state.tokens

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def rate(self, tokens: int) -> float:
        (then, before), now = self._last, time.monotonic()
        self._last = now, tokens
        return (tokens - before) / max(now - then, 1e-9)


# ---------------------------------------------------------------------------------------------------- checkpoints


def _save(folder: Path, config: TrainConfig, state: TrainState, optimizer: Optimizer, clock: _Clock) -> None:
    tensors = {f"sae.{name}": tensor for name, tensor in optimizer.tensors.items()} | optimizer.state()
    tensors["silent"] = state.silent
    state.seconds = clock.seconds
    facts = {name: getattr(state, name) for name in ("step", "tokens", "seconds", "scale", "variance")}
    facts["history"] = [asdict(report) for report in state.history]
    save_checkpoint(folder, tensors, facts | _identity(optimizer.sae, config))


def _resume(folder: Path | None, sae: SAE, config: TrainConfig) -> tuple[TrainState, dict[str, Tensor]]:
    """The state and the optimiser's moments to go on from, with the weights put into `sae`; fresh ones without a
    checkpoint."""
    device = sae.W_dec.device
    found = load_checkpoint(folder) if folder is not None else None
    if found is None:
        return TrainState(torch.zeros(sae.config.d_sae, dtype=torch.int64, device=device)), {}
    tensors, facts = found
    changed = [key for key, value in _flat(_identity(sae, config)).items() if _flat(facts).get(key) != value]
    if changed:
        raise TrainingError(
            f"The checkpoint in {folder} was made with another {' and '.join(changed)}; choose a new folder, or the "
            "same settings to continue it."
        )
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            saved = tensors[f"sae.{name}"]
            parameter.copy_(saved.t() if name == "W_enc" else saved)
    history = [StepReport(**report) for report in facts["history"]]
    numbers = {name: facts[name] for name in ("step", "tokens", "seconds", "scale", "variance")}
    return TrainState(tensors["silent"].to(device), history=history, **numbers), tensors


def _identity(sae: SAE, config: TrainConfig) -> dict[str, Any]:
    """What must be equal for a checkpoint to be continued."""
    free = ("log_every", "checkpoint_every")
    settings = {name: value for name, value in asdict(config).items() if name not in free}
    shape = {
        name: getattr(sae.config, name)
        for name in ("architecture", "d_in", "d_sae", "k", "options", "normalize_activations")
    }
    return {
        "config": json.loads(json.dumps(settings)),
        "sae": shape | {"apply_b_dec_to_input": sae.config.apply_b_dec_to_input},
    }


def _flat(facts: dict[str, Any]) -> dict[str, Any]:
    return facts["config"] | facts["sae"]
