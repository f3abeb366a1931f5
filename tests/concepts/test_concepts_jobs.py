"""The harvest job, run the way a worker runs it, on a tiny real model."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from django.urls import reverse

from concepts.models import FeatureView, captures_of
from saehub.jobs.models import Job, State, enqueue
from saehub.jobs.runner import execute
from tests.steering_rows import DEAD, Rows, harvested
from tests.tiny_models import RESID


def leftovers(rows: Rows) -> list[str]:
    folder = rows.data / "views"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_a_harvest_fills_its_row_and_folder(rows: Rows, run_job: Any) -> None:
    view = harvested(rows, run_job)
    assert view.ready and view.n_tokens == rows.capture.n_tokens
    assert view.alive + view.dead == 96 and view.dead >= 1
    columns = view.opened()
    assert columns.n_features == 96 and columns.feature(DEAD).n_fires == 0
    assert columns.logit_lens is not None and columns.logit_lens["logits"] is True
    assert leftovers(rows) == [str(view.pk)]
    assert view.job.result == {
        "view": view.pk, "sae": rows.sae.pk, "features": 96, "n_tokens": view.n_tokens, "alive": view.alive,
        "dead": view.dead, "seconds": view.seconds,
    }  # fmt: skip
    assert [line.text for line in view.job.lines.all()] == [
        "Loading the model and the SAE", "Encoding every token of sentences, layer 1", "Collecting examples",
        "Comparing directions", "Logits of every feature",
    ]  # fmt: skip
    assert (view.job.done, view.job.total, view.job.unit) == (96, 96, "features")


def test_what_is_harvested_is_what_the_sae_says_of_the_model(rows: Rows, run_job: Any) -> None:
    """The largest code of a feature, computed here from the model's own hidden states."""
    from transformers import AutoModelForCausalLM

    from saes.numerics.formats import load_sae

    view = harvested(rows, run_job)
    columns = view.opened()
    feature = int(columns.sorted("n_fires")[0])
    best = columns.feature(feature).top[0]
    model = AutoModelForCausalLM.from_pretrained(rows.model.location)
    seen: list[torch.Tensor] = []
    model.model.layers[1].register_forward_hook(
        lambda module, given, out: seen.append(out if torch.is_tensor(out) else out[0])
    )
    with torch.inference_mode():
        model(torch.tensor(best.ids[None].astype(np.int64)))
        acts = load_sae(rows.sae.files).encode(seen[0][0])[:, feature]
    assert abs(acts[best.peak].item() - best.value) < 1e-4
    assert acts[1:].argmax().item() + 1 == best.peak, "the BOS is left out"


def test_without_a_view_it_uses_the_capture_the_sae_was_trained_on_and_makes_one_row(rows: Rows, run_job: Any) -> None:
    for _ in range(2):
        job = run_job(enqueue("harvest", rows.owner, title="Harvest", sae=rows.sae.pk))
        assert job.state == State.DONE, job.traceback
    view = FeatureView.objects.get()
    assert (view.capture, view.owner, view.job_id) == (rows.capture, rows.owner, job.pk)
    assert job.result["view"] == view.pk and leftovers(rows) == [str(view.pk)]


def test_harvesting_again_replaces_the_folder_while_old_pages_keep_theirs(rows: Rows, run_job: Any) -> None:
    view = harvested(rows, run_job)
    old = view.opened()
    before = old.feature(3)
    view.start(rows.owner)
    assert run_job(view.job).state == State.DONE
    assert view.opened() is not old, "a new file is read anew"
    after = view.opened().feature(3)
    assert [example.context for example in after.top] == [example.context for example in before.top]
    assert old.feature(3).maximum == before.maximum, "an open memory map outlives the files"
    assert leftovers(rows) == [str(view.pk)]


def test_a_capture_without_the_hook_point_is_one_sentence(rows: Rows, run_job: Any) -> None:
    rows.capture.hook_names = ["blocks.0.attn.hook_z"]
    rows.capture.save()
    job = run_job(enqueue("harvest", rows.owner, title="Harvest", sae=rows.sae.pk))
    assert job.state == State.FAILED
    assert job.error == f"The capture {rows.capture.name} does not hold {RESID} of tiny-llama."
    assert leftovers(rows) == [] and captures_of(rows.sae) == []


def test_an_sae_that_does_not_fit_the_capture_leaves_the_older_view(rows: Rows, run_job: Any) -> None:
    view = harvested(rows, run_job)
    facts = (view.folder / "view.json").read_text()
    rows.sae.hook_name = "blocks.0.attn.hook_z"
    rows.sae.path = "saes/other"
    rows.sae.save()
    from saes.numerics.formats import save_sae
    from tests.tiny_models import tiny_sae

    save_sae(tiny_sae("topk", d_in=16), rows.sae.files)
    view.start(rows.owner)
    job = run_job(view.job)
    assert job.state == State.FAILED
    assert job.error.startswith("The SAE reads vectors of 16 numbers, but the capture holds 32 at blocks.0.attn.hook_z")
    assert (view.folder / "view.json").read_text() == facts and leftovers(rows) == [str(view.pk)]


def test_cancelling_leaves_nothing_half_made(rows: Rows) -> None:
    view = FeatureView.objects.create(name="view", sae=rows.sae, capture=rows.capture, owner=rows.owner)
    job = Job.objects.claim(view.start(rows.owner).pk, "test")
    assert job is not None
    job.cancel()
    execute(job)
    job.refresh_from_db()
    view.refresh_from_db()
    assert job.state == State.CANCELLED and not view.ready and leftovers(rows) == []


