"""The jobs from text to an evaluated SAE, run the way a worker runs them, on a tiny real model."""

import json

import pytest
import torch
from django.urls import reverse
from django.utils import timezone

from saehub.jobs.models import Job, State
from saes.models import SAE
from saes.numerics.formats import load_sae
from training.models import Capture, Corpus, Evaluation, Run, RunPoint
from training.numerics.shards import open_capture

pytestmark = pytest.mark.django_db
HOOK = "blocks.1.hook_resid_post"
TEXT = "An exception is raised when the key is missing. Paris is the capital of France, and Rome is that of Italy.\n"


@pytest.fixture
def corpus(make_corpus):
    row, job = make_corpus(TEXT * 60)
    assert job.state == State.DONE, job.traceback
    return row


@pytest.fixture
def capture(make_capture):
    row, job = make_capture()
    assert job.state == State.DONE, job.traceback
    return row


def test_a_corpus_is_counted_and_hashed(make_corpus):
    row, job = make_corpus("First document.\n\n\n\nSecond one, with ünïcode.\n")
    assert job.state == State.DONE
    assert row.n_documents == 2
    assert row.n_characters == len("First document.") + len("Second one, with ünïcode.")
    assert row.size_bytes == row.file.stat().st_size and len(row.sha256) == 64
    assert row.sample == "First document.\n\n\nSecond one, with ünïcode."


def test_a_corpus_that_is_not_text_fails_with_a_sentence(make_corpus):
    row, job = make_corpus(b"text \xff\xfe then bytes")
    assert job.state == State.FAILED and not row.ready
    assert "is not UTF-8 text" in job.error


def test_an_empty_corpus_fails_with_a_sentence(make_corpus):
    _, job = make_corpus("\n \n")
    assert job.state == State.FAILED
    assert "holds no text" in job.error


def test_a_dataset_on_the_hub_out_of_reach_is_one_sentence(user_of, run_job):
    row = Corpus.objects.create(name="wiki", source="hub", location="Salesforce/wikitext", owner=user_of("researcher"))
    job = run_job(row.start(row.owner))
    assert job.state == State.FAILED
    assert job.error.startswith("Salesforce/wikitext is not on this machine, and HF_HUB_OFFLINE is set")


def test_a_capture_stores_what_its_row_says(capture):
    shards = open_capture(capture.folder)
    assert shards.hook_names == [HOOK] and shards.d[HOOK] == 32
    assert (shards.n_rows, shards.n_contexts) == (capture.n_tokens, capture.n_contexts)
    assert capture.size_bytes == sum(file.stat().st_size for file in capture.folder.iterdir())
    assert capture.manifest["dataset"]["sha256"] == capture.corpus.sha256
    assert capture.manifest["policy"] == {
        "context_length": 32,
        "prepend_bos": True,
        "store_special": False,
        "packed": True,
        "chat_template": False,
    }


def test_a_corpus_that_changed_since_is_refused(make_capture, corpus):
    corpus.file.write_text("other text")
    row, job = make_capture()
    assert job.state == State.FAILED and not row.folder.exists()
    assert "changed on disk since it was read" in job.error


def test_a_corpus_shorter_than_one_context_leaves_nothing(make_capture):
    row, job = make_capture(context_length=255, max_tokens=None, text="Too short.")
    assert job.state == State.FAILED and "fewer than one context" in job.error
    assert not row.folder.exists()


def test_training_registers_an_sae_and_queues_what_follows(make_run):
    run, job = make_run()
    assert job.state == State.DONE, job.traceback
    sae = run.sae
    assert job.result == {"sae_id": sae.pk, "sae_path": str(sae.files), "metadata_path": str(sae.files / "config.json")}
    assert sorted(path.name for path in sae.files.iterdir()) == [
        "cfg.json", "config.json", "history.json", "metrics.json", "sae_weights.safetensors",
    ]  # fmt: skip
    loaded = load_sae(sae.files)
    assert (loaded.config.d_sae, loaded.config.k, loaded.config.hook_name) == (64, 4, HOOK)
    assert torch.allclose(loaded.W_dec.norm(dim=-1), torch.ones(64), atol=1e-5)
    assert (sae.d_in, sae.d_sae, sae.k, sae.layer, sae.source) == (32, 64, 4, 1, "trained")
    assert run.tokens == run.config["n_tokens"] and run.seconds > 0
    assert not (run.folder / "checkpoints").exists()

    evaluation, harvest = Job.objects.get(kind="evaluate"), Job.objects.get(kind="harvest")
    assert evaluation.params == {"sae": sae.pk, "evaluation": Evaluation.objects.get().pk}
    assert harvest.params == {"sae": sae.pk, "capture": run.capture_id} and harvest.subject_id == sae.pk


