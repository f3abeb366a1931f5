"""Batches, rankings of several texts, sweeps and the full queue by /api/v1."""

from __future__ import annotations

import io
from typing import Any

import pyarrow.parquet as parquet
import pytest

from inference.codes import TEXT
from inference.models import Generation, PromptBatch, Sweep
from saehub.jobs import starting
from saehub.jobs.models import State, enqueue
from tests.api_calls import good, problem
from tests.steering_rows import Rows
from tests.training.chats import CHATS, chatting, jsonl

pytestmark = pytest.mark.django_db


def test_a_corpus_is_read_into_a_table(rows: Rows, api: Any, run_job: Any) -> None:
    rows.corpus.folder.mkdir(parents=True)
    rows.corpus.file.write_text("The cat sat.\n\nParis is the capital of France.\n", encoding="utf-8")
    run_job(rows.corpus.start(rows.owner))
    given = {"corpus_id": rows.corpus.pk, "sae_ids": [rows.sae.pk], "top": 3}
    problem(api("viewer", "post", "/infer/batches", given), 403)
    problem(api("researcher", "post", "/infer/batches", given | {"corpus_id": 99}), 422, "corpus_id")
    problem(api("researcher", "post", "/infer/batches", given | {"sae_ids": [99]}), 422, "sae_ids")
    made = good(api("researcher", "post", "/infer/batches", given, key="b"), 202)
    assert good(api("researcher", "post", "/infer/batches", given, key="b"), 202)["id"] == made["id"]
    row = PromptBatch.objects.get()
    assert (row.top, list(row.saes.all()), made["file_path"]) == (3, [rows.sae], None)
    problem(api("viewer", "get", f"/infer/batches/{row.pk}/file"), 409, "not finished")
    job = run_job(row.job)
    assert job.state == State.DONE, job.traceback
    found = good(api("viewer", "get", f"/infer/batches/{row.pk}", scope="read"))
    answer = api("viewer", "get", found["file_path"].removeprefix("/api/v1"))
    table = parquet.read_table(io.BytesIO(b"".join(answer.streaming_content)))
    assert table.num_rows == found["n_rows"] > 0 and found["status"] == "done"
    assert good(api("viewer", "get", f"/infer/batches?sae_id={rows.sae.pk}"))["count"] == 1


def test_conversations_are_read_through_the_chat_template(
    rows: Rows, api: Any, run_job: Any, tmp_path: Any, tiny_model_dir: Any
) -> None:
    from saes.numerics.lm import load_lm

    rows.corpus.folder.mkdir(parents=True)
    rows.corpus.location = "chats.jsonl"
    rows.corpus.file.write_text(jsonl(CHATS[:3]), encoding="utf-8")
    rows.corpus.save()
    assert run_job(rows.corpus.start(rows.owner)).state == State.DONE
    given = {"corpus_id": rows.corpus.pk, "sae_ids": [rows.sae.pk], "top": 1}
    problem(api("researcher", "post", "/infer/batches", given), 422, "has no chat template to read them through")
    rows.model.location, rows.model.has_chat = str(chatting(tiny_model_dir, tmp_path)), True
    rows.model.save()
    made = good(api("researcher", "post", "/infer/batches", given), 202)
    row = PromptBatch.objects.get(pk=made["id"])
    job = run_job(row.job)
    assert job.state == State.DONE, job.traceback
    row.refresh_from_db()
    tokenizer = load_lm(rows.model.load_from).tokenizer
    own = [tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"] for chat in CHATS[:3]]
    assert row.n_tokens == sum(map(len, own)) and row.policy["chat_template"] is True


def test_every_text_is_ranked(rows: Rows, api: Any, run_job: Any) -> None:
    given = {"sae_ids": [rows.sae.pk], "prompts": ["The cat sat on the mat.", "Paris is the capital of"]}
    from inference.models import Inference

    made = good(api("annotator", "post", "/infer", given), 202)
    assert run_job(Inference.objects.get().job).state == State.DONE
    answer = good(api("viewer", "get", f"/infer/{made['id']}"))
    both = good(api("viewer", "get", f"/infer/{made['id']}/features?order=value&top=1"))
    assert [one["prompt_index"] for one in both["items"]] == [0, 1]
    for number, one in enumerate(both["items"]):
        best = answer["top_neurons"][number]
        assert one["features"][0]["value"] == pytest.approx(max(best["activations"]))
    second = good(api("viewer", "get", f"/infer/{made['id']}/features?order=value&top=1&prompt_index=1"))
    assert second["items"] == both["items"][1:]
    problem(api("viewer", "get", f"/infer/{made['id']}/features?prompt_index=2"), 422, "2 texts")
    problem(api("viewer", "get", f"/infer/{made['id']}/features?token=1"), 422, "prompt_index")
    at = good(api("viewer", "get", f"/infer/{made['id']}/features?order=value&token=1&prompt_index=1"))
    assert {hit["token"] for hit in at["items"][0]["features"]} == {1}
    (Inference.objects.get().text_folder(0) / TEXT).unlink()
    part = good(api("viewer", "get", f"/infer/{made['id']}/features?order=value&top=1&limit=1&offset=1"))
    assert part["items"] == both["items"][1:] and part["count"] == 2, "of a page only its own texts are read"
    problem(api("viewer", "get", f"/infer/{made['id']}/features?limit=1"), 410, "gone or damaged")


def test_sweeps_are_listed(rows: Rows, api: Any) -> None:
    asked = Generation.objects.create(model=rows.model, sae=rows.sae, prompt="a", name="a", owner=rows.owner)
    Sweep.objects.create(generation=asked, name="s", factors=[0.0, 1.0], owner=rows.owner)
    found = good(api("viewer", "get", f"/sweeps?generation_id={asked.pk}"))
    assert [one["factors"] for one in found["items"]] == [[0.0, 1.0]]
    assert good(api("viewer", "get", f"/sweeps?generation_id={asked.pk + 1}"))["count"] == 0


def test_who_fills_the_queue_is_asked_to_wait(
    rows: Rows, api: Any, user_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starting, "MOST_WAITING", 2)
    given = {"sae_ids": [rows.sae.pk], "prompts": ["a"]}
    first = good(api("annotator", "post", "/infer", given, key="k"), 202)
    enqueue("probe", user_of("annotator"), title="count", steps=1)
    answer = api("annotator", "post", "/infer", given, key="new")
    assert problem(answer, 429, "2 of your jobs wait")["retry_after"] == 30 and answer["Retry-After"] == "30"
    assert good(api("annotator", "post", "/infer", given, key="k"), 202)["id"] == first["id"], (
        "sent again, not done again"
    )
    good(api("researcher", "post", "/infer", given), 202)
