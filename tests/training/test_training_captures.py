"""Captures beyond the usual one, by their real jobs and pages: streams, parts, outliers, mi_crow stores, checks."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from django.urls import reverse
from safetensors.torch import save_file

from saehub.jobs.models import Job, State
from saes.numerics.formats import load_sae
from tests.training.conftest import HOOK, TEXT
from training.models import Capture, Corpus, Run
from training.numerics.shards import open_capture

pytestmark = pytest.mark.django_db


def test_a_row_makes_what_it_says(make_capture: Any) -> None:
    row, job = make_capture(
        compute_dtype="bfloat16",
        max_norm_ratio=1.2,
        packed=False,
        text="\n\n\n\n".join(TEXT[:n] for n in range(40, 90)),
    )
    assert job.state == State.DONE, job.traceback
    made = open_capture(row.folder)
    assert made.manifest["autocast"] and made.manifest["max_norm_ratio"] == 1.2 and made.lengths() is not None
    assert row.n_masked == made.manifest["n_masked"] > 0
    assert set(row.manifest["sample"]["fidelity"]) == {HOOK}


def test_a_run_on_a_stream_ends_with_the_weights_of_one_on_the_same_capture_stored(
    make_capture: Any, make_run: Any, run_job: Any, monkeypatch: Any
) -> None:
    """And so does one that was cancelled after five steps and tried again."""
    from training import capture_jobs
    from training.trainer import Trainer

    real = capture_jobs.capture_activations
    monkeypatch.setattr(capture_jobs, "capture_activations", lambda *a, **k: real(*a, **k, shard_tokens=512))
    monkeypatch.setattr("training.numerics.capture.STREAM_WINDOW_ROWS", 1024)
    monkeypatch.setattr("training.numerics.shards.WINDOW_ROWS", 1024)
    make_capture()
    stored, job = make_run(evaluate_after=False, harvest_after=False)
    assert job.state == State.DONE, job.traceback
    Capture.objects.update(ready_at=None)
    row, job = make_capture(stored=False)
    assert job.state == State.DONE, job.traceback
    assert row.size_bytes < 40 * row.n_tokens + 40_000 and row.n_masked is None

    monkeypatch.setattr("training.trainer.LOOK_SECONDS", 0)
    monkeypatch.setattr("saehub.jobs.progress.FLUSH_SECONDS", 0)
    steps, asked = iter(range(100)), Trainer.should_stop

    def cancel_at_five(self: Any) -> bool:
        if next(steps) == 5:
            self.progress.job.cancel()
        return asked(self)

    monkeypatch.setattr(Trainer, "should_stop", cancel_at_five)
    run, job = make_run(evaluate_after=True, harvest_after=True)
    assert job.state == State.CANCELLED and run.capture == row
    job.retry()
    assert run_job(job).state == State.DONE, job.traceback
    run.refresh_from_db()
    first, second = load_sae(stored.sae.files).state_dict(), load_sae(run.sae.files).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    for kind in ("evaluate", "harvest"):
        done = run_job(Job.objects.get(kind=kind))
        assert done.state == State.DONE, done.traceback


def test_parts_are_jobs_and_the_last_makes_it_ready(make_capture: Any, run_job: Any, monkeypatch: Any) -> None:
    from training import capture_jobs

    real = capture_jobs.capture_activations
    monkeypatch.setattr(capture_jobs, "capture_activations", lambda *a, **k: real(*a, **k, shard_tokens=128))
    row, _ = make_capture(run=False, parts=3)
    jobs = list(Job.objects.filter(kind="capture").order_by("pk"))
    assert [job.params for job in jobs] == [{"capture": row.pk, "part": part} for part in range(3)]
    for job in (jobs[1], jobs[0]):
        assert run_job(job).state == State.DONE, job.traceback
        row.refresh_from_db()
        assert not row.ready and row.busy, "the row shows a part that is still to finish"
    assert run_job(jobs[2]).state == State.DONE
    row.refresh_from_db()
    alone, _ = make_capture(parts=1)
    assert row.ready and row.n_tokens == alone.n_tokens
    assert [s["sha256"] for s in open_capture(row.folder).shards] == [
        s["sha256"] for s in open_capture(alone.folder).shards
    ]


def test_a_corpus_that_ends_early_is_said(make_capture: Any, client_of: Any) -> None:
    row, job = make_capture(max_tokens=10**6)
    assert job.state == State.DONE and row.ended_early
    assert job.lines.filter(text__contains="ended before the 1,000,000 tokens").exists()
    assert "the corpus ended there" in client_of("viewer").get(row.get_absolute_url()).content.decode()


def test_files_are_verified_and_exported_from_the_page(make_capture: Any, client_of: Any, run_job: Any) -> None:
    row, _ = make_capture()
    url = {
        kind: reverse("training:capture_action", args=[row.pk, kind]) for kind in ("verify_capture", "export_capture")
    }
    assert client_of("viewer").post(url["verify_capture"]).status_code == 403
    for one in url.values():
        client_of("researcher").post(one)
    assert run_job(Job.objects.get(kind="verify_capture")).result["shards"] == 1
    exported = run_job(Job.objects.get(kind="export_capture"))
    assert exported.state == State.DONE, exported.traceback
    assert (row.folder / "mi_crow" / "runs" / f"capture-{row.pk}" / "batch_0" / "metadata.json").is_file()
    page = client_of("viewer").get(row.get_absolute_url()).content.decode()
    assert str(row.folder / "mi_crow") in page

    shard = next(row.folder.glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-4] + b"\0\1\2\3")
    client_of("researcher").post(url["verify_capture"])
    failed = run_job(Job.objects.filter(kind="verify_capture").latest("pk"))
    assert failed.state == State.FAILED and "1 of 1 shards are damaged" in failed.error


def test_a_mi_crow_run_is_read_as_a_capture(model: Any, client_of: Any, run_job: Any, settings: Any) -> None:
    corpus = Corpus.objects.create(
        name="c", source="text", location="text.txt", sha256="", ready_at=model.ready_at, n_characters=9, sample="x"
    )
    corpus.folder.mkdir(parents=True)
    corpus.file.write_text("Other text.")
    from training.jobs import digest

    Corpus.objects.update(sha256=digest(corpus.file))
    layer = settings.IMPORT_DIRS[0] / "run" / "batch_0" / "llamaforcausallm_model_layers_1"
    layer.mkdir(parents=True)
    x = torch.randn(60, 9, 32)
    save_file({"tensor": x}, layer / "activations.safetensors")
    data = {"model": model.pk, "corpus": corpus.pk, "hook_names": [HOOK], "context_length": 128, "dtype": "float32"}
    create = reverse("training:capture_create")
    refused = client_of("researcher").post(create, data | {"location": str(layer.parents[1])})
    assert "is not a mi_crow run: it has no batch_0/metadata.json" in refused.content.decode()
    assert (
        "Pages may read only under"
        in client_of("researcher").post(create, data | {"location": "/etc"}).content.decode()
    )

    (layer.parent / "metadata.json").write_text("{}")
    client_of("researcher").post(create, data | {"location": str(layer.parents[1])})
    row = Capture.objects.get()
    job = run_job(row.job)
    assert job.state == State.DONE, job.traceback
    row.refresh_from_db()
    assert row.n_tokens == 60 * 9 and row.manifest["tokens_known"] is False
    assert (row.context_length, row.prepend_bos, row.packed) == (9, False, False)  # the run's, not the form's
    assert torch.equal(torch.cat([x for x, _, _ in open_capture(row.folder).rows(HOOK)]), x.reshape(-1, 32))
    run = Run.objects.create(
        name="r", capture=row, hook_name=HOOK, architecture="topk", evaluate_after=False, harvest_after=False,
        config={"d_sae": 64, "k": 4, "n_tokens": 640, "batch_size": 64},
    )  # fmt: skip
    assert run_job(run.start(None)).state == State.DONE
    page = client_of("viewer").get(row.get_absolute_url()).content.decode()
    assert "not known: the corpus gives others" in page


def test_three_examples_are_shown_before_the_start_without_javascript(
    model: Any, make_corpus: Any, client_of: Any
) -> None:
    corpus, _ = make_corpus("First one.\n\n\n\nA second.\n\n\n\nThe third document is here.\n\n\n\nA fourth.")
    given = {"model": model.pk, "corpus": corpus.pk, "hook_names": HOOK, "context_length": 32, "packed": "0", "look": 1}
    given["prepend_bos"] = "on"
    page = client_of("researcher").get(reverse("training:capture_create"), given)
    examples = page.context["estimate"].preview.examples
    assert ["".join(token.text for token in example.tokens) for example in examples] == [
        "<bos>First one.", "<bos>A second.", "<bos>The third document is here.",
    ]  # fmt: skip
    assert [example.tokens[0].special for example in examples] == [True] * 3 and examples[0].padding > 0
    assert '<s class="piece special">&lt;bos&gt;</s>' in page.content.decode() and not Capture.objects.exists()
    packed = client_of("researcher").get(
        reverse("training:capture_create"), given | {"packed": "1", "context_length": 8}
    )
    first, second, _ = packed.context["estimate"].preview.examples
    assert len(first.tokens) == len(second.tokens) == 8 and first.padding == 0
    assert "First one.<eos>A" in "".join(token.text for token in (*first.tokens, *second.tokens[1:]))


def test_a_model_without_chat_template_is_told_so(model: Any, make_corpus: Any, client_of: Any) -> None:
    corpus, _ = make_corpus(TEXT * 9)
    given = {"model": model.pk, "corpus": corpus.pk, "hook_names": HOOK, "context_length": 32, "dtype": "float32"}
    page = client_of("researcher").post(reverse("training:capture_create"), given | {"chat_template": "on"})
    assert "The tokenizer of tiny has no chat template." in page.content.decode() and page.status_code == 422


def test_a_chat_template_that_fails_shows_no_examples(
    model: Any, make_corpus: Any, client_of: Any, tmp_path: Path
) -> None:
    """It is a program of the model's author, which may raise anything."""
    corpus, _ = make_corpus(TEXT * 9)
    copy = shutil.copytree(model.location, tmp_path / "copy")
    type(model).objects.filter(pk=model.pk).update(location=str(copy))
    given = {"model": model.pk, "corpus": corpus.pk, "hook_names": HOOK, "context_length": 32, "look": 1}
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}x"
    greedy = "{{ 'x' * 10 ** 11 }}"
    templates = (("{{ messages[0]['content'] }}", True), ("{{ 1 / 0 }}", False), (endless, False), (greedy, False))
    for number, (template, shown) in enumerate(templates, 1):
        (copy / "chat_template.jinja").write_text(template)
        os.utime(copy / "tokenizer.json", (1, number))  # it is read again when it has changed
        page = client_of("researcher").get(reverse("training:capture_create"), given | {"chat_template": "on"})
        assert page.status_code == 200 and bool(page.context["estimate"].preview.examples) is shown
