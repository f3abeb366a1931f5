"""Features, labels, dictionaries and configs by /api/v1, under the rules of the pages."""

from __future__ import annotations

import json
from typing import Any

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile

from concepts import imports
from concepts.models import ConceptConfig, ConceptDictionary, ConceptImport, Label
from saehub.jobs.models import Job, State
from tests.api_calls import good, problem
from tests.steering_rows import DEAD, Rows

pytestmark = pytest.mark.django_db


# ------------------------------------------------------------------------------------------------------------ features


def test_features_are_harvested_listed_and_looked_at(rows: Rows, api: Any, run_job: Any) -> None:
    address = f"/saes/{rows.sae.pk}"
    problem(api("viewer", "get", f"{address}/features"), 409, "not harvested")
    problem(api("viewer", "post", f"{address}/harvest", {"activations_id": rows.capture.pk}), 403)
    problem(api("researcher", "post", f"{address}/harvest", {"activations_id": 99}), 422, "activations_id")
    made = good(api("researcher", "post", f"{address}/harvest", {"activations_id": rows.capture.pk}), 202)
    problem(api("researcher", "post", f"{address}/harvest", {"activations_id": rows.capture.pk}), 409, "already")
    view = rows.sae.views.get(pk=made["id"])
    job = run_job(view.job)
    assert job.state == State.DONE, job.traceback
    view.refresh_from_db()
    columns = view.opened()
    found = good(api("viewer", "get", f"{address}/features?sort=-max&limit=5", scope="read"))
    assert [one["feature"] for one in found["items"]] == columns.sorted("max", True)[:5].tolist()
    assert found["count"] == 96 and found["view"]["id"] == view.pk
    dead = good(api("viewer", "get", f"{address}/features?state=dead"))
    assert DEAD in [one["feature"] for one in dead["items"]] and dead["items"][0]["mean"] is None
    first = found["items"][0]["feature"]
    one = good(api("viewer", "get", f"{address}/features/{first}?contexts=2"))
    record = columns.feature(first)
    assert (one["n_fires"], one["max"]) == (record.n_fires, record.maximum) and len(one["top_texts"]) == 2
    best = one["top_texts"][0]
    assert best["activations"][best["peak"]] == pytest.approx(best["value"]) == pytest.approx(record.maximum)
    assert [t["id"] for t in one["top_tokens"]] == [t.id for t in record.top_tokens]
    assert sum(one["histogram"]["counts"]) == one["n_fires"]
    problem(api("viewer", "get", f"{address}/features/96"), 404, "There is no feature 96")
    problem(api("viewer", "get", f"{address}/features?sort=colour"), 422, "sort")
    problem(api("viewer", "get", f"{address}/features?view=999"), 404, "no feature view")
    problem(api("stranger", "get", f"{address}/features"), 403)


def test_features_are_named_and_found(rows: Rows, api: Any, view: Any) -> None:
    address = f"/saes/{rows.sae.pk}/features/5/labels"
    problem(api("viewer", "post", address, {"text": "cats"}), 403)
    problem(api("annotator", "post", address, {"text": "cats"}, scope="read"), 403)
    problem(api("annotator", "post", address, {"text": " "}), 422, "text")
    problem(api("annotator", "post", f"/saes/{rows.sae.pk}/features/96/labels", {"text": "x"}), 404)
    mine = good(api("annotator", "post", address, {"text": "cats"}, key="k"), 201)
    assert good(api("annotator", "post", address, {"text": "cats"}, key="k"), 201) == mine and mine["accepted"]
    other = good(api("researcher", "post", address, {"text": "small animals"}), 201)
    assert not other["accepted"], "the accepted one is another person's"
    problem(api("researcher", "post", f"/labels/{other['id']}/accept"), 403, "somebody else")
    assert good(api("curator", "post", f"/labels/{other['id']}/accept"))["accepted"]
    listed = good(api("viewer", "get", f"/saes/{rows.sae.pk}/labels?feature=5&accepted=true"))
    assert [one["text"] for one in listed["items"]] == ["small animals"]
    named = good(api("viewer", "get", f"/saes/{rows.sae.pk}/features?named=named"))
    assert [(one["feature"], one["label"]) for one in named["items"]] == [(5, "small animals")]
    found = good(api("viewer", "get", "/features/search?by=label&q=small"))["items"]
    assert [(one["sae_id"], one["feature"]) for one in found] == [(rows.sae.pk, 5)]
    near = good(api("viewer", "get", f"/features/search?by=cosine&sae_id={rows.sae.pk}&feature=5"))["items"]
    cosines = [one["cosine"] for one in near]
    assert cosines == sorted(cosines, reverse=True) and near[0]["feature"] != 5
    problem(api("viewer", "get", "/features/search?by=cosine"), 422, "sae_id and feature")
    problem(api("viewer", "get", "/features/search"), 422, "which words")
    problem(api("annotator", "delete", f"/labels/{other['id']}"), 403)
    assert api("researcher", "delete", f"/labels/{other['id']}").status_code == 204
    assert Label.objects.get().text == "cats"


