"""A run in several processes, through its job: it ends like any other, and a killed rank costs nothing but time."""

import json

import psutil
import pytest
import torch
from django.urls import reverse

from saehub.jobs.models import Job, State
from saes.numerics.formats import load_sae
from training.models import Run
from training.numerics.several import Several
from training.trainer import Trainer

pytestmark = [pytest.mark.django_db, pytest.mark.timeout(1200)]
LONG = {"d_sae": 2048, "k": 4, "n_tokens": 256 * 150, "batch_size": 256, "log_every": 10, "checkpoint_every": 15}


def ranks_of(torchrun: int) -> list[psutil.Process]:
    return [child for child in psutil.Process(torchrun).children() if "training.numerics.several" in child.cmdline()]


def test_a_killed_rank_ends_the_run_and_a_retry_finishes_it_to_the_bit(make_run, run_job, monkeypatch):
    whole, job = make_run(processes=2, config=LONG, evaluate_after=False, harvest_after=False)
    assert job.state == State.DONE, job.traceback
    said = list(job.lines.values_list("text", flat=True))
    assert said.index("Starting 2 processes, which share each batch") < said.index(f"Training on {whole.place}")
    assert whole.tokens == LONG["n_tokens"] and whole.points.count() == 15
    assert not (whole.folder / "checkpoints").exists()
    history = json.loads((whole.sae.files / "history.json").read_text())
    assert history[-1]["loss"] < history[0]["loss"] and history[-1]["held_out_explained_variance"] > 0

    heard, started = Trainer._hear, []

    class Noted(Several):
        def __init__(self, *args):
            super().__init__(*args)
            started.append(self)

    monkeypatch.setattr("training.trainer.Several", Noted)

    def kill_after_a_checkpoint(self, word):
        heard(self, word)
        if getattr(word, "step", 0) == 30 and (alive := ranks_of(started[-1].torchrun.pid)):
            alive[-1].kill()

    monkeypatch.setattr(Trainer, "_hear", kill_after_a_checkpoint)
    run, job = make_run(processes=2, config=LONG, evaluate_after=False, harvest_after=False)
    assert job.state == State.FAILED and not run.ready
    assert job.error.startswith("One of the run's 2 processes was killed") and "Press Retry" in job.hint
    assert not psutil.pid_exists(started[-1].torchrun.pid)

    monkeypatch.setattr(Trainer, "_hear", heard)
    assert job.retry()
    job = run_job(Job.objects.get(pk=job.pk))
    run.refresh_from_db()
    assert job.state == State.DONE, job.traceback
    assert job.lines.filter(text__startswith="continued at step").exists()
    first, second = load_sae(whole.sae.files).state_dict(), load_sae(run.sae.files).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    steps = list(run.points.values_list("step", flat=True))
    assert steps == list(whole.points.values_list("step", flat=True))


def test_stop_and_keep_and_a_rank_that_fails_say_so(make_run, monkeypatch):
    asked = Trainer.asked_to_stop

    def stop_at_a_report(self):
        if self.run.points.exists():
            Run.objects.filter(pk=self.run.pk).update(stop_at="2026-01-01T00:00:00Z")
        return asked(self)

    monkeypatch.setattr("training.trainer.LOOK_SECONDS", 0)
    monkeypatch.setattr(Trainer, "asked_to_stop", stop_at_a_report)
    run, job = make_run(processes=2, config=LONG | {"n_tokens": 10**9}, evaluate_after=False, harvest_after=False)
    assert job.state == State.DONE, job.traceback
    assert 0 < run.tokens < 10**9 and run.sae is not None
    monkeypatch.setattr(Trainer, "asked_to_stop", asked)
    _, job = make_run(processes=2, config=LONG | {"lr": 1e30}, evaluate_after=False, harvest_after=False)
    assert job.state == State.FAILED and "lower the learning rate" in job.error


def test_the_form_asks_how_many_processes_and_refuses_them_for_a_sweep(client_of, make_capture):
    capture, _ = make_capture()
    given = {
        "source": f"{capture.pk}:{capture.hook_names[0]}", "architecture": "topk", "k": "4", "d_sae": "64",
        "n_tokens": 1280, "batch_size": 64, "seed": "0", "lr_warmup": 0.02, "lr_decay": 0.2, "l1_warmup": 0.05,
        "aux_coefficient": 0.03, "processes": 2,
    }  # fmt: skip
    client = client_of("researcher")
    page = client.post(reverse("training:run_create"), given | {"k": "4, 8"})
    assert page.status_code == 422 and "A sweep trains side by side in one process" in page.content.decode()
    assert client.post(reverse("training:run_create"), given).status_code == 302
    assert Run.objects.get().processes == 2
    assert client.post(reverse("training:run_create"), given | {"processes": ""}).status_code == 302
    assert Run.objects.order_by("pk").last().processes == 1
