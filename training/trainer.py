"""One training run between the database and the trainer: its curves, Cancel, Stop and keep, its checkpoint."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from django.db.models import Q

from saehub.jobs.progress import Cancelled, JobError, Progress
from saes.numerics.sae import SAE
from training.models import Run, RunPoint
from training.numerics.checkpoint import load_checkpoint
from training.numerics.compiling import load_kernels
from training.numerics.several import RankKilled, Several, Task
from training.numerics.shards import Capture as Shards
from training.numerics.shards import Hooks
from training.numerics.train import StepReport, TrainConfig, TrainResult, capture_batches, train
from training.run_document import of_run

HELD_OUT_ROWS = 512  # held-out rows behind the live curve; the evaluation afterwards uses all of them
LOOK_SECONDS = 0.5  # between looks at the database
COMPILING = "Compiling kernels, the first time on this machine (about 20 s)"
COMPUTING = "Loading the model, and computing the first activations"
LISTEN_SECONDS = 0.1  # between looks at what the ranks of a run in several processes say
WEIGHTS = ("sae_weights.safetensors", "sae.safetensors")  # as SAELens or sparsify names them
SAE_FILES = ("cfg.json", *WEIGHTS, "history.json", "config.json", "metrics.json")


def trainer_config(run: Run) -> TrainConfig:
    """The run's TrainConfig. Unless it says otherwise its curve has about 150 points however long it is, and at most a
    twentieth of it is lost with its worker."""
    given = {key: value for key, value in run.config.items() if key in TrainConfig.__dataclass_fields__}
    steps = TrainConfig(**given).total_steps
    return TrainConfig(
        **{"log_every": max(1, steps // 150), "checkpoint_every": min(500, max(10, steps // 20))} | given
    )


class Paused(Exception):
    """A run ended at a checkpoint to be continued later: its worker is free, and the run is not finished."""

    def __init__(self, step: int) -> None:
        super().__init__(f"paused at step {step}")
        self.step = step


class Trainer:
    """Trains a run's SAE. Its curve is written as it grows; Cancel and Stop are heard between any two steps."""

    def __init__(self, progress: Progress, run: Run, config: TrainConfig) -> None:
        self.progress, self.run, self.config = progress, run, config
        self.tokens = 0
        self.looked = 0.0
        self.training = False  # the first tokens are read
        self.cancelled: Cancelled | None = None

    def train(self, sae: SAE, source: Shards) -> TrainResult:
        """Raises Cancelled once the checkpoint of the present step is written, so that a retry goes on from here."""
        prepare_kernels(self.progress, [sae], self.config)
        self.begin()
        if self.run.processes > 1:
            self._train_in_several(sae, source)
        else:
            self.progress.start(reading(source), unit="tokens")
        result = train(
            sae,
            self._batches(source),
            self.config,
            on_step=self.point,
            checkpoint_dir=checkpoints(self.run),
            held_out=held_out_rows(source, self.run.hooks),
            should_stop=self.should_stop if self.run.processes == 1 else lambda: True,
            say=self.progress.log,
        )
        if self.cancelled:
            raise self.cancelled
        if result.stopped and self.pausing():
            self.progress(result.tokens, self.config.total_rows)
            self.progress.flush()
            self.progress.log(f"paused after step {result.steps:,} of {self.config.total_steps:,}")
            raise Paused(result.steps)
        if not result.steps:
            Run.objects.filter(pk=self.run.pk).update(stop_at=None)  # else a retry would stop before its first step too
            raise JobError(
                "The run was stopped before its first step, so there is nothing to keep.", "Press Retry to train."
            )
        if result.stopped:
            self.progress.log(f"stopped at step {result.steps:,} of {self.config.total_steps:,}, and kept")
        return result

    def _train_in_several(self, sae: SAE, source: Shards) -> None:
        """Train in processes of their own up to a checkpoint, which is what is left to load of it."""
        task = Task(
            sae=asdict(sae.config),
            config=asdict(self.config),
            capture=str(source.path),
            hooks=self.run.hooks,
            checkpoints=str(checkpoints(self.run)),
            held_out_rows=min(HELD_OUT_ROWS, source.split_rows("held_out")),
        )
        self.progress.start(f"Starting {self.run.processes} processes, which share each batch", unit="tokens")
        ranks = Several(task, self.run.processes, self.run.folder / "ranks")
        asked = False
        try:
            running = True
            while running:
                running = ranks.running()  # asked before listening: what was said last is then heard
                for word in ranks.said():
                    self._hear(word)
                if running and not asked and self.asked_to_stop():
                    asked = True
                    ranks.stop()
                time.sleep(LISTEN_SECONDS if running else 0)
        finally:
            ranks.kill()
        try:
            ranks.check()
        except RankKilled as error:
            raise JobError(str(error), "Press Retry to go on from the last checkpoint.") from error

    def _batches(self, source: Shards) -> Callable[[int], Iterator[torch.Tensor]]:
        """Of the capture; the card says what goes on once the first of them is read."""
        batches = capture_batches(source, self.run.hooks, self.config)

        def told(start_row: int) -> Iterator[torch.Tensor]:
            for x in batches(start_row):
                self._under_way()
                yield x

        return told

    def _under_way(self) -> None:
        if not self.training:
            self.training = True
            self.progress.start(f"Training on {self.run.place}", unit="tokens", total=self.config.total_rows)

    def _hear(self, word: StepReport | int) -> None:
        self._under_way()
        if isinstance(word, StepReport):
            self.point(word)
        else:
            self.tokens = max(self.tokens, word)

    def begin(self) -> None:
        """Where an earlier attempt left off, and no points of steps that will be done again."""
        saved = load_checkpoint(checkpoints(self.run))
        facts = saved[1] if saved else {"step": 0, "tokens": 0}
        self.run.points.filter(step__gt=facts["step"]).delete()
        self.tokens = facts["tokens"]
        if saved:
            self.progress.log(f"continued at step {facts['step']:,} of {self.config.total_steps:,}")

    def point(self, report: StepReport) -> None:
        """A point of the curves. A repeated step (its checkpoint is older than its point) replaces the old one."""
        values = asdict(report)
        point = RunPoint(run=self.run, step=values.pop("step"), tokens=values.pop("tokens"), values=values)
        RunPoint.objects.bulk_create(
            [point], update_conflicts=True, unique_fields=["run", "step"], update_fields=["tokens", "values"]
        )
        self.tokens = report.tokens

    def should_stop(self) -> bool:
        """Asked before every step."""
        stop = self.asked_to_stop()
        self.tokens += self.config.batch_size
        return stop

    def asked_to_stop(self) -> bool:
        """Whether somebody wants the run to end here; looks at the database now and then."""
        now = time.monotonic()
        if now - self.looked < LOOK_SECONDS:
            return False
        self.looked = now
        total = self.config.total_rows
        try:
            self.progress(min(self.tokens, total), total if self.training or self.tokens else None)
        except Cancelled as cancelled:
            self.cancelled = cancelled
            return True
        return Run.objects.filter(Q(stop_at__isnull=False) | Q(pause_at__isnull=False), pk=self.run.pk).exists()

    def pausing(self) -> bool:
        """Whether it is to end here with its checkpoint and no SAE; to stop and keep goes before."""
        return Run.objects.filter(pk=self.run.pk, stop_at=None, pause_at__isnull=False).exists()


