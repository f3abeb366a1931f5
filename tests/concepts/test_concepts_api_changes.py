"""Dictionaries changed, looked back at and reverted, and features as files, by /api/v1."""

from __future__ import annotations

import json
from typing import Any

import pytest

from concepts.models import ConceptDictionary
from tests.api_calls import good, problem
from tests.steering_rows import Rows

pytestmark = pytest.mark.django_db


def test_concepts_are_changed_taken_out_and_brought_back(rows: Rows, api: Any) -> None:
    made = good(api("researcher", "post", "/concepts/dictionaries", {"sae_id": rows.sae.pk, "name": "cities"}), 201)
    address = f"/concepts/dictionaries/{made['id']}"
    concept = good(
        api("researcher", "post", f"{address}/concepts", {"name": "capitals", "members": [{"feature": 3}]}), 201
    )
    one = f"/concepts/concepts/{concept['id']}"
    problem(api("annotator", "patch", one, {"name": "towns"}), 403)
    changed = good(api("researcher", "patch", one, {"name": "towns", "members": [{"feature": 4, "sign": -1}]}))
    assert changed["id"] == concept["id"] and changed["name"] == "towns"
    assert changed["members"] == [{"feature": 4, "weight": 1.0, "sign": -1, "score": None}]
    kept = good(api("researcher", "patch", one, {"description": "of people"}))
    assert kept["members"] == changed["members"] and kept["name"] == "towns"
    problem(api("researcher", "patch", one, {"members": [{"feature": 96}]}), 422, "members")
    problem(api("viewer", "delete", one), 403)
    assert api("researcher", "delete", one).status_code == 204
    problem(api("viewer", "get", one), 404)
    history = good(api("viewer", "get", f"{address}/history", scope="read"))
    assert [row["number"] for row in history["items"]] == [4, 3, 2, 1] and history["items"][0]["removed"] == 1
    last = good(api("viewer", "get", f"{address}/history/4"))
    assert last["changes"]["towns"][1] is None
    problem(api("viewer", "post", f"{address}/revert", {"revision": 1}), 403)
    problem(api("researcher", "post", f"{address}/revert", {"revision": 9}), 404, "no revision 9")
    assert good(api("researcher", "post", f"{address}/revert", {"revision": 1}))["n_concepts"] == 1
    back = good(api("viewer", "get", f"{address}/concepts"))["items"]
    assert [row["name"] for row in back] == ["capitals"] and back[0]["members"][0]["feature"] == 3
    renamed = good(api("researcher", "patch", address, {"notes": "read twice"}))
    assert renamed["name"] == "cities" and ConceptDictionary.objects.get().notes == "read twice"
    problem(api("researcher", "patch", address, {"name": " "}), 422, "name")


def test_features_are_exported(rows: Rows, api: Any, view: Any) -> None:
    address = f"/saes/{rows.sae.pk}/features/export"
    columns = view.opened()
    first, second = sorted(columns.sorted("max", True)[:2].tolist())
    answer = api("viewer", "get", f"{address}?format=mi_crow&feature={first}&feature={second}", scope="read")
    found = json.loads(b"".join(answer.streaming_content))
    assert list(found) == [str(first), str(second)]
    for feature in (first, second):
        assert found[str(feature)][0]["score"] == pytest.approx(columns.feature(feature).maximum)
    problem(api("viewer", "get", f"{address}?format=docx"), 422, "format")
    problem(api("viewer", "get", f"{address}?feature=96"), 422, "There is no feature 96")


def test_labels_are_described_and_their_changes_undone(rows: Rows, api: Any) -> None:
    feature = f"/saes/{rows.sae.pk}/features/3"
    label = good(api("annotator", "post", f"{feature}/labels", {"text": "cats", "confidence": 0.5}), 201)
    one = f"/labels/{label['id']}"
    assert label["confidence"] == 0.5 and label["notes"] == ""
    assert good(api("annotator", "patch", one, {"notes": "seldom"}))["confidence"] == 0.5, "what is left out stays"
    told = good(api("annotator", "patch", one, {"confidence": None}))
    assert told["confidence"] is None and told["notes"] == "seldom"
    problem(api("researcher", "patch", one, {"notes": "mine"}), 403)
    problem(api("annotator", "patch", one, {"confidence": 2}), 422)
    history = good(api("viewer", "get", f"{feature}/labels/history", scope="read"))
    assert [row["what"] for row in history["items"]] == ["Described cats", "Described cats", "Named cats"]
    named = history["items"][2]
    assert named["before"] == [] and named["after"][0]["text"] == "cats" and named["owner"]
    problem(api("researcher", "post", f"/labels/changes/{named['id']}/undo"), 403)
    assert good(api("annotator", "post", f"/labels/changes/{named['id']}/undo")) == []
    problem(api("annotator", "post", "/labels/changes/999/undo"), 404)
    problem(api("viewer", "get", f"/saes/{rows.sae.pk}/features/96/labels/history"), 404)


def test_a_feature_goes_into_a_concept_by_its_name(rows: Rows, api: Any) -> None:
    address = f"/saes/{rows.sae.pk}/features/3/concepts"
    problem(api("researcher", "post", address, {"concept": "cats"}), 422, "no dictionary")
    made = good(api("researcher", "post", "/concepts/dictionaries", {"sae_id": rows.sae.pk, "name": "animals"}), 201)
    found = good(api("researcher", "post", address, {"concept": "animals/cats"}))
    assert (found["name"], found["dictionary_id"]) == ("cats", made["id"])
    assert [one["feature"] for one in good(api("researcher", "post", address, {"concept": "cats"}))["members"]] == [3]
    problem(api("annotator", "post", address, {"concept": "cats"}), 403)
    assert ConceptDictionary.objects.get().revisions.count() == 1