# -------------------------------------------------------------------------------------------------------- dictionaries


def csv(*lines: str) -> SimpleUploadedFile:
    return SimpleUploadedFile("c.csv", "\n".join(["neuron_idx,concept_name,score", *lines]).encode())


def test_a_file_is_looked_at_and_then_applied(rows: Rows, api: Any) -> None:
    data = {"file": csv("3,cats,0.9", "96,far,0.5", "-1,low,1"), "sae_id": rows.sae.pk, "dictionary": "animals"}
    problem(api("viewer", "post", "/concepts/load", data=data), 403)
    data["file"].seek(0)
    sent = good(api("researcher", "post", "/concepts/load", data=data))
    assert (sent["status"], sent["form"]) == ("looked at", "csv")
    assert sent["counts"] == {"added": 1, "changed": 0, "unchanged": 0, "refused": 2}
    assert sent["added"][0] == {"row": 2, "feature": 3, "name": "cats", "score": 0.9, "changes": ""}
    assert [one["row"] for one in sent["refused"]] == [3, 4] and "no feature 96" in sent["refused"][0]["reason"].lower()
    dictionary = ConceptDictionary.objects.get()
    assert dictionary.name == "animals" and not dictionary.concepts.exists(), "nothing is written before it is applied"
    problem(api("annotator", "post", f"/concepts/load/{sent['id']}/apply"), 403)
    done = good(api("researcher", "post", f"/concepts/load/{sent['id']}/apply", key="k"))
    assert done["status"] == "applied" and dictionary.concepts.get().name == "cats"
    good(api("researcher", "post", f"/concepts/load/{sent['id']}/apply", key="k"))
    problem(api("researcher", "post", f"/concepts/load/{sent['id']}/apply"), 409, "applied already")
    file = api("viewer", "get", f"/concepts/dictionaries/{dictionary.pk}/export?format=mi_crow")
    assert json.loads(b"".join(file.streaming_content)) == {
        "n_size": 96,
        "concepts": {"3": {"name": "cats", "score": 0.9}},
    }
    problem(api("viewer", "get", f"/concepts/dictionaries/{dictionary.pk}/export?format=xls"), 422, "there is no xls")


@pytest.mark.parametrize("key", ["", "once"])
def test_a_file_that_is_refused_is_not_kept(rows: Rows, api: Any, settings: Any, key: str) -> None:
    data = {"file": SimpleUploadedFile("c.json", b"[1, 2"), "sae_id": rows.sae.pk}
    problem(api("researcher", "post", "/concepts/load", data=data, key=key), 422, "file: ")
    assert not ConceptImport.objects.exists()
    assert not [path for path in settings.DATA_DIR.rglob("*") if "import" in path.parent.name]


def test_a_long_file_is_looked_at_by_a_job(rows: Rows, api: Any, run_job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imports, "LOOK_AT_ONCE", 10)
    sent = good(api("researcher", "post", "/concepts/load", data={"file": csv("4,dogs,1"), "sae_id": rows.sae.pk}), 202)
    assert (sent["status"], sent["added"]) == ("queued", []) and len(sent["job_ids"]) == 1
    problem(api("researcher", "post", f"/concepts/load/{sent['id']}/apply"), 409, "being looked at")
    run_job(Job.objects.get(pk=sent["job_ids"][0]))
    looked = good(api("researcher", "get", f"/concepts/load/{sent['id']}"))
    assert (looked["status"], looked["counts"]["added"], looked["added"][0]["name"]) == ("looked at", 1, "dogs")
    assert api("researcher", "delete", f"/concepts/load/{sent['id']}").status_code == 204