def test_the_config_beside_the_weights_tells_how_to_train_it_again(make_run):
    run, _ = make_run(evaluate_after=False, harvest_after=False)
    told = json.loads((run.sae.files / "config.json").read_text())
    assert told["config"] == run.config and told["capture"]["dataset"]["sha256"] == run.capture.corpus.sha256
    assert not Job.objects.filter(kind__in=("evaluate", "harvest")).exists()


def test_the_curve_is_the_trainers_history(make_run):
    run, _ = make_run()
    history = json.loads((run.sae.files / "history.json").read_text())
    points = list(run.points.all())
    assert [point.step for point in points] == [report["step"] for report in history]
    assert points[-1].tokens == run.tokens
    assert points[-1].values["loss"] == history[-1]["loss"] and points[-1].values["l0"] <= 4
    assert points[-1].values["loss"] < points[0].values["loss"]


def test_a_cancelled_run_goes_on_from_its_checkpoint(make_run, run_job, monkeypatch):
    """Cancel after 5 steps, retry: the weights are those of a run that was never interrupted."""
    from training.trainer import Trainer

    whole, _ = make_run()
    monkeypatch.setattr("training.trainer.LOOK_SECONDS", 0)
    monkeypatch.setattr("saehub.jobs.progress.FLUSH_SECONDS", 0)
    steps = iter(range(100))
    asked = Trainer.should_stop

    def cancel_at_five(self):
        if next(steps) == 5:
            self.progress.job.cancel()
        return asked(self)

    monkeypatch.setattr(Trainer, "should_stop", cancel_at_five)
    run, job = make_run()
    assert job.state == State.CANCELLED and not run.ready and run.sae is None
    assert (run.folder / "checkpoints" / "checkpoint.safetensors").exists()
    RunPoint.objects.create(run=run, step=999, tokens=0, values={})  # of a step the checkpoint does not reach

    assert job.retry()
    job = run_job(job)
    run.refresh_from_db()
    assert job.state == State.DONE, job.traceback
    assert job.lines.filter(text__startswith="continued at step 5 of").exists()
    assert not run.points.filter(step=999).exists()
    assert list(run.points.values_list("step", flat=True)) == list(whole.points.values_list("step", flat=True))
    first, second = load_sae(whole.sae.files), load_sae(run.sae.files)
    assert all(torch.equal(first.state_dict()[name], second.state_dict()[name]) for name in first.state_dict())


def test_stop_and_keep_makes_an_sae_of_what_there_is(make_run):
    run, job = make_run(stop_at=timezone.now())
    assert job.state == State.FAILED and "stopped before its first step" in job.error and "Retry" in job.hint
    assert run.stop_at is None, "a retry trains"


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_a_run_that_rests_on_a_checkpoint_is_kept(make_run, run_job, client_of, monkeypatch, architecture):
    """Paused, failed or cancelled: what its checkpoint holds becomes an SAE, and no step is made for that."""
    from training.trainer import Trainer

    whole, asked = Trainer.point, []

    def broken(self, report):
        whole(self, report)
        asked.append(report.step)
        if report.step == 10:
            raise RuntimeError("the machine broke")

    monkeypatch.setattr(Trainer, "point", broken)
    run, job = make_run(architecture=architecture)
    assert job.state == State.FAILED and run.keepable and not run.ready
    assert 'id="keep"' in client_of("researcher").get(run.get_absolute_url()).content.decode()
    client_of("researcher").post(reverse("training:run_stop", args=[run.pk]))
    run.refresh_from_db()
    kept = run_job(run.job)
    run.refresh_from_db()
    assert kept.state == State.DONE, kept.traceback
    assert run.ready and run.sae.files.is_dir() and run.tokens == 8 * 64, "its checkpoint is of step 8"
    assert asked == [2, 4, 6, 8, 10] and kept.result["ended_early"] and not run.keepable


