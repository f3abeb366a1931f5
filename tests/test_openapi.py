"""The description of the API: every operation has an example, says how it refuses, and takes a key where it makes something."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.django_db
WITHOUT_KEY = {  # they make nothing that a second request would make again
    "saehub_jobs_api_job_cancel", "training_api_train_train_cancel", "training_api_train_train_stop",
    "training_api_train_train_pause", "training_api_sweeps_sweep_stop", "training_api_sweeps_sweep_pause",
    "concepts_api_configs_concepts_preview", "concepts_api_labels_label_accept", "saes_api_cache_cache_prune",
    "saes_api_marks_sae_tag",
}  # fmt: skip


@pytest.fixture
def operations(client_of: Any) -> dict[str, tuple[str, str, dict[str, Any]]]:
    schema = client_of("viewer").get("/api/v1/openapi.json").json()
    return {
        found["operationId"]: (path, method, found)
        for path, methods in schema["paths"].items()
        for method, found in methods.items()
    }


def test_every_operation_has_examples_a_summary_and_refusals(operations: Any) -> None:
    assert len(operations) > 60
    for name, (path, method, found) in operations.items():
        assert found["summary"] and found["security"], name
        for sent in found.get("requestBody", {}).get("content", {}).values():
            assert "example" in sent, f"the body of {name}"
        for status, answer in found["responses"].items():
            for sent in answer.get("content", {}).values():
                assert "example" in sent, f"{status} of {name}"
        assert {"401", "403", "422"} <= set(found["responses"]), name
        assert "404" in found["responses"] or ("{" not in path and method == "get"), name


def test_what_makes_something_takes_a_key(operations: Any) -> None:
    assert set(operations) >= WITHOUT_KEY
    for name, (_, method, found) in operations.items():
        keyed = any(one["name"] == "Idempotency-Key" for one in found["parameters"])
        assert keyed == (method == "post" and name not in WITHOUT_KEY), name


def test_lists_have_one_form(operations: Any) -> None:
    for name, (_, method, found) in operations.items():
        names = {one["name"] for one in found["parameters"]}
        assert ("limit" in names) == ("offset" in names), name
        if "limit" in names and method == "get":
            example = found["responses"]["200"]["content"]["application/json"]["example"]
            assert {"count", "limit", "offset", "items"} <= set(example) and example["items"], name