def test_a_file_of_labels_applied_at_once_and_one_thrown_away(rows: Rows, api: Any) -> None:
    data = {"file": csv("3,cats,0.9"), "sae_id": rows.sae.pk, "apply": "true"}
    assert good(api("researcher", "post", "/concepts/load", data=data))["status"] == "applied"
    assert Label.objects.get().accepted
    sent = good(api("researcher", "post", "/concepts/load", data={"file": csv("4,dogs,1"), "sae_id": rows.sae.pk}))
    assert api("researcher", "delete", f"/concepts/load/{sent['id']}").status_code == 204
    problem(api("researcher", "get", f"/concepts/load/{sent['id']}"), 404)
    assert Label.objects.count() == 1


def test_files_that_say_nothing(rows: Rows, api: Any) -> None:
    def send(content: bytes, **more: Any) -> Any:
        data = {"file": SimpleUploadedFile("c.csv", content)} | more
        return api("researcher", "post", "/concepts/load", data=data)

    problem(send(b'{"a": 1', sae_id=rows.sae.pk), 422)
    problem(send(b"name,score\n", sae_id=rows.sae.pk), 422, "file")
    problem(send(b"neuron_idx,concept_name,score\n"), 422, "Say one of dictionary_id and sae_id")
    problem(send(b"neuron_idx,concept_name,score\n", sae_id=999), 404)
    problem(api("researcher", "post", "/concepts/load", data={"sae_id": rows.sae.pk}), 422, "file")
    assert not ConceptImport.objects.exists()


def test_a_refused_file_leaves_no_dictionary_of_its_name(rows: Rows, api: Any) -> None:
    def send(content: bytes, **more: Any) -> Any:
        data = {"file": SimpleUploadedFile("c.csv", content)} | more
        return api("researcher", "post", "/concepts/load", data=data)

    whole, wrong = b"neuron_idx,concept_name,score\n4,dogs,1\n", b"name,score\n"
    problem(send(wrong, sae_id=rows.sae.pk, dictionary="animals"), 422, "file")
    assert not ConceptDictionary.objects.exists()
    made = good(send(whole, sae_id=rows.sae.pk, dictionary="animals", apply=True))
    problem(send(wrong, dictionary_id=made["dictionary_id"], dictionary="animals"), 422, "file")
    assert ConceptDictionary.objects.get().concepts.get().name == "dogs", "one that was there before stays"


def test_a_dictionary_made_by_hand(rows: Rows, api: Any) -> None:
    made = good(api("researcher", "post", "/concepts/dictionaries", {"sae_id": rows.sae.pk, "name": "cities"}), 201)
    problem(api("researcher", "post", "/concepts/dictionaries", {"sae_id": rows.sae.pk, "name": "cities"}), 422, "name")
    address = f"/concepts/dictionaries/{made['id']}"
    members = [{"feature": 3}, {"feature": 5, "weight": 0.5, "sign": -1, "score": 0.25}]
    concept = good(api("researcher", "post", f"{address}/concepts", {"name": "capitals", "members": members}), 201)
    assert concept["members"] == [
        {"feature": 3, "weight": 1.0, "sign": 1, "score": None}, {"feature": 5, "weight": 0.5, "sign": -1, "score": 0.25}
    ]  # fmt: skip
    bad = [{"name": "x", "members": [{"feature": 96}]}, {"name": "x", "members": [{"feature": 1}, {"feature": 1}]}]
    for given in [*bad, {"name": "capitals", "members": []}, {"name": "y", "members": [{"feature": 1, "sign": 0}]}]:
        problem(api("researcher", "post", f"{address}/concepts", given), 422)
    problem(api("annotator", "post", f"{address}/concepts", {"name": "z", "members": []}), 403)
    assert good(api("viewer", "get", f"{address}/concepts"))["items"] == [concept]
    assert good(api("viewer", "get", address))["n_concepts"] == 1
    assert good(api("viewer", "get", f"/concepts/dictionaries?sae_id={rows.sae.pk}"))["count"] == 1
    problem(api("viewer", "delete", address), 403)
    assert api("researcher", "delete", address).status_code == 204 and not ConceptDictionary.objects.exists()


# ------------------------------------------------------------------------------------------------------------- configs


