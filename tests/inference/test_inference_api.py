"""Reading and steering by /api/v1, in the words of the seed's server, under the rules of the pages."""

from __future__ import annotations

from typing import Any

import pytest

from concepts.models import ConceptConfig
from inference.codes import CodesFile
from inference.models import Generation, Inference, Sweep
from saehub.jobs.models import State
from tests.api_calls import good, problem
from tests.steering_rows import Rows

pytestmark = pytest.mark.django_db
PROMPTS = ["The cat sat on the mat.", "Paris is the capital of"]


def read(rows: Rows, api: Any, run_job: Any, role: str = "annotator", **more: Any) -> dict[str, Any]:
    """Asked, done and fetched."""
    given = {"sae_ids": [rows.sae.pk], "prompts": PROMPTS, "top_k_neurons": 4} | more
    made = good(api(role, "post", "/infer", given), 202)
    row = Inference.objects.get(pk=made["id"])
    assert made["job_ids"] == [row.job_id] and made["outputs"] == []
    job = run_job(row.job)
    assert job.state == State.DONE, job.traceback
    found: dict[str, Any] = good(api("viewer", "get", f"/infer/{row.pk}", scope="read"))
    return found


def test_texts_are_read_and_the_answer_has_the_fields_of_the_seed(rows: Rows, api: Any, run_job: Any) -> None:
    found = read(
        rows, api, run_job, return_logits=True, return_probabilities=True, top_next=3, return_token_latents=True,
        save_top_texts=True, generation={"max_new_tokens": 4},
    )  # fmt: skip
    assert (found["status"], found["sae_id"], found["sae_path"]) == ("done", rows.sae.pk, f"/api/v1/saes/{rows.sae.pk}")
    assert [one["prompt"] for one in found["outputs"]] == PROMPTS
    first = found["outputs"][0]
    assert first["text"].startswith(PROMPTS[0]) and len(first["tokens"]) == len(first["token_ids"])
    assert len(first["token_ids"]) == first["n_prompt_tokens"] + 4
    assert [len(one) for one in (first["logits"][2], first["probabilities"][2])] == [3, 3]
    row = Inference.objects.get()
    strongest = CodesFile(row.text_folder(1)).sae(0).strongest(4)
    assert found["top_neurons"][1]["neuron_ids"] == [one.feature for one in strongest]
    assert found["top_neurons"][1]["activations"] == pytest.approx([one.maximum for one in strongest])
    at = found["token_latents"][0]["tokens"][2]
    assert list(zip(at["neuron_ids"], at["activations"], strict=True)) == CodesFile(row.folder).sae(0).at(2, 4)
    texts = api("viewer", "get", found["top_texts_path"].removeprefix("/api/v1"))
    assert texts["Content-Type"].startswith("application/json")
    import json

    saved = json.loads(b"".join(texts.streaming_content))
    assert saved["sae_id"] == rows.sae.pk and saved["prompts"] == PROMPTS


def test_without_asking_there_are_no_top_texts_and_no_logits(rows: Rows, api: Any, run_job: Any) -> None:
    found = read(rows, api, run_job)
    assert found["top_texts_path"] is None and found["outputs"][0]["logits"] is None
    problem(api("viewer", "get", f"/infer/{found['id']}/top-texts"), 404, "save_top_texts")


def test_what_fires_is_ranked_over_all_saes(rows: Rows, api: Any, run_job: Any, view: Any) -> None:
    found = read(rows, api, run_job)
    ranked = good(api("viewer", "get", f"/infer/{found['id']}/features?order=value&top=3&prompt_index=0"))["items"]
    assert [one["sae_id"] for one in ranked] == [rows.sae.pk] and ranked[0]["harvested"]
    values = [one["value"] for one in ranked[0]["features"]]
    assert len(values) == 3 and values == sorted(values, reverse=True)
    problem(api("viewer", "get", f"/infer/{found['id']}/features?prompt_index=0&token=5000"), 422, "counted from 0")


def test_a_config_steers_one_request_by_id_or_said_there(rows: Rows, api: Any, run_job: Any) -> None:
    edits = [{"feature": 3, "mode": "add", "value": 60.0}]
    config = ConceptConfig.next_version(rows.sae, "cats", edits, rows.owner)
    options = {"generation": {"max_new_tokens": 6}}
    plain = read(rows, api, run_job, **options)
    by_id = read(rows, api, run_job, concept_config_id=config.pk, **options)
    inline = read(rows, api, run_job, concept_config={"sae_id": rows.sae.pk, "edits": edits}, **options)
    after = read(rows, api, run_job, **options)
    texts = [[one["completion"] for one in found["outputs"]] for found in (plain, by_id, inline, after)]
    assert texts[0] == texts[3] != texts[1] == texts[2], "it acts in its own request alone"
    assert by_id["concept_config"]["id"] == config.pk and ConceptConfig.objects.count() == 1


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({"sae_ids": []}, 422, "sae_ids"),
        ({"sae_ids": [999]}, 422, "cannot be used here"),
        ({"prompts": []}, 422, "at least one prompt"),
        ({"prompts": [" "]}, 422, "inputs"),
        ({"prompts": ["a" * 20_000]}, 422, "characters"),
        ({"top_k_neurons": 0}, 422, "top_k_neurons"),
        ({"generation": {"max_new_tokens": 100_000}}, 422, "generation.max_new_tokens"),
        ({"generation": {"heat": 1}}, 422, "heat"),
        ({"concept_config_id": 999}, 422, "concept_config_id"),
        ({"concept_config": {"sae_id": 999}}, 404, "nothing of this number"),
        ({"concept_config": {"sae_id": 1, "edits": [{"feature": 10**6, "mode": "add", "value": 1}]}}, 0, ""),
    ],
)
def test_what_cannot_be_read_is_one_sentence(changes: Any, status: int, said: str, rows: Rows, api: Any) -> None:
    if not status:
        changes["concept_config"]["sae_id"] = rows.sae.pk
        changes |= {"generation": {"max_new_tokens": 2}}
        status, said = 422, "no feature"
    problem(api("annotator", "post", "/infer", {"sae_ids": [rows.sae.pk], "prompts": PROMPTS} | changes), status, said)
    assert not Inference.objects.exists()


