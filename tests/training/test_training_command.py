"""`manage.py train` as a person uses it: trains with no worker running, survives Ctrl-C, goes on with --resume."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from saehub.jobs.models import Job, State
from saehub.jobs.runner import execute
from saes.models import LanguageModel
from tests.conftest import ROOT, TEXT, child_environment, wait_for
from training.models import Capture, Corpus, Run
from training.numerics.checkpoint import FILE

pytestmark = [pytest.mark.usefixtures("committed"), pytest.mark.timeout(1800)]


def made(row: Any) -> None:
    job = Job.objects.claim(row.start(None).pk, "test")
    execute(job)
    job.refresh_from_db()
    assert job.state == State.DONE, job.error
    row.refresh_from_db()


def command(*words: str, name: str = "train") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "manage.py"), name, *words],
        env=child_environment(), cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip


def test_ctrl_c_keeps_the_checkpoint_and_resume_finishes(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = LanguageModel.objects.create(name="tiny", source="folder", location=str(tiny_model_dir))
    corpus = Corpus.objects.create(name="sentences", source="text", location="text.txt")
    corpus.folder.mkdir(parents=True, exist_ok=True)
    corpus.file.write_text("\n\n".join(f"Number {i}. {TEXT}" for i in range(60)))
    hooks = ["blocks.1.hook_resid_post"]
    made(model)
    made(corpus)
    flags = (
        "--model-name",
        "tiny",
        "--corpus-name",
        "sentences",
        "--hook-names",
        hooks[0],
        "--context-length",
        "64",
        "--json",
    )
    out, error = command(*flags, "--parts", "2", name="capture").communicate(timeout=600)
    capture = Capture.objects.get()
    assert capture.ready and json.loads(out)["yaml"].startswith(f"name: {capture.name}\n"), error
    assert not (capture.folder / "unfinished-0-of-2.json").exists() and len(capture.making()) == 2
    spec = tmp_path / "run.yaml"
    spec.write_text(
        f"capture: {capture.pk}\narchitecture: topk\nk: 8\nd_sae: 256\nn_tokens: 6000000\nbatch_size: 512\n"
        "checkpoint_every: 50\nevaluate_after: false\nharvest_after: false\n"
    )
    child = command(str(spec), "--json")
    run = wait_for(lambda: Run.objects.first(), 300, "the run")
    wait_for(lambda: run.points.exists() and (run.folder / "checkpoints" / FILE).exists(), 300, "a checkpoint")
    child.send_signal(signal.SIGINT)
    out, error = child.communicate(timeout=600)
    assert child.returncode == 130, error
    assert f"manage.py train --resume {run.pk}" in error
    assert json.loads(out)["state"] == "cancelled"
    step = run.points.last().step
    Run.objects.filter(pk=run.pk).update(stop_at=None)

    child = command("--resume", str(run.pk))
    wait_for(lambda: run.points.last().step > step, 300, "the run to go on")
    from django.utils import timezone

    Run.objects.filter(pk=run.pk).update(stop_at=timezone.now())
    out, error = child.communicate(timeout=600)
    assert child.returncode == 0, error
    run.refresh_from_db()
    assert run.ready and str(run.sae.files) in out
    job = Job.objects.get(pk=run.job_id)
    assert any("continued at step" in line for line in job.lines.values_list("text", flat=True))
