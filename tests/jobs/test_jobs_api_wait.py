"""`?wait=`: a request that waits for the end of a job, on a database that both see."""

from __future__ import annotations

import threading
import time

from django.db import connection

from saehub.jobs.models import Job, State, enqueue
from saehub.jobs.starting import over
from tests.api_calls import ask, good, problem
from tests.conftest import make_user


def test_a_request_can_wait_for_the_end(committed: None) -> None:
    user = make_user("ada", "researcher")
    job = enqueue("probe", user, title="count", steps=3)

    def end() -> None:
        time.sleep(0.3)
        Job.objects.filter(pk=job.pk).update(state=State.DONE)
        connection.close()

    thread = threading.Thread(target=end)
    thread.start()
    assert good(ask(user, "get", f"/jobs/{job.pk}?wait=250"))["state"] == "done"
    thread.join()
    other = enqueue("probe", user, title="count", steps=3)
    assert good(ask(user, "get", f"/jobs/{other.pk}?wait=0.2"))["state"] == "queued"
    problem(ask(user, "get", f"/jobs/{other.pk}?wait=301"), 422, "wait")
    problem(ask(user, "post", "/corpora?wait=nan", {"text": "a"}), 422, "wait")


def test_who_waits_holds_no_connection(committed: None) -> None:
    """Its connection is seen come, and seen go while it still waits."""
    job = enqueue("probe", make_user("ada", "researcher"), title="count", steps=3)
    found: list[bool] = []

    def wait() -> None:
        found.append(over([job.pk], 600))
        connection.close()

    def others() -> int:
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
                "AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
            )
            return int(cursor.fetchone()[0])

    def seen(count: int) -> bool:
        until = time.monotonic() + 200
        while others() != count:
            if time.monotonic() > until:
                return False
        return True

    before = others()
    thread = threading.Thread(target=wait)
    thread.start()
    came_and_went = seen(before + 1) and seen(before)
    Job.objects.filter(pk=job.pk).update(state=State.DONE)
    thread.join()
    assert came_and_went and found == [True]