def test_a_run_without_a_checkpoint_has_nothing_to_keep(client_of, make_capture, user_of):
    owner = user_of("researcher")
    run = Run.objects.create(name="r", capture=make_capture()[0], hook_name=HOOK, architecture="topk", owner=owner)
    page = client_of("researcher").post(reverse("training:run_stop", args=[run.pk]), follow=True).content.decode()
    assert "no checkpoint yet, so there is nothing to keep" in page and 'id="keep"' not in page
    run.refresh_from_db()
    assert run.stop_at is None and run.job is None


def test_stop_and_keep_after_some_steps(make_run, monkeypatch):
    from training.trainer import Trainer

    monkeypatch.setattr("training.trainer.LOOK_SECONDS", 0)
    asked = Trainer.should_stop

    def stop_at_three(self):
        if self.tokens >= 3 * self.config.batch_size:
            Run.objects.filter(pk=self.run.pk).update(stop_at=timezone.now())
        return asked(self)

    monkeypatch.setattr(Trainer, "should_stop", stop_at_three)
    run, job = make_run()
    assert job.state == State.DONE, job.traceback
    assert 0 < run.tokens < run.config["n_tokens"] and run.sae is not None
    assert job.result["ended_early"] and job.fraction == run.tokens / run.config["n_tokens"], "not shown as all of it"
    assert json.loads((run.sae.files / "metrics.json").read_text())["stopped"] is True


def test_a_finished_run_asked_again_trains_nothing(make_run, run_job):
    run, job = make_run()
    Job.objects.filter(pk=job.pk).update(state=State.CANCELLED)  # as when the answer was lost
    job.refresh_from_db()
    job.retry()
    again = run_job(job)
    assert again.state == State.DONE and again.result["sae_id"] == run.sae_id
    assert SAE.objects.count() == 1 and Evaluation.objects.count() == 1


def test_relu_trains_with_its_own_fields(make_run):
    run, job = make_run(architecture="standard", config={"d_sae": 64, "l1_coefficient": 1.0})
    assert job.state == State.DONE, job.traceback
    assert load_sae(run.sae.files).config.architecture == "standard" and run.sae.k is None
    assert set(run.points.first().values["parts"]) >= {"mse", "l1"}


@pytest.mark.parametrize(
    ("architecture", "config", "saved", "part"),
    [
        ("jumprelu", {"l0_coefficient": 0.1}, "jumprelu", "l0"),
        ("gated", {"l1_coefficient": 0.1}, "gated", "gate"),
        ("batchtopk", {"k": 4, "matryoshka_widths": [16, 64]}, "jumprelu", "prefixes"),
    ],
)
def test_the_other_architectures_train_evaluate_and_harvest(make_run, run_job, architecture, config, saved, part):
    run, job = make_run(architecture=architecture, config={"d_sae": 64, **config})
    assert job.state == State.DONE, job.traceback
    sae = load_sae(run.sae.files)
    assert sae.config.architecture == run.sae.architecture == saved
    assert part in run.points.first().values["parts"]
    if architecture == "batchtopk":
        assert sae.config.metadata["training_architecture"] == "matryoshka_batchtopk"
    for kind in ("evaluate", "harvest"):
        done = run_job(Job.objects.get(kind=kind))
        assert done.state == State.DONE, done.traceback


def test_an_evaluation_measures_on_held_out_contexts(make_run, run_job):
    run, _ = make_run()
    job = run_job(Job.objects.get(kind="evaluate"))
    assert job.state == State.DONE, job.traceback
    row, sae = Evaluation.objects.get(), SAE.objects.get()
    held_out = open_capture(run.capture.folder).split_rows("held_out")
    assert row.metrics["explained_variance"]["n"] == held_out > 0
    assert row.metrics["explained_variance"]["formula"].startswith("1 - E|x - x_hat|^2")
    assert {"l0", "ce_original", "ce_recovered", "kl", "dead_features"} <= set(row.metrics)
    assert sae.metrics == row.metrics and sae.l0 == row.metrics["l0"]["value"] <= 4
    assert sae.explained_variance == row.metrics["explained_variance"]["value"] < 1
    told = json.loads((sae.files / "metrics.json").read_text())
    assert told["held_out"] == row.metrics and "training" in told


