"""A sweep between the database and the trainer: its runs side by side on one stream, each with curves of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from saehub.jobs.progress import Cancelled, JobError, Progress
from training.models import Run, Sweep
from training.numerics.checkpoint import TrainingError
from training.numerics.shards import Hooks, open_capture
from training.numerics.together import Member, Streams, capture_streams, train_together
from training.numerics.train import TrainConfig, Training, TrainResult
from training.registering import keep, new_sae
from training.trainer import (
    LOOK_SECONDS,
    Trainer,
    checkpoints,
    held_out_rows,
    prepare_kernels,
    reading,
    trainer_config,
)


class Sweeper:
    """Trains the runs of a sweep that are not over. One that diverges, is stopped or paused ends alone."""

    def __init__(self, progress: Progress, sweep: Sweep) -> None:
        self.progress, self.sweep = progress, sweep
        self.looked = 0.0
        self.training = False  # the first tokens are read
        self.members: list[Member] = []
        self.asked: set[int] = set()  # runs that are to stop here, kept or paused
        self.cancelled: Cancelled | None = None
        self.began = time.monotonic()

    def train(self) -> dict[str, Any]:
        """Raises Cancelled once every run has its checkpoint, so that a retry goes on from here; JobError when not one
        of them became an SAE."""
        self.sweep.runs.filter(job=self.progress.job, ready_at=None, pause_at__isnull=False).update(job=None)
        runs = list(self.sweep.waiting().filter(job=self.progress.job).order_by("pk").select_related("owner"))
        for run in runs:
            run.capture = self.sweep.capture
        if runs:
            self.progress.start(f"Preparing {len(runs)} SAEs", unit="SAEs", total=len(runs))
            self.source = open_capture(self.sweep.capture.folder)  # once: a stream keeps its model and its window
        for run in runs:
            self.members.append(self._member(run))
            self.progress(len(self.members), len(runs))
        if self.members:
            config = self.members[0].training.config
            prepare_kernels(self.progress, [member.training.sae for member in self.members], config)
            self.progress.start(reading(self.source), unit="tokens")
            train_together(self.members, self._streams(config), on_end=self._end, should_stop=self._should_stop)
        if self.cancelled:
            raise self.cancelled
        self._report()
        self.progress.flush()
        return self._summary()

    def _member(self, run: Run) -> Member:
        config = trainer_config(run)
        trainer = Trainer(self.progress, run, config)
        trainer.begin()
        training = Training(
            new_sae(run, self.source, config.seed),
            config,
            on_step=trainer.point,
            checkpoint_dir=checkpoints(run),
            held_out=held_out_rows(self.source, run.hooks),
            say=lambda sentence: self.progress.log(f"{run.name}: {sentence}"),
        )
        return Member(run, run.hooks, training)

    def _streams(self, config: TrainConfig) -> Streams:
        """Of the capture; the card says what goes on once the first batch of them is read."""
        streams = capture_streams(self.source, list(dict.fromkeys(member.hook for member in self.members)), config)

        def told(start_row: int) -> Iterator[Mapping[Hooks, Tensor]]:
            for xs in streams(start_row):
                if not self.training:
                    self.training = True
                    step = f"Training {len(self.members)} SAEs side by side"
                    self.progress.start(step, unit="tokens", total=self._total())
                yield xs

        return told

    def _should_stop(self, member: Member) -> bool:
        """Asked of every run before every step."""
        now = time.monotonic()
        if now - self.looked >= LOOK_SECONDS:
            self.looked = now
            self._look()
        return self.cancelled is not None or _run(member).pk in self.asked

    def _look(self) -> None:
        try:
            self._report()
        except Cancelled as cancelled:
            self.cancelled = cancelled
        wanted = self.sweep.runs.exclude(stop_at=None, pause_at=None)
        self.asked = set(wanted.values_list("pk", flat=True))

    def _report(self) -> None:
        done = sum(member.training.state.tokens for member in self.members)
        self.progress(done, self._total() if self.training or done else None)

    def _total(self) -> int:
        return sum(member.training.config.total_rows for member in self.members)

    def _end(self, member: Member, outcome: TrainResult | TrainingError) -> None:
        """One run is over: registered, failed, or left at its checkpoint."""
        run = _run(member)
        if isinstance(outcome, TrainingError):
            self._fail(run, str(outcome))
        elif outcome.stopped and self.cancelled:
            return
        elif outcome.stopped and Run.objects.filter(pk=run.pk, stop_at=None, pause_at__isnull=False).update(job=None):
            self.progress.log(f"{run.name} paused after step {outcome.steps:,}")
        elif not outcome.steps:
            self._fail(run, "The run was stopped before its first step, so there is nothing to keep.")
        else:
            keep(run, outcome)
            self.progress.log(f"{run.name} {'stopped' if outcome.stopped else 'finished'} at step {outcome.steps:,}")

    def _fail(self, run: Run, sentence: str) -> None:
        Run.objects.filter(pk=run.pk).update(error=sentence, stop_at=None)
        self.progress.log(f"{run.name} ended: {sentence}")

    def _summary(self) -> dict[str, Any]:
        runs = list(self.sweep.runs.order_by("pk"))
        kept, failed = [run for run in runs if run.ready], [run for run in runs if run.error]
        if failed and len(failed) == len(runs):
            raise JobError(
                f"None of the {len(runs)} runs became an SAE. The first: {failed[0].error}",
                "Change what they have in common, and start another sweep.",
            )
        self.sweep.finish(seconds=(self.sweep.seconds or 0.0) + time.monotonic() - self.began)
        early = not all(member.training.done for member in self.members)
        found = {"saes": [run.sae_id for run in kept], "failed": len(failed), "runs": len(runs)}
        return found | ({"ended_early": True} if early else {})


def _run(member: Member) -> Run:
    assert isinstance(member.key, Run)
    return member.key
