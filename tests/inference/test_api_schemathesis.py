"""Requests made up from the API's own description: none may end in a server error, and answers are as described.

They go by WSGI through the whole of Django, on a real database with rows of each kind, as a user who may do everything. Each
operation is asked with its documented example, with made-up parts beside ids that exist, and with parts all made up.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import schemathesis
from django.core.handlers.wsgi import WSGIHandler
from django.core.signals import request_finished, request_started
from django.db import close_old_connections, transaction
from django.utils import timezone
from hypothesis import HealthCheck, Phase, given, seed
from hypothesis import settings as bounds
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from concepts.models import ConceptConfig, ConceptDictionary, Label
from inference.models import Generation, Inference, PromptBatch, Sweep
from saehub.accounts.models import APIToken
from saehub.jobs.models import enqueue
from tests.conftest import make_user
from tests.steering_rows import Rows
from training.models import Evaluation, Run
from training.models import Sweep as TrainingSweep

EXAMPLES = 2  # made up of each operation, once with ids that exist and once without
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
FILES = (
    "/export",
    "/top-texts",
    "/saebench",
    "/file",
)  # of several formats: csv and lines are not the JSON of the description


@pytest.fixture
def ids(rows: Rows, view: Any) -> dict[str, int]:
    """Rows of each kind, by what parameters and fields call them, and by the first part of a path."""
    dictionary = ConceptDictionary.objects.create(sae=rows.sae, name="d", owner=rows.owner)
    dictionary.change({"c": {"description": "", "members": [[3, 1.0, 1, None]]}}, rows.owner, "New")
    config = ConceptConfig.next_version(rows.sae, "c", [{"feature": 3, "mode": "add", "value": 1.0}], rows.owner)
    label = Label.objects.name_feature(rows.sae, 3, "cats", rows.owner)
    generation = Generation.objects.create(model=rows.model, sae=rows.sae, prompt="a", name="a", owner=rows.owner)
    reading = Inference.objects.create(model=rows.model, prompt="a", name="a", owner=rows.owner)
    job = enqueue("probe", rows.owner, title="count", steps=1)
    sweep = Sweep.objects.create(generation=generation, name="s", factors=[0.0, 1.0], owner=rows.owner)
    batch = PromptBatch.objects.create(model=rows.model, corpus=rows.corpus, name="b", owner=rows.owner)
    evaluation = Evaluation.objects.create(sae=rows.sae, capture=rows.capture, name="e", owner=rows.owner)
    runs = TrainingSweep.objects.create(capture=rows.capture, name="t", owner=rows.owner)
    named = {
        "sae_id": rows.sae.pk, "model_id": rows.model.pk, "corpus_id": rows.corpus.pk, "activations_id": rows.capture.pk,
        "concept_config_id": config.pk, "dictionary_id": dictionary.pk, "view": view.pk, "feature": 3, "index": 3,
    }  # fmt: skip
    places = {
        "saes": rows.sae.pk, "models": rows.model.pk, "corpora": rows.corpus.pk, "activations": rows.capture.pk,
        "train": Run.objects.filter(capture=rows.capture).order_by("pk")[0].pk, "dictionaries": dictionary.pk,
        "configs": config.pk, "labels": label.pk, "labels/changes": label.sae.label_changes.get().pk,
        "generate": generation.pk, "infer": reading.pk, "jobs": job.pk, "sweeps": sweep.pk, "batches": batch.pk,
        "evaluations": evaluation.pk, "train/sweeps": runs.pk, "concepts/concepts": dictionary.concepts.get().pk,
    }  # fmt: skip
    return named | places


@pytest.fixture
def wsgi() -> Iterator[WSGIHandler]:
    """The site as a server calls it, but for the connection of the test, which stays open between requests."""
    signals = (request_started, request_finished)
    for signal in signals:
        signal.disconnect(close_old_connections)
    yield WSGIHandler()
    for signal in signals:
        signal.connect(close_old_connections)


@pytest.fixture
def token() -> str:
    return APIToken.make(make_user("root", "admin"), "t", "write", timezone.now() + timedelta(days=1))[1]


class Clock:
    """Time as requests with `?wait=` see it: nobody works on jobs here, so that each would wait for as long as it says."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.django_db
def test_no_request_ends_in_a_server_error(
    ids: dict[str, int], token: str, wsgi: WSGIHandler, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.ALLOWED_HOSTS = ["*"]
    monkeypatch.setattr("saehub.jobs.starting.time", Clock())
    schema = schemathesis.openapi.from_wsgi("/api/v1/openapi.json", wsgi)
    asked, faults = 0, []

    def ask(case: Any) -> None:
        nonlocal asked
        asked += 1
        with transaction.atomic():  # what one request deletes is there for the next
            response = case.call(headers={"Authorization": f"Bearer {token}"})
            transaction.set_rollback(True)
        checks = [not_a_server_error] if any(part in case.path for part in FILES) else CHECKS
        case.validate_response(response, checks=checks)

    for found in schema.get_all_operations():
        operation = found.ok()

        @seed(0)
        @bounds(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def asks(case: Any) -> None:
            ask(known(again(case.operation, case), ids))
            ask(case)

        try:
            for example in documented(operation):
                ask(known(example, ids))
            asks()
        except Exception as fault:
            faults.append(f"{operation.label}: {fault}")
    assert not faults, f"{len(faults)} of the operations:\n\n" + "\n\n".join(faults)
    assert asked > 100 * EXAMPLES


def again(operation: Any, case: Any) -> Any:
    """The same request, to be changed."""
    names = ("path_parameters", "query", "headers", "cookies") + (("body", "media_type") if case.media_type else ())
    return operation.Case(**{name: copy.deepcopy(getattr(case, name)) for name in names})


def documented(operation: Any) -> list[Any]:
    """The request of the operation's example body; none for those without one in JSON."""
    content = operation.definition.raw.get("requestBody", {}).get("content", {}).get("application/json")
    if not content:
        return []
    path = {one["name"]: 1 for one in operation.definition.raw["parameters"] if one["in"] == "path"}
    return [operation.Case(path_parameters=path, body=copy.deepcopy(content["example"]), media_type="application/json")]


def known(case: Any, ids: dict[str, int]) -> Any:
    """The same request with the ids of rows that exist, wherever it names some."""
    whole = case.path.removeprefix("/api/v1/").split("/{")[0]
    place = whole if whole in ids else next((part for part in reversed(whole.split("/")) if part in ids), "")
    for name in case.path_parameters or {}:
        case.path_parameters[name] = ids.get(name, ids.get(place, 1))
    for part in (case.query, case.body):
        _replace(part, ids)
    return case


def _replace(part: Any, ids: dict[str, int]) -> None:
    if isinstance(part, list):
        for one in part:
            _replace(one, ids)
    if isinstance(part, dict):
        for name, value in part.items():
            if name == "sae_ids":
                part[name] = [ids["sae_id"]]
            elif name in ids and isinstance(value, int | str):
                part[name] = ids[name]
            else:
                _replace(value, ids)