def test_who_may_read_texts(rows: Rows, api: Any) -> None:
    given = {"sae_id": rows.sae.pk, "inputs": [{"prompt": "a"}]}
    problem(api("viewer", "post", "/infer", given), 403)
    problem(api("annotator", "post", "/infer", given, scope="read"), 403)
    problem(api("stranger", "get", "/infer"), 403)
    first = good(api("annotator", "post", "/infer", given, key="k"), 202)
    assert good(api("annotator", "post", "/infer", given, key="k"), 202)["job_id"] == first["job_id"]
    assert [one["id"] for one in good(api("viewer", "get", f"/infer?sae_id={rows.sae.pk}"))["items"]] == [first["id"]]


def steer(rows: Rows, api: Any, **more: Any) -> Any:
    given = {"sae_id": rows.sae.pk, "prompt": "The cat", "max_new_tokens": 6, "seed": 3} | more
    return api("annotator", "post", "/generate", given)


def test_a_generation_beside_its_baseline(rows: Rows, api: Any, run_job: Any) -> None:
    edits = [{"feature": 3, "mode": "add", "value": 60.0}, {"feature": 5, "mode": "ablate"}]
    made = good(steer(rows, api, edits=edits, instruction="Be brief.", scope="generated"), 202)
    row = Generation.objects.get(pk=made["id"])
    assert (row.scope, row.seed, row.max_new_tokens) == ("generated", 3, 6) and len(row.edits) == 2
    job = run_job(row.job)
    assert job.state == State.DONE, job.traceback
    found = good(api("viewer", "get", f"/generate/{row.pk}"))
    row.refresh_from_db()
    assert found["steered"] == row.steered and found["steered_text"] == row.steered["text"]
    assert found["baseline_text"] != found["steered_text"] and found["prompted"]["text"]
    assert [edit["formula"] for edit in found["edits"]] == ["z' = z + v", "z' = 0"]
    export = good(api("viewer", "get", f"/generate/{row.pk}/export"))
    assert "from inference.numerics.generate import generate" in export["python"] and export["seed"] == 3
    swept = good(api("annotator", "post", f"/generate/{row.pk}/sweep", {"factors": [0, 1]}), 202)
    job = run_job(Sweep.objects.get(pk=swept["id"]).job)
    assert job.state == State.DONE, job.traceback
    points = good(api("viewer", "get", f"/sweeps/{swept['id']}"))["points"]
    assert [one["factor"] for one in points] == [0.0, 1.0]
    problem(api("annotator", "post", f"/generate/{row.pk}/sweep", {"factors": [1]}), 422, "from 2 to")


def test_a_generation_with_a_config(rows: Rows, api: Any) -> None:
    config = ConceptConfig.next_version(rows.sae, "cats", [{"feature": 3, "mode": "add", "value": 6.0}], rows.owner)
    given = {"prompt": "The cat", "concept_config_id": config.pk}
    made = good(api("annotator", "post", "/generate", given), 202)
    row = Generation.objects.get(pk=made["id"])
    assert row.sae == rows.sae and [(edit["feature"], edit["value"]) for edit in row.edits] == [(3, 6.0)]
    problem(steer(rows, api, concept_config_id=99), 422, "no such concept config")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"sae_id": 999}, "sae_id"),
        ({"prompt": ""}, "prompt"),
        ({"edits": [{"feature": 96, "mode": "add", "value": 1}]}, "edits.0.feature"),
        ({"edits": [{"feature": -1, "mode": "add", "value": 1}]}, "edits.0.feature"),
        ({"edits": [{"feature": 1, "mode": "add"}]}, "edits.0.value"),
        ({"edits": [{"feature": 1, "mode": "add", "value": 1e9}]}, "edits.0.value"),
        ({"edits": [{"feature": 1, "value": 1}, {"feature": 1, "value": 2}]}, "edits.1.feature"),
        ({"edits": [{"feature": i, "value": 1} for i in range(40)]}, "edits"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": 11}, "temperature"),
        ({"scope": "here"}, "given.scope"),
    ],
)
def test_what_cannot_be_generated_is_one_sentence(changes: Any, field: str, rows: Rows, api: Any) -> None:
    assert field in problem(steer(rows, api, **changes), 422)["errors"]
    assert not Generation.objects.exists()


def test_who_may_steer(rows: Rows, api: Any) -> None:
    problem(api("viewer", "post", "/generate", {"sae_id": rows.sae.pk, "prompt": "a"}), 403)
    problem(api("stranger", "get", "/generate"), 403)
    made = good(steer(rows, api), 202)
    assert good(api("viewer", "get", "/generate?q=cat", scope="read"))["items"][0]["id"] == made["id"]
    problem(api("viewer", "post", f"/generate/{made['id']}/sweep", {"factors": [0, 1]}), 403)
    problem(api("annotator", "post", f"/generate/{made['id']}/sweep", {"factors": [0, 1]}), 422, "has a strength")
    assert good(api("viewer", "get", "/residents"))["count"] == 0
