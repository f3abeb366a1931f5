"""What the card of a training job says before its first step."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from saehub.jobs.models import Job, State
from training import trainer
from training.models import Sweep
from training.numerics.compiling import tells_of_compiling
from training.numerics.shards import Capture

ROOT = Path(__file__).parents[2]
COMPILES = """
import numba
from training.numerics.compiling import tells_of_compiling

def twice(x):
    return x + x

with tells_of_compiling(lambda: print("compiles")):
    for signature in ("int64(int64)", "float64(float64)"):
        numba.njit(signature, cache=True)(twice)
"""


def lines(job: Job) -> list[str]:
    return list(job.lines.values_list("text", flat=True))


def but_of_compiling(job: Job) -> list[str]:
    """Whether this run has to compile the kernels depends on what ran before it on this machine."""
    return [text for text in lines(job) if text != trainer.COMPILING]


@pytest.mark.django_db
@pytest.mark.parametrize(
    "stored, reads", [(True, "Reading the first activations"), (False, trainer.COMPUTING)], ids=["stored", "streamed"]
)
def test_a_run_says_what_it_does_before_it_counts_tokens(
    make_capture: Any, make_run: Any, monkeypatch: pytest.MonkeyPatch, stored: bool, reads: str
) -> None:
    make_capture(stored=stored)
    seen: list[tuple[str, int | None, int]] = []
    batches = Capture.batches

    def look(self: Any, *args: Any, **more: Any) -> Any:
        job = Job.objects.get(state=State.RUNNING)
        seen.append((job.step, job.total, job.done))
        return batches(self, *args, **more)

    monkeypatch.setattr(Capture, "batches", look)
    run, job = make_run(evaluate_after=False, harvest_after=False)
    assert job.state == State.DONE, job.traceback
    assert set(seen) == {(reads, None, 0)}, "no count of tokens while none is trained on"
    assert but_of_compiling(job)[:3] == ["Loading the compiled kernels", reads, f"Training on {run.place}"]
    job.refresh_from_db()
    assert (job.done, job.total) == (run.tokens, run.tokens)


@pytest.mark.django_db
def test_a_sweep_says_it_too(make_capture: Any, run_job: Any, user_of: Any) -> None:
    capture, _ = make_capture()
    config = {"d_sae": 64, "k": 4, "n_tokens": 640, "batch_size": 64}
    sweep = Sweep.objects.create(name="sweep", capture=capture, owner=user_of("researcher"), grid={"k": [4, 8]})
    for k in (4, 8):
        sweep.runs.create(
            name=f"k {k}", capture=capture, owner=sweep.owner, architecture="topk", hook_name=capture.hook_names[0],
            config=config | {"k": k}, evaluate_after=False, harvest_after=False,
        )  # fmt: skip
    job = run_job(sweep.start(sweep.owner))
    assert job.state == State.DONE, job.traceback
    assert but_of_compiling(job)[:4] == [
        "Preparing 2 SAEs", "Loading the compiled kernels", "Reading the first activations",
        "Training 2 SAEs side by side",
    ]  # fmt: skip


def test_compiling_is_told_once_and_only_where_nothing_is_kept(tmp_path: Path) -> None:
    script = tmp_path / "compiles.py"
    script.write_text(COMPILES)
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "kernels"), "PYTHONPATH": str(ROOT)}

    def said() -> str:
        done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=True)
        return done.stdout

    assert said() == "compiles\n"
    assert said() == "", "the second process finds them"


@pytest.mark.django_db
def test_the_card_says_that_kernels_are_compiled(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def compiles(sae: Any, config: Any, tell: Any) -> None:
        with tells_of_compiling(tell):
            import numba

            numba.njit("int64(int64)")(lambda x: x)

    monkeypatch.setattr(trainer, "load_kernels", compiles)
    _, job = make_run(evaluate_after=False, harvest_after=False)
    assert job.state == State.DONE, job.traceback
    assert lines(job)[:2] == ["Loading the compiled kernels", trainer.COMPILING]
