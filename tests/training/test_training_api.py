"""The way from text to an SAE by /api/v1, under the same rules as the pages."""

from __future__ import annotations

from typing import Any

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from django.utils import timezone

from saehub.jobs.models import Job, State
from saes.models import SAE
from tests.api_calls import good, problem
from training.models import Capture, Corpus, Run

pytestmark = pytest.mark.django_db
HOOK = "blocks.1.hook_resid_post"
TEXT = "An exception is raised when the key is missing. Paris is the capital of France, and Rome is that of Italy.\n"


def test_models_and_their_layers(api: Any, model: Any) -> None:
    found = good(api("viewer", "get", "/models", scope="read"))["items"]
    assert [(one["id"], one["name"], one["status"]) for one in found] == [(model.pk, "tiny", "available")]
    layers = good(api("viewer", "get", f"/models/{model.pk}/layers?layer=1"))
    last = next(one for one in layers["items"] if one["layer_id"] == HOOK)
    assert (last["type"], last["layer"], last["d"]) == ("hook_resid_post", 1, 32)
    assert last["path"] == last["name"].split(".")
    problem(api("researcher", "post", "/models", {"source": "hub", "location": "not an id"}), 422, "repository id")
    problem(api("viewer", "post", "/models", {"location": "a/b"}), 403)
    added = good(api("researcher", "post", "/models", {"location": "org/model"}), 202)
    assert added["status"] == "queued" and added["job_ids"] == [added["job_id"]]


def test_corpora(api: Any, run_job: Any, user_of: Any) -> None:
    made = good(api("researcher", "post", "/corpora", {"name": "sentences", "text": TEXT * 3}), 202)
    row = Corpus.objects.get(pk=made["id"])
    assert row.owner == user_of("researcher") and made["job_ids"] == [row.job_id] and made["state"] == "queued"
    run_job(row.job)
    found = good(api("viewer", "get", f"/corpora/{row.pk}"))
    assert (found["state"], found["n_documents"], found["job_ids"]) == ("ready", 1, [])
    problem(api("researcher", "post", "/corpora", {"name": "sentences", "text": "x"}), 422, "already one named")
    problem(api("researcher", "post", "/corpora", {"text": "x", "path": "/y"}), 422, "Say one of")
    problem(api("researcher", "post", "/corpora", {"path": "/etc/passwd"}), 422, "Pages may read only under")
    problem(api("viewer", "post", "/corpora", {"text": "x"}), 403)
    hub = {"dataset": {"name": "Salesforce/wikitext", "split": "train", "subset": "a", "text_field": "text"}}
    row = Corpus.objects.get(pk=good(api("researcher", "post", "/corpora", hub), 202)["id"])
    assert (row.source, row.location, row.split, row.subset) == ("hub", "Salesforce/wikitext", "train", "a")


def test_a_file_becomes_a_corpus(api: Any, run_job: Any) -> None:
    data = {"file": SimpleUploadedFile("lines.jsonl", b'{"words": "one"}\n{"words": "two"}\n'), "text_field": "words"}
    row = Corpus.objects.get(pk=good(api("researcher", "post", "/corpora/upload", data=data), 202)["id"])
    assert run_job(row.job).state == State.DONE
    assert good(api("viewer", "get", f"/corpora/{row.pk}"))["n_documents"] == 2
    data = {"file": SimpleUploadedFile("a.txt", b"\xff\xfe\x00")}
    problem(api("researcher", "post", "/corpora/upload", data=data), 422, "not UTF-8")
    problem(api("researcher", "post", "/corpora/upload", data={"name": "x"}), 422, "file")


def save(model: Any, corpus: Any, **more: Any) -> dict[str, Any]:
    given = {"model_id": model.pk, "layers": [HOOK], "dataset": {"corpus_id": corpus.pk}, "max_tokens": 1500}
    return given | {"options": {"context_length": 32}} | more


def test_activations_are_saved_as_the_page_saves_them(
    api: Any, model: Any, make_corpus: Any, run_job: Any, user_of: Any
) -> None:
    corpus, _ = make_corpus(TEXT * 60)
    made = good(api("researcher", "post", "/activations/save", save(model, corpus, run_id="mine")), 202)
    row = Capture.objects.get(pk=made["id"])
    assert (row.name, row.hook_names, row.max_tokens, row.context_length) == ("mine", [HOOK], 1500, 32)
    assert row.prepend_bos and not row.store_special and row.owner == user_of("researcher"), "as on the page"
    job = run_job(row.job)
    assert job.state == State.DONE, job.traceback
    found = good(api("viewer", "get", f"/activations/{row.pk}"))
    row.refresh_from_db()
    assert (found["run_id"], found["status"], found["layers"]) == (row.pk, "ready", [HOOK])
    assert (found["tokens"], found["samples"]) == (row.n_tokens, row.n_contexts)
    assert sum(one["token_counts"] for one in found["batches"]) == row.n_tokens
    assert sum(one["size"] for one in found["batches"]) == row.n_contexts
    assert found["manifest"]["n_tokens"] == row.n_tokens and found["hidden_dims"] == {HOOK: 32}
    listed = good(api("viewer", "get", f"/activations?model_id={model.pk}"))
    assert [one["id"] for one in listed["items"]] == [row.pk]


