"""Train a sparse autoencoder on a stream of activations: one loop, resumable to the bit, safe to kill at any moment."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from saehub.causes import memory_ran_out
from saes.numerics.jumprelu import JumpReLUSAE
from saes.numerics.sae import SAE
from training.numerics.checkpoint import FILE as CHECKPOINT
from training.numerics.checkpoint import TrainingError, claim
from training.numerics.initial import begin, first_b_dec, first_threshold
from training.numerics.live import look, memory_used
from training.numerics.losses import LOSSES, Outcome, Terms, variance
from training.numerics.micro import MICRO_ROWS, accumulate
from training.numerics.optim import Optimizer, fold_norms, matmul_precision, ramp
from training.numerics.ranks import ALONE, Ranks
from training.numerics.shards import Capture, Hooks
from training.numerics.threads import Scratch
from training.numerics.train_config import TrainConfig as TrainConfig
from training.numerics.train_state import StepReport as StepReport
from training.numerics.train_state import TrainState, resume, save
from training.numerics.transcoding import Units, row_width, sides

THRESHOLD_RATE = 0.01  # of BatchTopK's threshold
DIVERGED = 100  # times the first batch's squared error, or the variance: no run that is any good comes near it
WORSE = 2  # times the least squared error at a checkpoint, or the variance: such weights do not replace it

Batches = Iterator[Tensor] | Callable[[int], Iterator[Tensor]]


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


def capture_batches(capture: Capture, hook: Hooks, config: TrainConfig) -> Callable[[int], Iterator[Tensor]]:
    """The training rows of a capture in the config's order, from any row on: the `batches` that `train` can resume."""

    def batches(start_row: int) -> Iterator[Tensor]:
        return capture.batches(
            hook, config.batch_size, seed=config.order, n_rows=config.total_rows, start_row=start_row
        )

    return batches


def train(
    sae: SAE,
    batches: Batches,
    config: TrainConfig,
    on_step: Callable[[StepReport], None] | None = None,
    checkpoint_dir: str | Path | None = None,
    held_out: Tensor | None = None,
    should_stop: Callable[[], bool] | None = None,
    say: Callable[[str], None] | None = None,
    ranks: Ranks = ALONE,
) -> TrainResult:
    """Train `sae` in place until the config's last step, the end of the batches, or should_stop().

    batches: tensors (n, d_in) in the model's activation space, of a transcoder (n, d_in + d_out); an iterator, or a
    function from the first row wanted to an iterator, which is what resuming needs (an iterator must already begin where
    the checkpoint stopped).
    on_step gets a report every `log_every` steps and may raise to stop at once; should_stop is asked at every step and
    stops with a checkpoint. say gets sentences for the log. With `checkpoint_dir`, a checkpoint found there is
    continued, to the bit on a CPU: the result is that of training without the interruption.
    The decoder's bias starts at the mean of the first batch unless it is already set; with config.initialization weights,
    biases and thresholds start as that peer's.
    With several `ranks` each of them makes this call with the same arguments and batches, computes on its share of every
    batch, and ends with the same SAE; the first one alone reports, asks should_stop and writes checkpoints.

    Raises TrainingError: unknown architecture, other settings than the checkpoint's, batches of a wrong width, a loss
    that is not finite, a full disk.
    """
    training = Training(
        sae, config, on_step=on_step, checkpoint_dir=checkpoint_dir, held_out=held_out, say=say, ranks=ranks
    )
    stopped = False
    try:
        stream = iter(batches(training.state.tokens) if callable(batches) else batches)
        while not training.done:
            stopped = ranks.told(ranks.first and should_stop is not None and should_stop())
            x = None if stopped else next(stream, None)
            if x is None:
                training.check_begun(stopped)
                stopped = True
                break
            training.step(x)
        training.save()
    finally:
        training.close()
    return training.result(stopped)


