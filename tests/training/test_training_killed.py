"""A worker killed with `kill -9` in the middle of training: the run goes on from its checkpoint and is finished once."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from saehub.jobs.models import Job, State
from saes.models import SAE, LanguageModel
from tests.conftest import TEXT, manage, wait_for
from training.models import Capture, Corpus, Run

pytestmark = [pytest.mark.usefixtures("committed"), pytest.mark.timeout(600)]


def made(row: LanguageModel | Corpus | Capture) -> None:
    row.start(None)
    job = wait_for(
        lambda: Job.objects.filter(pk=row.job_id).exclude(state__in=("queued", "running")).first(), 120, str(row)
    )
    assert job.state == State.DONE, job.error
    row.refresh_from_db()


def test_training_survives_the_death_of_its_worker(tiny_model_dir: Path) -> None:
    with manage("work", "io"), manage("work", "gpu"):
        model = LanguageModel.objects.create(name="tiny", source="folder", location=str(tiny_model_dir))
        corpus = Corpus.objects.create(name="sentences", source="text", location="text.txt")
        corpus.folder.mkdir(parents=True, exist_ok=True)
        corpus.file.write_text("\n\n".join(f"Number {i}. {TEXT}" for i in range(300)))
        hooks = ["blocks.1.hook_resid_post"]
        capture = Capture(name="capture", model=model, corpus=corpus, hook_names=hooks, context_length=64)
        for row in (model, corpus):
            made(row)
        capture.save()
        made(capture)

        config = {"d_sae": 512, "k": 8, "n_tokens": 2_000_000, "batch_size": 1024, "seed": 0}
        run = Run.objects.create(
            name="run", capture=capture, hook_name=hooks[0], architecture="topk", config=config,
            evaluate_after=False, harvest_after=False,
        )  # fmt: skip
        job = run.start(None)
        checkpoint = run.folder / "checkpoints"
        wait_for(lambda: checkpoint.exists() and any(checkpoint.iterdir()), 150, "a checkpoint")
        child = next(
            p for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [])[-3:-1] == ["run_job", str(job.pk)]
        )
        worker = child.parent()
        assert worker is not None
        worker.kill()
        child.wait(60)
        wait_for(lambda: Job.objects.get(pk=job.pk).state in (State.DONE, State.FAILED), 200, "the run to be finished")
    job.refresh_from_db()
    assert job.state == State.DONE, job.error
    assert job.attempt == 2
    assert any("continued at step" in line for line in job.lines.values_list("text", flat=True))
    run.refresh_from_db()
    assert run.ready and run.tokens == 2_000_000
    assert SAE.objects.count() == 1
    steps = list(run.points.values_list("step", flat=True))
    assert steps == sorted(set(steps)), "no step is shown twice"