def test_yes_and_no_reach_the_choices_of_two(api: Any, model: Any, make_corpus: Any) -> None:
    """The page offers them as choices: `false` must not become the one that stands when nothing is said."""
    corpus, _ = make_corpus(TEXT * 60)
    for number, (packed, stored) in enumerate(((False, True), (True, False))):
        options = {"context_length": 32, "packed": packed, "stored": stored}
        body = save(model, corpus, options=options, run_id=f"c{number}")
        row = Capture.objects.get(pk=good(api("researcher", "post", "/activations/save", body), 202)["id"])
        assert (row.packed, row.stored) == (packed, stored)


@pytest.mark.parametrize(
    ("changes", "field", "said"),
    [
        ({"layers": ["blocks.9.hook_resid_post"]}, "layers", "There is no layer 9"),
        ({"dataset": {"corpus_id": 99}}, "dataset.corpus_id", ""),
        ({"dataset": {"type": "hf", "name": "org/unknown"}}, None, "POST /corpora"),
        ({"dataset": {}}, None, "corpus_id"),
        ({"model_id": 99}, "model_id", ""),
        ({"max_tokens": 0}, "max_tokens", ""),
        ({"options": {"context_length": 100_000}}, "context_length", "reads at most"),
        ({"options": {"colour": 1}}, "colour", "There is no colour"),
    ],
)
def test_what_cannot_be_saved_is_one_sentence(
    changes: Any, field: str | None, said: str, api: Any, model: Any, make_corpus: Any
) -> None:
    corpus, _ = make_corpus(TEXT * 60)
    found = problem(api("researcher", "post", "/activations/save", save(model, corpus, **changes)), 422, said)
    assert field is None or field in found["errors"]
    assert not Capture.objects.exists()


def test_activations_that_are_used_are_not_deleted(
    api: Any, make_run: Any, django_capture_on_commit_callbacks: Any
) -> None:
    run, _ = make_run()
    capture, folder = run.capture, run.capture.folder
    problem(api("researcher", "delete", f"/activations/{capture.pk}"), 403)
    found = problem(api("curator", "delete", f"/activations/{capture.pk}"), 409, "is used by")
    assert {"what": "run", "id": run.pk, "name": run.name} in found["users"]
    Job.objects.filter(pk=run.job_id).update(state=State.RUNNING)
    problem(api("curator", "delete", f"/activations/{capture.pk}?force=true"), 409, "A job works on")
    Job.objects.filter(pk=run.job_id).update(state=State.DONE)
    with django_capture_on_commit_callbacks(execute=True):
        assert good(api("curator", "delete", f"/activations/{capture.pk}?force=true"))["runs"] == [run.pk]
    assert not Capture.objects.exists() and not Run.objects.exists() and not folder.exists()
    assert SAE.objects.filter(pk=run.sae_id).exists(), "what was trained stays"
    problem(api("curator", "delete", f"/activations/{capture.pk}"), 404)


