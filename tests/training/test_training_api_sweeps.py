"""Sweeps, pauses, documents, evaluations and comparisons by /api/v1: what the pages do, under their rules."""

from __future__ import annotations

import json
from typing import Any

import pytest

from saehub.jobs.models import Job, State
from tests.api_calls import good, problem
from tests.training.conftest import HOOK
from training.models import Evaluation, Run, Sweep

pytestmark = pytest.mark.django_db
SMALL = {"n_tokens": 640, "batch_size": 64, "evaluate_after": False, "harvest_after": False}


def test_several_saes_are_trained_by_one_sweep(api: Any, make_capture: Any, run_job: Any) -> None:
    capture, _ = make_capture()
    given = {"activations_id": capture.pk, "sae_kwargs": {"k": [2, 4]}, "n_latents": [32, 64], "hyperparams": SMALL}
    problem(api("viewer", "post", "/train/sweeps", given), 403)
    problem(api("researcher", "post", "/train", given), 422, "That are 4 SAEs")
    problem(
        api("researcher", "post", "/train/sweeps", given | {"n_latents": 64, "sae_kwargs": {"k": 4}}), 422, "one SAE"
    )
    made = good(api("researcher", "post", "/train/sweeps", given, key="s"), 202)
    assert good(api("researcher", "post", "/train/sweeps", given, key="s"), 202)["id"] == made["id"]
    sweep = Sweep.objects.get()
    assert (
        made["grid"] == {"k": [2, 4], "d_sae": [32, 64]} and made["n_runs"] == 4 and made["job_ids"] == [sweep.job_id]
    )
    problem(api("annotator", "post", f"/train/sweeps/{sweep.pk}/pause"), 403)
    problem(api("researcher", "post", f"/train/sweeps/{sweep.pk}/resume"), 409, "None of its runs")
    job = run_job(sweep.job)
    assert job.state == State.DONE, job.traceback
    found = good(api("viewer", "get", f"/train/sweeps/{sweep.pk}", scope="read"))
    assert (found["status"], found["n_ready"]) == ("done", 4)
    assert {(one["values"]["k"], one["values"]["d_sae"]) for one in found["runs"]} == {
        (2, 32),
        (2, 64),
        (4, 32),
        (4, 64),
    }
    assert all(one["sae_id"] and one["l0"] for one in found["runs"])
    listed = good(api("viewer", "get", f"/train/sweeps?activations_id={capture.pk}"))
    assert [one["id"] for one in listed["items"]] == [sweep.pk]
    document = good(api("viewer", "get", f"/train/sweeps/{sweep.pk}/document"))
    again = good(api("researcher", "post", "/train/sweeps", {"document": document | {"name": "again"}}), 202)
    assert again["grid"] == made["grid"] and again["name"] == "again"


def test_a_run_pauses_goes_on_and_is_trained_again_from_its_document(api: Any, make_capture: Any, run_job: Any) -> None:
    capture, _ = make_capture()
    given = {"activations_id": capture.pk, "sae_kwargs": {"k": 4}, "n_latents": 64, "hyperparams": SMALL}
    made = good(api("researcher", "post", "/train", given), 202)
    address = f"/train/{made['id']}"
    problem(api("researcher", "post", f"{address}/resume"), 409, "Only a paused run")
    problem(api("annotator", "post", f"{address}/pause"), 403)
    assert good(api("researcher", "post", f"{address}/pause"))["job_ids"] == []
    assert Job.objects.get(pk=made["job_id"]).state == State.CANCELLED
    assert good(api("viewer", "get", address))["status"] == "paused"
    problem(api("researcher", "post", f"{address}/pause"), 409, "nothing to pause")
    on = good(api("researcher", "post", f"{address}/resume", key="r"), 202)
    assert (
        good(api("researcher", "post", f"{address}/resume", key="r"), 202)["job_id"] == on["job_id"] != made["job_id"]
    )
    job = run_job(Job.objects.get(pk=on["job_id"]))
    assert job.state == State.DONE, job.traceback
    assert good(api("viewer", "get", address))["sae_id"]
    document = good(api("viewer", "get", f"{address}/document"))
    assert (document["k"], document["hook_name"], document["capture"]) == (4, HOOK, capture.pk)
    again = good(api("researcher", "post", "/train", {"document": document | {"name": "again"}}), 202)
    first, second = Run.objects.order_by("pk")
    assert again["id"] == second.pk and second.config == first.config
    problem(api("researcher", "post", "/train", {"document": "k: ["}), 422, "document: This is not YAML")
    problem(api("researcher", "post", "/train", {"document": document | {"kk": 1}}), 422, "There is no setting kk")
    problem(api("researcher", "post", "/train", {"document": document, "layer": HOOK}), 422, "nothing beside it")


