"""A request sent twice with one Idempotency-Key is done once, whichever of the two the database sees first."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from django.utils import timezone

from saehub.accounts.models import KeptAnswer
from saehub.jobs.models import Job, enqueue
from tests.api_calls import ask, good, problem
from tests.conftest import make_user
from training.models import Corpus

BODY = {"name": "sentences", "text": "One.\n\n\nTwo."}


@pytest.mark.django_db
def test_the_same_request_again_gets_the_same_answer(api: Any) -> None:
    first = api("researcher", "post", "/corpora", BODY, key="a")
    again = api("researcher", "post", "/corpora", {"text": BODY["text"], "name": "sentences"}, key="a")
    assert good(first, 202) == good(again, 202) and Corpus.objects.count() == Job.objects.count() == 1
    assert "Idempotency-Replayed" not in first and again["Idempotency-Replayed"] == "true"
    assert good(api("researcher", "post", "/corpora", BODY | {"name": "b"}, key="b"), 202)["id"] != first.json()["id"]


@pytest.mark.django_db
def test_a_key_is_for_one_request_of_one_user(api: Any) -> None:
    first = good(api("researcher", "post", "/corpora", BODY, key="a"), 202)
    problem(api("researcher", "post", "/corpora", BODY | {"text": "Three."}, key="a"), 422, "used for another request")
    problem(api("researcher", "post", "/models", {"location": "a/b"}, key="a"), 422, "used for another request")
    other = good(api("curator", "post", "/corpora", BODY | {"name": "mine"}, key="a"), 202)
    assert other["id"] != first["id"]


@pytest.mark.django_db
def test_a_refused_request_keeps_no_key(api: Any) -> None:
    problem(api("researcher", "post", "/corpora", {"text": " "}, key="a"), 422)
    assert not KeptAnswer.objects.exists()
    assert good(api("researcher", "post", "/corpora", BODY, key="a"), 202)["id"]


@pytest.mark.django_db
@pytest.mark.parametrize("body", [b"", b"wait=1", b"\xff{", b"[" * 100_000])
def test_a_body_that_nobody_reads_may_be_anything(api: Any, run_job: Any, body: bytes) -> None:
    job = enqueue("probe", None, title="Count", steps=1, fail=True)
    run_job(job)
    form = {"data": body, "content_type": "application/x-www-form-urlencoded"}
    first = good(api("curator", "post", f"/jobs/{job.pk}/retry", key="a", **form))
    assert (
        first["state"] == "queued" and good(api("curator", "post", f"/jobs/{job.pk}/retry", key="a", **form)) == first
    )


@pytest.mark.django_db
def test_a_key_expires(api: Any) -> None:
    first = good(api("researcher", "post", "/corpora", BODY, key="a"), 202)
    KeptAnswer.objects.update(expires_at=timezone.now() - timedelta(seconds=1))
    second = good(api("researcher", "post", "/corpora", BODY | {"name": "later"}, key="a"), 202)
    assert first["id"] != second["id"] and KeptAnswer.objects.count() == 1


@pytest.mark.django_db
def test_files_are_part_of_what_was_sent(api: Any, settings: Any, tmp_path: Any) -> None:
    settings.DATA_DIR = tmp_path

    def send(text: bytes) -> Any:
        data = {"file": SimpleUploadedFile("texts.txt", text), "name": "texts"}
        return api("researcher", "post", "/corpora/upload", data=data, key="f")

    first = good(send(b"some text"), 202)
    assert good(send(b"some text"), 202) == first
    problem(send(b"other text"), 422, "used for another request")
    assert Corpus.objects.get().file.read_bytes() == b"some text"


@pytest.mark.django_db
@pytest.mark.parametrize("key", ["x" * 201, "ü"])
def test_a_key_that_cannot_be_one_is_refused(key: str, api: Any) -> None:
    problem(api("researcher", "post", "/corpora", BODY, key=key), 422, "printable ASCII")


def test_two_at_once_start_one_job(committed: None) -> None:
    """Both wait at the same line and are let go together; one of them does the work, the other gets its answer."""
    user = make_user("ada", "researcher")
    gate, answers = threading.Barrier(2), []

    def send() -> None:
        from django.db import connection

        gate.wait()
        try:
            answers.append(ask(user, "post", "/corpora", BODY, key="same"))
        finally:
            connection.close()

    threads = [threading.Thread(target=send) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [202, 202], [answer.content for answer in answers]
    assert answers[0].json() == answers[1].json()
    assert Corpus.objects.count() == Job.objects.count() == KeptAnswer.objects.count() == 1
    assert sorted("Idempotency-Replayed" in answer for answer in answers) == [False, True]