def test_a_config_is_previewed_and_kept(rows: Rows, api: Any, view: Any) -> None:
    columns = view.opened()
    best = int(columns.sorted("max", True)[0])
    edits = [{"feature": best, "mode": "add", "value": 2.0}, {"feature": 3, "mode": "scale", "value": 1.0}]
    given = {"sae_id": rows.sae.pk, "edits": edits}
    seen = good(api("viewer", "post", "/concepts/preview", given, scope="read"))
    assert seen["compiled"] == [edits[0]] and not seen["neutral"], "a scale by 1 changes nothing"
    move = seen["moved"][0]
    assert move["feature"] == best and move["at_maximum"] == pytest.approx(columns.feature(best).maximum + 2)
    assert (seen["weights"], seen["bias"]) == ({}, {str(best): 2.0}) and not ConceptConfig.objects.exists()
    problem(api("viewer", "post", "/concepts/manipulate", given | {"name": "more"}), 403)
    problem(api("researcher", "post", "/concepts/manipulate", given), 422, "name")
    kept = good(api("researcher", "post", "/concepts/manipulate", given | {"name": "more"}, key="k"), 201)
    assert good(api("researcher", "post", "/concepts/manipulate", given | {"name": "more"}, key="k"), 201) == kept
    next_one = good(api("researcher", "post", "/concepts/manipulate", given | {"name": "more"}), 201)
    assert (kept["version"], next_one["version"]) == (1, 2) and kept["edits"] == edits
    problem(api("stranger", "post", "/concepts/preview", given), 403)
    listed = good(api("viewer", "get", f"/concepts/configs?sae_id={rows.sae.pk}"))
    assert [one["id"] for one in listed["items"]] == [next_one["id"], kept["id"]]
    assert good(api("viewer", "get", f"/concepts/configs/{kept['id']}")) == kept
    assert good(api("viewer", "get", f"/concepts/configs/{kept['id']}/export"))["edits"] == edits
    peer = good(api("viewer", "get", f"/concepts/configs/{kept['id']}/export?format=mi_crow"))
    assert peer == {"weights": {}, "bias": {str(best): 2.0}}
    capped = {"sae_id": rows.sae.pk, "edits": [{"feature": 1, "mode": "cap", "value": 1}], "name": "cap"}
    cap = good(api("researcher", "post", "/concepts/manipulate", capped), 201)
    problem(api("viewer", "get", f"/concepts/configs/{cap['id']}/export?format=mi_crow"), 409, "cannot cap")


def test_what_mi_crow_means_by_an_empty_bias_is_asked(rows: Rows, api: Any) -> None:
    given = {"sae_id": rows.sae.pk, "weights": {"3": 2.0}, "bias": {}}
    found = problem(api("viewer", "post", "/concepts/preview", given), 422, "adds 1 to every feature")
    assert list(found["errors"]) == ["bias_of_ones"]
    without = good(api("viewer", "post", "/concepts/preview", given | {"bias_of_ones": False}))
    assert without["compiled"] == [{"feature": 3, "mode": "scale", "value": 2.0}]
    neutral = good(api("viewer", "post", "/concepts/preview", given | {"weights": {"3": 1.0}}))
    assert neutral["neutral"] and neutral["moved"] == []
    server = {"sae_id": rows.sae.pk, "edits": {"5": 0.0}, "bias": {"5": 4.0}}
    clamp = good(api("viewer", "post", "/concepts/preview", server))
    assert clamp["compiled"] == [{"feature": 5, "mode": "clamp", "value": 4.0}]


@pytest.mark.parametrize(
    "changes",
    [
        {"edits": [{"feature": 96, "mode": "add", "value": 1}]},
        {"edits": [{"feature": 1, "mode": "boost", "value": 1}]},
        {"edits": [{"feature": 1, "mode": "add"}]},
        {"edits": [{"concept": "nothing", "mode": "add", "value": 1}]},
        {"edits": [{"feature": 1, "mode": "add", "value": 1}, {"feature": 1, "mode": "clamp", "value": 1}]},
        {"edits": [{"feature": 1, "mode": "add", "value": 1}], "weights": {"1": 2}},
        {"weights": {"-1": 2.0}, "bias_of_ones": False},
        {"weights": {"one": 2.0}, "bias_of_ones": False},
        {},
    ],
)
def test_configs_that_cannot_be_are_one_sentence(changes: Any, rows: Rows, api: Any) -> None:
    problem(api("researcher", "post", "/concepts/manipulate", {"sae_id": rows.sae.pk, "name": "x"} | changes), 422)
    assert not ConceptConfig.objects.exists()