class Training:
    """One SAE in training: its weights, Adam's moments, its counters, its checkpoint. `train` feeds one batch by batch,
    `together.train_together` several from one stream. Arguments and errors as of `train`."""

    def __init__(
        self,
        sae: SAE,
        config: TrainConfig,
        *,
        on_step: Callable[[StepReport], None] | None = None,
        checkpoint_dir: str | Path | None = None,
        held_out: Tensor | None = None,
        say: Callable[[str], None] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        _check(sae)
        self.sae, self.config, self.ranks = sae, config, ranks
        self.on_step, self.held_out = (on_step, held_out) if ranks.first else (None, None)
        self.say = say or (lambda sentence: None)
        self.folder = Path(checkpoint_dir) if checkpoint_dir is not None else None
        self.state, self._moments = resume(self.folder, sae, config)
        if config.initialization and not self._moments:
            begin(sae, config.initialization, torch.Generator().manual_seed(config.seed))
        self.units = Units.from_tensors(self._moments, sae.W_dec.device)  # of a transcoder, once it has begun
        self.folder = self.folder if ranks.first else None
        self._claim = claim(self.folder) if self.folder is not None else None
        self.micro_rows: int | None = None  # rows at once, where a whole batch does not fit into memory
        self._unsaid: list[str] = []
        self._due = False  # a checkpoint of the present weights, once the next batch has shown that they are sound
        self._clock, self._scratch = _Clock(self.state), Scratch()
        self._optimizer: Optimizer | None = None

    @property
    def done(self) -> bool:
        return self.state.step >= self.config.total_steps

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return self.config.lr_at(self.state.step, self.sae.config.d_sae)

    def step(self, x: Tensor) -> None:
        """One update from a batch x (n, d_in) in the model's activation space."""
        x = self.prepared(x)
        with matmul_precision(self.config.precision):
            outcome = self.gradients(x)
        self.update(x, outcome)
        self.after(x, outcome)

    def prepared(self, x: Tensor) -> Tensor:
        """The batch on the SAE's device, in the space its encoder reads; the first one sets the units of the loss."""
        if x.ndim != 2 or x.shape[1] != row_width(self.sae):
            raise TrainingError(
                f"The SAE takes activations of width {row_width(self.sae)}, but a batch has shape {tuple(x.shape)}; "
                "choose the hook point it is for."
            )
        with torch.no_grad():
            x = self._in_its_space(x)
            if self._optimizer is None:
                if self.state.step == 0:
                    _start(self.sae, x, self.state, self.config.initialization)
                self._optimizer = Optimizer(
                    self.sae,
                    self.config.betas,
                    self.state.scale,
                    self.config.unit_decoder(self.sae.config.architecture),
                )
                self._optimizer.load_state(self._moments)
                self._moments = {}
                self.ranks.equal(self._optimizer.tensors)
        return x

    def _in_its_space(self, x: Tensor) -> Tensor:
        """Rows on the SAE's device, normalised, or of a transcoder in the units it is trained in."""
        x = x.to(self.sae.W_dec.device)
        if self.sae.reconstructs:
            return self.sae.normalise(x)
        if self.units is None:
            self.units = Units.of(self.sae, x)
        return self.units.apply(self.sae, x)

    def gradients(self, x: Tensor) -> Outcome:
        """Of the loss on a prepared batch, within `matmul_precision`. Changes nothing but scratch memory.

        When memory runs out the batch goes through in parts of half the rows, and so on down to MICRO_ROWS.
        """
        terms, share = _terms(self.config, self.state, self.ranks), self.ranks.share(x)
        while True:
            try:
                outcome = accumulate(self.sae, share, terms, self._scratch, self.micro_rows or len(share))
                break
            except (MemoryError, RuntimeError) as error:
                if not memory_ran_out(error) or self.ranks.size > 1:  # ranks take every step together, or none
                    raise
                self._halve(len(share))
        outcome = self.ranks.sum(outcome)
        self._check_finite(outcome)
        return outcome

    def _halve(self, rows: int) -> None:
        """Half as many rows at once from here on."""
        half = (self.micro_rows or rows) // 2
        if half < MICRO_ROWS:
            raise TrainingError(
                f"Memory ran out at step {self.state.step + 1}, even with {self.micro_rows or rows} rows at once; "
                "choose fewer features or free some memory, and resume."
            )
        self.micro_rows, self._scratch = half, Scratch()
        self._unsaid.append(
            f"Memory ran out at step {self.state.step + 1}: batches of {rows:,} go through in parts of {half:,} rows, "
            "whose gradients are added up."
        )

    def update(self, x: Tensor, outcome: Outcome) -> None:
        """Adam's step, and the counters; before it a checkpoint, where one is due and the weights as they are did well on
        this batch. So what diverges never replaces the last good one."""
        assert self._optimizer is not None, "a batch is prepared before it updates"
        if self._due and self._good(outcome.squared_error):
            self.save()
        self._optimizer.step(outcome.grads, self.lr, self.config.clip_of(self.sae.config.architecture))
        follow_codes(self.sae, outcome.least, self.state.step)
        self.state.count(outcome.fired, len(x))

    def _good(self, error: float) -> bool:
        """Whether weights with this squared error may replace a checkpoint; remembers the least that did."""
        state = self.state
        if error > WORSE * max(state.kept_error or state.first_error, state.variance):
            return False
        state.kept_error = min(state.kept_error or error, error)
        return True

    def after(self, x: Tensor, outcome: Outcome) -> None:
        """When it is time, a report, and word that a checkpoint is due. Calls back, so that it belongs into the caller's own
        thread."""
        while self._unsaid:
            self.say(self._unsaid.pop(0))
        if self.state.step % self.config.log_every == 0 or self.done:
            report = self._report(x, outcome)
            self.state.history.append(report)
            if self.on_step is not None:
                self.on_step(report)
        self._due = self._due or self.state.step % self.config.checkpoint_every == 0

    def check_begun(self, stopped: bool) -> None:
        """Raises TrainingError for a stream that ends before its first batch."""
        if not stopped and self.state.step == 0:
            raise TrainingError("There are no activations to train on; capture more text.")

    def save(self) -> None:
        """Write the checkpoint, where there is a folder for it and a step was made."""
        self._due = False
        if self.folder is None or self._optimizer is None:
            return
        units = self.units.tensors() if self.units is not None else {}
        try:
            save(self.folder, self.config, self.state, self._optimizer, self._clock.seconds, units)
        except (MemoryError, RuntimeError) as error:  # what is written is copied first
            if not memory_ran_out(error):
                raise
            self._scratch = Scratch()
            save(self.folder, self.config, self.state, self._optimizer, self._clock.seconds, units)

    def close(self) -> None:
        """Give the SAE its ordinary layout back, with decoder rows of norm 1, in the language model's own space."""
        self._scratch = Scratch()
        if self._optimizer is not None:
            self._optimizer.release()
        elif self.state.step and not self.config.unit_decoder(self.sae.config.architecture):
            fold_norms(self.sae)  # a checkpoint of the last step holds them as they were trained
        if self.units is not None:
            self.units.fold(self.sae)
            fold_norms(self.sae)
            self.units = None
        if self._claim is not None:
            self._claim.release()

    def result(self, stopped: bool) -> TrainResult:
        state = self.state
        return TrainResult(self.sae, state.history, state.step, state.tokens, self._clock.seconds, state, stopped)

    def _report(self, x: Tensor, outcome: Outcome) -> StepReport:
        state, goal = self.state, sides(self.sae, x)[1]
        total_variance = float(variance(goal)) if len(x) > 1 else state.variance
        seen = look(self.sae, self._held_out_rows()) if self.held_out is not None else None
        return StepReport(
            step=state.step,
            tokens=state.tokens,
            loss=outcome.loss,
            parts=outcome.parts,
            l0=int(outcome.fired.sum()) / len(x),
            explained_variance=1 - outcome.squared_error / max(total_variance, 1e-30),
            held_out_explained_variance=seen["explained_variance"] if seen else None,
            held_out_explained_variance_per_dimension=seen["explained_variance_per_dimension"] if seen else None,
            held_out_cosine=seen["cosine"] if seen else None,
            dead=int((state.silent >= self.config.dead_after).sum()),
            lr=self.config.lr_at(state.step - 1, self.sae.config.d_sae),
            tokens_per_second=self._clock.rate(state.tokens),
            seconds=self._clock.seconds,
            memory=memory_used(self.sae.W_dec.device),
        )

    def _held_out_rows(self) -> Tensor:
        """As `look` takes them."""
        assert self.held_out is not None
        return self.held_out if self.sae.reconstructs else self._in_its_space(self.held_out)

    def _check_finite(self, outcome: Outcome) -> None:
        """Raises TrainingError for a loss that is not a number, or an error far above the first one."""
        if not math.isfinite(outcome.loss):
            raise TrainingError(self._diverged("is not a finite number"))
        state = self.state
        if not state.first_error:
            state.first_error = max(outcome.squared_error, state.variance)
        if outcome.squared_error > DIVERGED * state.first_error:
            times = outcome.squared_error / state.first_error
            raise TrainingError(self._diverged(f"grew (the reconstruction is {times:,.0f} times worse than at first)"))

    def _diverged(self, reason: str) -> str:
        kept = (
            " The last checkpoint is kept." if self.folder is not None and (self.folder / CHECKPOINT).exists() else ""
        )
        return f"The loss {reason} at step {self.state.step + 1}; lower the learning rate (now {self.lr:.2g}).{kept}"


# ---------------------------------------------------------------------------------------------------- the pieces


def _check(sae: SAE) -> None:
    config = sae.config
    if config.architecture not in LOSSES:
        raise TrainingError(f"A {config.architecture} SAE cannot be trained here; choose {' or '.join(LOSSES)}.")
    if not sae.reconstructs and (config.apply_b_dec_to_input or config.normalize_activations != "none"):
        raise TrainingError("A transcoder is trained on activations as they come: no b_dec subtracted, not normalised.")
    if sae.reconstructs and config.d_in != config.d_out:
        raise TrainingError(
            f"This SAE reads {config.d_in} numbers and writes {config.d_out}; only equal ones can be trained."
        )
    if sae.W_dec.dtype != torch.float32:
        raise TrainingError("SAEs are trained with float32 weights; load this one as float32.")


@torch.no_grad()
def _start(sae: SAE, x: Tensor, state: TrainState, whose: str | None) -> None:
    """Set the scales, and b_dec unless it is already set, from the first batch; see `initial` for `whose`."""
    x, goal = sides(sae, x)
    state.scale = float(x.norm(dim=-1).mean()) / math.sqrt(sae.config.d_in) if sae.reconstructs else 1.0  # see Units
    state.variance = float(variance(goal))
    if not (0 < state.scale < math.inf and 0 < state.variance < math.inf):
        raise TrainingError("The first batch has no variance, or is not finite; check the capture.")
    if not sae.b_dec.any():
        sae.b_dec.copy_(first_b_dec(sae, whose, goal))
    if isinstance(sae, JumpReLUSAE) and not sae.tensor("threshold").any():
        sae.tensor("threshold").fill_(first_threshold(whose, x, state.scale))


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
        autocast=config.precision == "bfloat16",
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
