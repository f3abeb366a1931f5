"""Every error under /api/v1 is application/problem+json with a sentence, whoever finds it."""

from __future__ import annotations

from typing import Any

import pytest
from django.test import Client

from tests.api_calls import problem

pytestmark = pytest.mark.django_db


def test_an_unknown_address_and_a_wrong_method(api: Any) -> None:
    problem(api("viewer", "get", "/nothing"), 404, "no operation")
    answer = api("viewer", "put", "/jobs")
    problem(answer, 405)
    assert "GET" in answer["Allow"]
    problem(api("viewer", "get", "/jobs/99999999999999999999"), 404)
    problem(Client().get("/api/v1/jobs"), 401)
    assert Client().get("/nothing")["Content-Type"].startswith("text/html"), "pages keep their own"


def test_bodies_that_are_not_json(api: Any) -> None:
    call = {"content_type": "application/json"}
    problem(api("researcher", "post", "/corpora", data="{", **call), 400, "not JSON")
    problem(api("researcher", "post", "/corpora", data='{"text": NaN}', **call), 400, "NaN")
    problem(api("researcher", "post", "/corpora", data="[" * 100_000, **call), 400)
    problem(api("researcher", "post", "/corpora", data='{"text": "a\\u0000b"}', **call), 422, "zero character")
    problem(api("researcher", "post", "/corpora", data='{"text": "a\\ud800"}', **call), 422, "surrogate")
    problem(api("researcher", "post", "/corpora", data="text=a", content_type="text/plain"), 415, "text/plain")
    found = problem(api("researcher", "post", "/corpora", {"text": "a", "strange": 1}), 422)
    assert list(found["errors"]) == ["given.strange"]


def test_a_body_that_is_too_large(api: Any, settings: Any) -> None:
    settings.DATA_UPLOAD_MAX_MEMORY_SIZE = 2**20
    problem(api("researcher", "post", "/corpora", {"text": "a" * 2**21}), 413, "as files")


def test_zero_bytes_in_an_address(api: Any) -> None:
    problem(api("viewer", "get", "/corpora?q=a%00b"), 400, "zero bytes")


def test_lists_are_alike_and_their_limits_are_checked(api: Any) -> None:
    for path in ("/jobs", "/saes", "/models", "/corpora", "/activations", "/train", "/saes/classes"):
        found = api("viewer", "get", f"{path}?limit=3&offset=1").json()
        assert (found["limit"], found["offset"]) == (3, 1) and isinstance(found["items"], list), path
        problem(api("viewer", "get", f"{path}?limit=201"), 422, "limit")
        problem(api("viewer", "get", f"{path}?offset=-1"), 422, "offset")
