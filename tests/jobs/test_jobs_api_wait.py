"""`?wait=`: a request that waits for the end of a job, on a database that both see."""

from __future__ import annotations

import threading
import time

from saehub.jobs.models import Job, State, enqueue
from tests.api_calls import ask, good, problem
from tests.conftest import make_user


def test_a_request_can_wait_for_the_end(committed: None) -> None:
    user = make_user("ada", "researcher")
    job = enqueue("probe", user, title="count", steps=3)

    def end() -> None:
        from django.db import connection

        time.sleep(0.3)
        Job.objects.filter(pk=job.pk).update(state=State.DONE)
        connection.close()

    thread = threading.Thread(target=end)
    thread.start()
    assert good(ask(user, "get", f"/jobs/{job.pk}?wait=20"))["state"] == "done"
    thread.join()
    other = enqueue("probe", user, title="count", steps=3)
    assert good(ask(user, "get", f"/jobs/{other.pk}?wait=0.2"))["state"] == "queued"
    problem(ask(user, "get", f"/jobs/{other.pk}?wait=301"), 422, "wait")
    problem(ask(user, "post", "/corpora?wait=nan", {"text": "a"}), 422, "wait")
