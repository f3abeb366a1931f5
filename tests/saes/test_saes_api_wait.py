"""`?wait=` of what brings SAEs, on a database that request and worker both see."""

from __future__ import annotations

import threading
import time
from typing import Any

from django.db import connection

from saehub.jobs.models import Job, State
from saehub.jobs.runner import execute
from tests.api_calls import ask, good, problem
from tests.conftest import make_user
from tests.sae_rows import write_sae


def work_off(n: int) -> threading.Thread:
    """A thread that does the next n jobs as a worker would."""

    def work() -> None:
        for _ in range(n):
            while (job := Job.objects.filter(state=State.QUEUED).first()) is None:
                time.sleep(0.02)
            execute(Job.objects.claim(job.pk, "test"))
        connection.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_an_import_is_waited_for_and_a_refused_one_says_so(committed: None, settings: Any) -> None:
    user, places = make_user("ada", "researcher"), settings.IMPORT_DIRS[0]
    write_sae(places / "good")
    write_sae(places / "other", seed=2)
    (write_sae(places / "bad") / "sae_weights.safetensors").write_bytes(b"no weights")
    body = good(ask(user, "post", "/saes/import?wait=0", data={"path": str(places / "good")}), 202)
    assert body["job_ids"] == [body["job"]["id"]] and body["saes"][0]["state"] == "queued"
    thread = work_off(3)
    again = {"path": str(places / "other")}
    body = good(ask(user, "post", "/saes/import?wait=100", data=again, key="one"))
    assert (body["job"]["state"], body["job_ids"], body["saes"][0]["state"]) == ("done", [], "ready")
    body = good(ask(user, "post", "/saes/import?wait=100", data={"path": str(places / "bad")}))
    assert (body["job"]["state"], body["saes"][0]["state"]) == ("failed", None)
    thread.join()
    assert "sae_weights.safetensors" in body["job"]["error"]
    assert good(ask(user, "post", "/saes/import?wait=100", data=again, key="one"))["saes"][0]["state"] == "ready"
    problem(ask(user, "post", "/saes/import?wait=x", data=again), 422, "wait")