def test_saes_are_evaluated_and_compared(api: Any, make_run: Any, run_job: Any) -> None:
    run, _ = make_run()
    sae, capture = run.sae, run.capture
    Evaluation.objects.all().delete()
    address = f"/saes/{sae.pk}/evaluate"
    problem(api("viewer", "post", address, {"activations_id": capture.pk}), 403)
    problem(api("researcher", "post", address, {}), 422, "Choose a capture")
    problem(api("researcher", "post", address, {"activations_id": 999}), 422, "activations_id")
    both = {"activations_id": capture.pk, "corpus_id": capture.corpus_id}
    problem(api("researcher", "post", address, both), 422, "not both")
    made = good(api("researcher", "post", address, {"activations_id": capture.pk, "max_contexts": 2}), 202)
    row = Evaluation.objects.get()
    assert (row.capture, row.max_contexts, made["saebench_path"]) == (capture, 2, None)
    problem(api("viewer", "get", f"/evaluations/{row.pk}/saebench"), 404, "not finished")
    job = run_job(row.job)
    assert job.state == State.DONE, job.traceback
    found = good(api("viewer", "get", f"/evaluations/{row.pk}", scope="read"))
    metric = found["metrics"]["explained_variance"]
    assert found["status"] == "done" and metric["n"] > 0 and metric["definition"]
    answer = api("viewer", "get", found["saebench_path"].removeprefix("/api/v1"))
    saved = json.loads(b"".join(answer.streaming_content))
    assert saved["eval_type_id"] == "core"
    assert good(api("viewer", "get", f"/evaluations?sae_id={sae.pk}"))["count"] == 1
    other = type(sae).objects.create(name="other", source="trained", model=sae.model, hook_name=sae.hook_name)
    held = good(api("viewer", "get", f"/saes/compare?ids={sae.pk},{other.pk}"))
    assert [one["sae_id"] for one in held["saes"]] == [sae.pk, other.pk]
    assert held["saes"][0]["metrics"]["explained_variance"] == metric["value"] and held["saes"][1]["metrics"] == {}
    problem(api("viewer", "get", f"/saes/compare?ids={sae.pk}"), 422, "from 2 to 6")
    problem(api("viewer", "get", "/saes/compare?ids=a,b"), 422, "numbers of SAEs")
    problem(api("viewer", "get", f"/saes/compare?ids={sae.pk},999"), 404, "There is no SAE 999")


def test_files_of_activations_are_checked_and_exported(api: Any, make_capture: Any, run_job: Any) -> None:
    capture, _ = make_capture()
    for action, kind in (("verify", "verify_capture"), ("export", "export_capture")):
        problem(api("viewer", "post", f"/activations/{capture.pk}/{action}"), 403)
        made = good(api("researcher", "post", f"/activations/{capture.pk}/{action}"), 202)
        problem(api("researcher", "post", f"/activations/{capture.pk}/{action}"), 409, "under way")
        job = Job.objects.get(pk=made["job_id"])
        assert job.kind == kind and run_job(job).state == State.DONE