def test_a_number_that_does_not_exist_is_null():
    from training.numerics.definitions import metric

    assert metric("ce_recovered", float("nan"), 1, "")["value"] is None
    assert metric("l0", 3.0, 1, "")["value"] == 3.0


def test_deleting_an_sae_removes_its_files(make_run):
    run, _ = make_run()
    files = run.sae.files
    run.sae.delete()
    assert not files.exists() and files.parent.exists()
    run.refresh_from_db()
    assert run.sae is None


def test_a_path_is_read_where_it_lies(run_job, user_of, tmp_path):
    (tmp_path / "import" / "a.txt").write_text("one document\n")
    (tmp_path / "import" / "b.jsonl").write_text('{"text": "another"}\n')
    row = Corpus.objects.create(
        name="folder", source="path", location=str(tmp_path / "import"), owner=user_of("researcher")
    )
    job = run_job(row.start(row.owner))
    row.refresh_from_db()
    assert job.state == State.DONE, job.traceback
    assert row.n_documents == 2 and not row.folder.exists()


def test_an_unfinished_capture_goes_on_where_it_was_cancelled(make_capture, run_job, monkeypatch):
    from training import capture_jobs as jobs

    real = jobs.capture_activations

    def small_shards(*args, **kwargs):
        return real(*args, **kwargs, shard_tokens=128, batch_contexts=2)

    monkeypatch.setattr(jobs, "capture_activations", small_shards)
    monkeypatch.setattr("saehub.jobs.progress.FLUSH_SECONDS", 0)
    row = make_capture(run=False)[0]
    job = Job.objects.get(pk=row.job_id)
    flush = jobs.Progress.flush

    def cancel_later(self):
        if (self._last.get("done") or 0) > 300:
            self.job.cancel()
        return flush(self)

    monkeypatch.setattr(jobs.Progress, "flush", cancel_later)
    assert run_job(job).state == State.CANCELLED
    assert list(row.folder.glob("shard-*.safetensors")) and not (row.folder / "manifest.json").exists()
    monkeypatch.setattr(jobs.Progress, "flush", flush)
    job.retry()
    assert run_job(job).state == State.DONE, job.traceback
    assert Capture.objects.get().ready


IN, OUT = "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"


@pytest.mark.parametrize(
    ("architecture", "config", "saved"),
    [
        ("topk_transcoder", {"k": 4}, "topk_transcoder"),
        ("jumprelu_transcoder", {"l0_coefficient": 0.1, "skip": True}, "jumprelu_skip_transcoder"),
    ],
)
def test_a_transcoder_trains_from_two_hook_points_and_what_follows_works(
    make_capture, make_run, run_job, architecture, config, saved
):
    make_capture(hook_names=[IN, OUT])
    run, job = make_run(
        architecture=architecture, hook_name=IN, hook_name_out=OUT, config={"d_sae": 64, "lr": 1e-2, **config}
    )
    assert job.state == State.DONE, job.traceback
    row, sae = run.sae, load_sae(run.sae.files)
    assert (row.hook_name, row.hook_name_out, row.site, row.layer, row.architecture) == (
        IN,
        OUT,
        "transcoder",
        1,
        saved,
    )
    assert (sae.config.architecture, sae.config.hook_name, sae.config.hook_name_out) == (saved, IN, OUT)
    told = json.loads((row.files / "config.json").read_text())
    assert told["run"]["hook_name_out"] == OUT and told["document"]["hook_name_out"] == OUT
    evaluated = run_job(Job.objects.get(kind="evaluate"))
    assert evaluated.state == State.DONE, evaluated.traceback
    live = run.points.last().values["held_out_explained_variance"]
    assert live > run.points.first().values["held_out_explained_variance"]
    measured = Evaluation.objects.get().metrics["explained_variance"]
    if measured["n"] <= 512:  # the rows behind the live curve
        assert measured["value"] == pytest.approx(live, abs=1e-4)
    assert run_job(Job.objects.get(kind="harvest")).state == State.DONE