def test_an_sae_without_a_model_here_is_one_sentence(rows: Rows, run_job: Any) -> None:
    view = FeatureView.objects.create(name="view", sae=rows.sae, capture=rows.capture, owner=rows.owner)
    rows.sae.model = None
    rows.sae.save()
    job = run_job(view.start(rows.owner))
    assert job.state == State.FAILED
    assert job.error == "The SAE tiny-sae is not tied to a language model of this instance."
    assert json.dumps(job.params) == json.dumps({"sae": rows.sae.pk, "view": view.pk})


def test_a_long_harvest_can_be_looked_at_early(
    rows: Rows, run_job: Any, client_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the page shows while the rest is read: a view of fewer tokens, which says so, with its logits."""
    from concepts import jobs
    from concepts.numerics import sparse_encode

    monkeypatch.setattr(jobs, "FIRST_LOOK", 200)
    monkeypatch.setattr(sparse_encode, "CHUNK_ROWS", 100)
    early: list[Any] = []
    encode = jobs.harvest_features

    def watched(*args: Any, limit: int | None, **options: Any) -> Any:
        if limit is None:
            early.append(client_of("viewer").get(view.get_absolute_url()).content.decode())
            early.append(FeatureView.objects.get(pk=view.pk).opened().feature(3))
        return encode(*args, limit=limit, **options)

    monkeypatch.setattr(jobs, "harvest_features", watched)
    view = FeatureView.objects.create(name="view", sae=rows.sae, capture=rows.capture, owner=rows.owner, k=12)
    job = run_job(view.start(rows.owner))
    assert job.state == State.DONE, job.traceback
    page, record = early
    assert "A first look at 200 of 1,738 tokens" in page and "The rest is being read" in page
    assert record.n_tokens == 200 and len(record.raised) == 10
    view.refresh_from_db()
    whole = view.opened()
    assert view.n_tokens == whole.n_tokens == 1738 and not whole.facts["partial"]
    assert [logit.id for logit in whole.feature(3).raised] == [logit.id for logit in record.raised]
    assert leftovers(rows) == [str(view.pk)]
    assert "A first look" not in client_of("viewer").get(view.get_absolute_url()).content.decode()


def test_a_short_harvest_can_be_looked_at_before_its_logits(
    rows: Rows, run_job: Any, client_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from concepts import jobs

    early: list[Any] = []
    lens = jobs.logit_lens

    def watched(weights: Any, lm: Any, folder: Any, **options: Any) -> None:
        record = FeatureView.objects.get(pk=view.pk).opened().feature(3)
        page = client_of("viewer").get(reverse("concepts:feature_detail", args=[rows.sae.pk, 3])).content.decode()
        early.append((record.n_tokens, page))
        lens(weights, lm, folder, **options)

    monkeypatch.setattr(jobs, "logit_lens", watched)
    view = FeatureView.objects.create(name="view", sae=rows.sae, capture=rows.capture, owner=rows.owner, k=12)
    job = run_job(view.start(rows.owner))
    assert job.state == State.DONE, job.traceback
    ((n_tokens, page),) = early
    assert n_tokens == 1738 and "They are being computed; look again in a moment." in page
    assert FeatureView.objects.get(pk=view.pk).opened().feature(3).raised
    url = reverse("concepts:feature_detail", args=[rows.sae.pk, 3])
    assert "being computed" not in client_of("viewer").get(url).content.decode()
    assert leftovers(rows) == [str(view.pk)]


def test_a_harvest_whose_process_was_killed_goes_on(rows: Rows) -> None:
    """kill -9 in the middle of the encoding; the next run of the job encodes only what was left."""
    import signal
    import subprocess
    import sys

    from tests.conftest import ROOT, wait_for

    slow = (
        "import itertools, time;"
        "from concepts.numerics import code_files as c, harvest as h, sparse_encode as s;"
        "s.CHUNK_ROWS = 50; c.CHECKPOINT_SECONDS = 0.0;"
        "run, calls = c._scatter, itertools.count();"
        "c._scatter = lambda *a: (time.sleep(600 if next(calls) > 12 else 0), run(*a));"  # it is killed in its sleep
        "from saes.numerics.formats import load_sae; from training.numerics.shards import open_capture;"
        f"h.harvest(load_sae({str(rows.sae.files)!r}), open_capture({str(rows.capture.folder)!r}), {RESID!r},"
        f" {str(rows.data / 'views' / '7.new')!r}, k=12)"
    )
    note = rows.data / "views" / "7.new.tmp" / "scratch.json"
    child = subprocess.Popen([sys.executable, "-c", slow], cwd=ROOT)  # where kernels are compiled already
    try:
        done = wait_for(
            lambda: note.exists() and json.loads(note.read_text() or "{}").get("done", 0) > 300 and note, 300
        )
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    before = json.loads(done.read_text())["done"]
    seen: list[int] = []
    from concepts.numerics import sparse_encode
    from concepts.numerics.harvest import harvest
    from saes.numerics.formats import load_sae
    from training.numerics.shards import open_capture

    assert sparse_encode.CHUNK_ROWS > 50
    summary = harvest(
        load_sae(rows.sae.files), open_capture(rows.capture.folder), RESID, rows.data / "views" / "7.new", k=12,
        progress=lambda done, total, step: seen.append(done),
    )  # fmt: skip
    assert summary["n_tokens"] == 1738 and min(seen) > before >= 300
