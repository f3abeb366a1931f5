"""A worker killed with `kill -9` in the middle of training: what it trained goes on from its checkpoints, is finished once,
and ends with the weights of training that nobody interrupted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from saehub.jobs.models import Job, State
from saes.models import SAE
from tests.conftest import manage, process_named, wait_for
from tests.steering_rows import rows_of_the_run, steering_files  # noqa: F401
from training.models import Capture, Run, Sweep
from training.numerics.checkpoint import FILE

pytestmark = [pytest.mark.usefixtures("committed"), pytest.mark.timeout(1800)]
HOOK = "blocks.1.hook_resid_post"
# A checkpoint at each twentieth of some seconds: there is time to see the first.
CONFIG = {"d_sae": 512, "k": 8, "n_tokens": 300_000, "batch_size": 1024, "seed": 0}


def ended(row: Any, seconds: int = 600) -> Job:
    """The row's job, once it is over; it has to be done."""
    job = wait_for(
        lambda: Job.objects.filter(pk=row.job_id).exclude(state__in=("queued", "running")).first(), seconds, str(row)
    )
    assert job.state == State.DONE, job.error
    row.refresh_from_db()
    return job


@pytest.fixture
def capture(committed: None, steering_files: Path, tiny_model_dir: Path) -> Iterator[Capture]:  # noqa: F811
    """A capture, with workers that go on when one of them is killed."""
    with rows_of_the_run(steering_files, tiny_model_dir, None) as rows, manage("work", "gpu"):
        yield rows.capture


def saes_made() -> int:
    return SAE.objects.exclude(name="tiny-sae").count()


def kill_once_there_is_a_checkpoint(job: Job, runs: list[Run]) -> None:
    """kill -9 of the worker, with whom its child dies."""
    files = [run.folder / "checkpoints" / FILE for run in runs]
    wait_for(lambda: all(file.exists() for file in files), 300, "a checkpoint")
    child, worker = process_named(f"job {job.pk}"), process_named(f"for job {job.pk}")
    worker.kill()
    child.wait(60)


def weights(run: Run) -> dict[str, torch.Tensor]:
    run.refresh_from_db()
    assert run.ready and run.sae
    return load_file(run.sae.files / "sae_weights.safetensors")


def assert_went_on(job: Job, runs: list[Run]) -> None:
    assert job.attempt == 2
    said = [line for line in job.lines.values_list("text", flat=True) if "continued at step" in line]
    assert len(said) == len(runs)
    for run in runs:
        run.refresh_from_db()
        steps = list(run.points.values_list("step", flat=True))
        assert steps == sorted(set(steps)), "no step is shown twice"
        assert run.tokens == CONFIG["n_tokens"]


def same_to_the_bit(one: Run, other: Run) -> None:
    for name, tensor in weights(one).items():
        assert torch.equal(tensor, weights(other)[name]), name


def test_a_run_survives_the_death_of_its_worker(capture: Capture) -> None:
    made = []
    for name in ("killed", "whole"):
        run = Run.objects.create(
            name=name, capture=capture, hook_name=HOOK, architecture="topk", config=CONFIG, evaluate_after=False,
            harvest_after=False,
        )  # fmt: skip
        job = run.start(None)
        if name == "killed":
            kill_once_there_is_a_checkpoint(job, [run])
        job = ended(run)
        made.append(run)
        if name == "killed":
            assert_went_on(job, [run])
            assert saes_made() == 1
    same_to_the_bit(*made)


def test_a_sweep_survives_the_death_of_its_worker(capture: Capture) -> None:
    made: list[list[Run]] = []
    for name in ("killed", "whole"):
        sweep = Sweep.objects.create(name=name, capture=capture, grid={"k": [4, 8]}, config=CONFIG)
        runs = [
            Run.objects.create(
                name=f"{name} {k}", capture=capture, sweep=sweep, hook_name=HOOK, architecture="topk",
                config=CONFIG | {"k": k}, evaluate_after=False, harvest_after=False,
            )
            for k in (4, 8)
        ]  # fmt: skip
        job = sweep.start(None)
        if name == "killed":
            kill_once_there_is_a_checkpoint(job, runs)
        job = ended(sweep)
        made.append(runs)
        if name == "killed":
            assert_went_on(job, runs)
            assert saes_made() == 2
    for one, other in zip(*made, strict=True):
        same_to_the_bit(one, other)
