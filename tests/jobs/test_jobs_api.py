"""Jobs by /api/v1: how they stand, what they said, and their end."""

from __future__ import annotations

from typing import Any

import pytest

from saehub.jobs.models import Job, State, enqueue
from tests.api_calls import good, problem

pytestmark = pytest.mark.django_db


def a_job(owner: Any, **fields: Any) -> Job:
    job = enqueue("probe", owner, title="count", steps=3)
    Job.objects.filter(pk=job.pk).update(**fields)
    return job


def test_a_job_says_how_it_stands(api: Any, user_of: Any, run_job: Any) -> None:
    job = run_job(enqueue("probe", user_of("annotator"), title="count", steps=3))
    found = good(api("viewer", "get", f"/jobs/{job.pk}", scope="read"))
    assert (found["id"], found["job_id"], found["state"], found["status"]) == (job.pk, job.pk, "done", "done")
    assert found["progress"] == 1.0 and found["owner"] == "a-annotator" and found["params"] == {"steps": 3}
    assert found["result"] == job.result and found["queue_position"] is None
    lines = good(api("viewer", "get", f"/jobs/{job.pk}/lines"))
    assert [line["text"] for line in lines["items"]] == [line.text for line in job.lines.all()] == found["logs"]


def test_the_sae_of_a_job_has_its_addresses(api: Any, user_of: Any) -> None:
    job = a_job(user_of("annotator"), params={"sae": 5})
    made = a_job(user_of("annotator"), result={"sae_id": 6, "sae_path": "/x"}, state=State.DONE)
    for pk, sae in ((job.pk, 5), (made.pk, 6)):
        found = good(api("viewer", "get", f"/jobs/{pk}"))
        assert (found["sae_id"], found["sae_path"]) == (sae, f"/api/v1/saes/{sae}")
        assert found["metadata_path"] == f"/api/v1/saes/{sae}/metadata"
    assert [one["id"] for one in good(api("viewer", "get", "/jobs?sae_id=5"))["items"]] == [job.pk]


def test_the_list_is_narrowed(api: Any, user_of: Any) -> None:
    a_job(user_of("annotator"), state=State.FAILED, error="No.")
    mine = a_job(user_of("researcher"))
    assert good(api("viewer", "get", "/jobs"))["count"] == 2
    assert good(api("viewer", "get", "/jobs?state=failed"))["items"][0]["error"] == "No."
    assert good(api("viewer", "get", "/jobs?kind=train"))["count"] == 0
    assert [one["id"] for one in good(api("researcher", "get", "/jobs?mine=true"))["items"]] == [mine.pk]
    problem(api("viewer", "get", "/jobs?state=asleep"), 422, "state")


def test_the_list_asks_as_often_for_three_jobs_as_for_one(
    api: Any, user_of: Any, django_assert_num_queries: Any
) -> None:
    a_job(user_of("annotator"))
    api("viewer", "get", "/jobs")
    for more in (0, 2):
        for _ in range(more):
            a_job(user_of("annotator"))
        with django_assert_num_queries(7):  # new token, token, its use, two of permissions, count, rows
            found = good(api("viewer", "get", "/jobs"))
    assert found["count"] == 3 and [one["queue_position"] for one in found["items"]] == [3, 2, 1]
    first = found["items"][-1]["id"]
    assert good(api("viewer", "get", f"/jobs/{first}"))["queue_position"] == 1


def test_who_may_end_a_job_and_try_it_again(api: Any, user_of: Any) -> None:
    job = a_job(user_of("annotator"))
    problem(api("stranger", "get", "/jobs"), 403)
    problem(api("viewer", "post", f"/jobs/{job.pk}/cancel"), 403)
    problem(api("annotator", "post", f"/jobs/{job.pk}/cancel", scope="read"), 403)
    problem(api("researcher", "post", f"/jobs/{job.pk}/cancel"), 403, "somebody else")
    assert good(api("annotator", "post", f"/jobs/{job.pk}/cancel"))["state"] == "cancelled"
    problem(api("annotator", "post", f"/jobs/{job.pk}/retry"), 403, "jobs.add_job")
    assert good(api("curator", "post", f"/jobs/{job.pk}/retry", key="k"))["state"] == "queued"
    assert good(api("curator", "post", f"/jobs/{job.pk}/retry", key="k"))["state"] == "queued", "sent twice, done once"
    problem(api("curator", "post", f"/jobs/{job.pk}/retry"), 409, "this one is queued")
    problem(api("curator", "post", "/jobs/99999/retry"), 404)