def test_what_could_not_be_deleted_keeps_its_files(
    api: Any, make_run: Any, django_capture_on_commit_callbacks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = make_run()
    capture = run.capture

    def lost(row: Capture) -> None:
        raise OSError("The connection is lost.")

    monkeypatch.setattr(Capture, "delete", lost)
    with django_capture_on_commit_callbacks(execute=True), pytest.raises(OSError, match="is lost"):
        api("curator", "delete", f"/activations/{capture.pk}?force=true")
    assert Run.objects.filter(pk=run.pk).exists() and run.folder.exists() and capture.folder.exists()


def test_an_sae_is_trained_and_says_where_it_comes_from(api: Any, make_capture: Any, run_job: Any) -> None:
    capture, _ = make_capture()
    given = {
        "activations_id": capture.pk, "sae_class": "TopKSae", "sae_kwargs": {"k": 4}, "n_latents": 64,
        "hyperparams": {"n_tokens": 1280, "batch_size": 64, "learning_rate": 0.001}, "run_id": "small",
        "training_config": {"evaluate_after": False, "harvest_after": False},
    }  # fmt: skip
    made = good(api("researcher", "post", "/train", given), 202)
    run = Run.objects.get(pk=made["id"])
    assert (run.name, run.architecture, run.hook_name) == ("small", "topk", HOOK)
    assert (run.config["k"], run.config["d_sae"], run.config["lr"], run.config["seed"]) == (4, 64, 0.001, 0)
    assert not run.evaluate_after and not run.harvest_after
    job = run_job(run.job)
    assert job.state == State.DONE, job.traceback
    found = good(api("viewer", "get", f"/train/{run.pk}"))
    assert found["status"] == "done" and found["progress"] == 1.0 and found["logs"] and found["step"]
    assert found["metrics"] and found["sae_path"] == f"/api/v1/saes/{found['sae_id']}"
    result = good(api("viewer", "get", f"/jobs/{job.pk}"))["result"]
    assert result["sae_id"] == found["sae_id"] and {"sae_path", "metadata_path"} <= set(result)
    points = good(api("viewer", "get", f"/train/{run.pk}/points?limit=200"))
    assert points["count"] == run.points.count() and points["items"][-1]["step"] == found["step"]
    about = good(api("viewer", "get", found["metadata_path"].removeprefix("/api/v1")))
    assert (about["sae_id"], about["run_id"], about["activations_id"]) == (found["sae_id"], run.pk, capture.pk)
    assert about["training"]["history"] == points["items"] and about["sae_kwargs"] == {"k": 4}
    assert about["manifest"]["n_tokens"] == capture.n_tokens and about["config"]["d_sae"] == 64


def test_a_run_is_stopped_or_cancelled_by_its_owner(api: Any, make_capture: Any) -> None:
    capture, _ = make_capture()
    given = {"activations_id": capture.pk, "sae_kwargs": {"k": 4}, "n_latents": 64, "hyperparams": {"n_tokens": 1280}}
    made = good(api("researcher", "post", "/train", given, key="once"), 202)
    assert good(api("researcher", "post", "/train", given, key="once"), 202)["job_id"] == made["job_id"]
    assert Run.objects.count() == 1
    for action in ("stop", "cancel"):
        problem(api("viewer", "post", f"/train/{made['id']}/{action}"), 403)
        problem(api("researcher", "post", f"/train/{made['id']}/{action}", scope="read"), 403)
    problem(api("annotator", "post", f"/train/{made['id']}/cancel"), 403, "somebody else")
    problem(api("researcher", "post", f"/train/{made['id']}/stop"), 409, "no checkpoint yet")
    Job.objects.update(state=State.RUNNING)
    good(api("researcher", "post", f"/train/{made['id']}/stop"))
    assert Run.objects.get().stop_at is not None
    Job.objects.update(state=State.QUEUED)
    assert good(api("researcher", "post", f"/train/{made['id']}/cancel"))["status"] == "cancelled"
    problem(
        api("researcher", "post", f"/train/{made['id']}/stop"), 409, "no checkpoint yet, so there is nothing to keep"
    )


@pytest.mark.parametrize(
    ("changes", "field", "said"),
    [
        ({"activations_id": 99}, None, "no finished activations"),
        ({"layer": "blocks.0.hook_resid_pre"}, "layer", "does not hold this hook point"),
        ({"sae_class": "Magic"}, "sae_class", ""),
        ({"sae_kwargs": {"k": 0}}, "k", ""),
        ({"sae_kwargs": {"k": 65}}, "k", "only 64 features"),
        ({"sae_kwargs": {"kk": 1}}, "kk", "There is no kk"),
        ({"hyperparams": {"lr": "fast"}}, "lr", ""),
        ({"hyperparams": {"seed": 1}, "training_config": {"seed": 2}}, None, "given twice"),
        ({"n_latents": 0}, "n_latents", ""),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(
    changes: Any, field: str | None, said: str, api: Any, make_capture: Any
) -> None:
    capture, _ = make_capture()
    given = {"activations_id": capture.pk, "sae_kwargs": {"k": 4}, "n_latents": 64} | changes
    found = problem(api("researcher", "post", "/train", given), 422, said)
    assert field is None or field in found["errors"]
    assert not Run.objects.exists()


def test_the_classes_say_what_they_are_asked(api: Any) -> None:
    found = {one["name"]: one for one in good(api("viewer", "get", "/saes/classes"))["items"]}
    assert found["topk"]["aliases"] == ["TopKSae"] and found["standard"]["aliases"] == ["L1Sae"]
    fields = {one["name"]: one for one in found["topk"]["fields"]}
    assert (fields["k"]["type"], fields["k"]["default"], fields["k"]["minimum"]) == ("integer", 32, 1)
    assert fields["lr"]["type"] == "number" and "l1_coefficient" not in fields
    assert "l1_coefficient" in {one["name"] for one in found["standard"]["fields"]}


def test_the_list_asks_as_often_for_three_as_for_one(
    api: Any, make_capture: Any, user_of: Any, django_assert_num_queries: Any
) -> None:
    capture, _ = make_capture()

    def make(n: int) -> None:
        for _ in range(n):
            Run.objects.create(
                name="r", capture=capture, hook_name=HOOK, architecture="topk", owner=user_of("researcher"),
                ready_at=timezone.now(),
            )  # fmt: skip
            Capture.objects.create(
                name="c", model=capture.model, corpus=capture.corpus, owner=user_of("researcher"), hook_names=[HOOK]
            )

    make(1)
    api("viewer", "get", "/train")
    for more in (0, 2):
        make(more)
        for path in ("/train", "/activations"):
            with django_assert_num_queries(7):  # new token, token, its use, two of permissions, count, rows
                found = good(api("viewer", "get", path))
    assert found["count"] == 4
