"""The frame around every page: the count of running jobs, and the icon browsers ask for."""

from __future__ import annotations

from typing import Any

import pytest

from saehub.jobs.models import enqueue

pytestmark = pytest.mark.django_db


def test_the_count_of_jobs_is_in_good_english(client_of: Any) -> None:
    client = client_of("viewer")
    found = []
    for _ in range(3):
        found.append(client.get("/jobs/running/").content.decode().split(">")[1].split("<")[0])
        enqueue("probe", None, title="count", steps=1, seconds=0.0)
    assert found == ["no jobs", "1 job", "2 jobs"]


def test_pages_without_an_icon_of_their_own_have_one(client: Any) -> None:
    answer = client.get("/favicon.ico")
    assert answer.status_code == 302 and answer["Location"].endswith(".svg")