def prepare_kernels(progress: Progress, saes: Iterable[SAE], config: TrainConfig) -> None:
    """Load the kernels that the steps of these SAEs need, and say it where they are compiled first."""
    progress.start("Loading the compiled kernels", unit="tokens")
    for sae in saes:
        load_kernels(sae, config, lambda: progress.start(COMPILING, unit="tokens"))


def reading(source: Shards) -> str:
    """What goes on before the first step, in words."""
    return "Reading the first activations" if source.manifest.get("stored", True) else COMPUTING


def checkpoints(run: Run) -> Path:
    return run.folder / "checkpoints"


def held_out_rows(source: Shards, hook: Hooks) -> torch.Tensor | None:
    rows = min(HELD_OUT_ROWS, source.split_rows("held_out"))
    if not rows:
        return None
    return next(source.batches(hook, rows, split="held_out", shuffle=False, n_rows=rows))


def reproduction(run: Run) -> dict[str, Any]:
    """Everything needed to train the same SAE again, as JSON."""
    capture = run.capture
    return {
        "run": {
            "id": run.pk,
            "name": run.name,
            "hook_name": run.hook_name,
            "hook_name_out": run.hook_name_out,
            "architecture": run.architecture,
        },
        "config": run.config,
        "document": of_run(run),
        "capture": {"id": capture.pk, "name": capture.name, **capture.manifest},
        "made_with": {name: version(name) for name in ("torch", "transformers", "safetensors", "numpy")},
        "machine": {
            "processor": platform.machine(),
            "device": str(torch.get_default_device()),
            "threads": torch.get_num_threads(),
        },
    }
