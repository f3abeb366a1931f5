"""Workers say that they are there and how their machines stand; the page, the API, probes and Prometheus tell it."""

from __future__ import annotations

import re
import socket
from datetime import timedelta
from typing import Any

import pytest
from django.db import OperationalError
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from saehub.jobs import workers
from saehub.jobs.models import Job, State, Worker, enqueue
from saehub.jobs.workers import beat, leave, machines, queues, troubles, usage
from tests.api_calls import good
from tests.conftest import manage, wait_for

GPU = {"name": 'A "10"', "total": 24_000, "free": 20_000, "busy": 0.5}
FAR = {
    "cores": 64, "cpu": 0.25, "memory": {"total": 4_000_000_000, "free": 1_000_000_000},
    "disk": {"total": 1000, "free": 10}, "gpus": [GPU, GPU | {"busy": None}],
}  # fmt: skip
PAGE = "/jobs/workers/"


def a_worker(host: str = "far", queue: str = "gpu", seconds: float = 0, **more: Any) -> Worker:
    """One that was heard of so many seconds ago."""
    seen = timezone.now() - timedelta(seconds=seconds)
    name = f"{host}:{Worker.objects.count()}:{queue}"
    values = {"name": name, "host": host, "queue": queue, "processes": 2, "started_at": seen, "machine": FAR}
    return Worker.objects.create(seen_at=seen, **values | more)


def text_of(answer: Any) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", answer.content.decode()).split())


@pytest.mark.usefixtures("committed")
def test_real_workers_are_heard_of_and_leave() -> None:
    assert not Worker.objects.exists()
    with manage("work", "io"), manage("work", "gpu"):
        wait_for(lambda: Worker.objects.count() == 2, 120, "both workers")
        io, gpu, live = queues()
        assert (len(io.workers), len(gpu.workers), len(live.workers)) == (1, 1, 0)
        (row,) = io.workers
        assert row.host == socket.gethostname() and row.name.endswith(":io") and row.machine["memory"]["total"] > 0
        first = row.seen_at
        wait_for(lambda: Worker.objects.filter(name=row.name, seen_at__gt=first), 120, "another word of it")
        assert troubles() == ["No worker serves the live queue."]
    assert not Worker.objects.exists(), "who ends in order is no longer told of"


@pytest.mark.django_db
def test_who_is_not_heard_of_counts_as_gone() -> None:
    here = socket.gethostname()
    a_worker(here, "io", seconds=25)
    a_worker("far", "io", seconds=25)
    a_worker("farther", "io", seconds=3700)
    assert not queues()[0].workers and machines()[0].silent
    beat(f"{here}:1:io", "io", timezone.now())
    assert sorted(Worker.objects.values_list("host", flat=True)) == sorted([here, "far"])
    assert [worker.host for worker in queues()[0].workers] == [here]
    assert [(one.host, one.silent) for one in machines()] == [(here, False), ("far", True)]
    leave(f"{here}:1:io")
    site, far = machines()
    assert (site.host, site.measures_cpu, far.silent) == (here, False, True), "the site's own machine is always told"


@pytest.mark.django_db
def test_the_page_tells_queues_machines_and_what_runs(
    client_of: Any, user_of: Any, django_assert_num_queries: Any
) -> None:
    assert Client().get(PAGE).status_code == 302 and client_of("stranger").get(PAGE).status_code == 403
    client = client_of("viewer")
    said = text_of(client.get(PAGE))
    assert said.count("no worker") == 3 and "manage.py work gpu starts one" in said and "Nothing runs." in said
    a_worker()
    job = enqueue("probe", user_of("annotator"), title="count", steps=3)
    waits = enqueue("probe", user_of("annotator"), title="count more", steps=3)
    Job.objects.filter(pk=waits.pk).update(offered_at=timezone.now() - timedelta(minutes=3))
    assert Job.objects.claim(job.pk, "far:1:io") is not None
    Job.objects.filter(pk=job.pk).update(memory=2_500_000_000)
    client.get(PAGE)
    for rows in (1, 3):
        with django_assert_num_queries(10):
            answer = client.get(PAGE)
        assert len(answer.context["machines"]) == rows + 1
        if rows == 1:
            a_worker("b", "io"), a_worker("c", "gpu")
    said = text_of(answer)
    assert "far gpu 64 cores, 25 % busy 1.00 GB free of 4.00 GB 10 B free of 1.00 kB nearly full" in said, said
    assert "20.0 kB free of 24.0 kB , 50 % busy" in said and "3 min ago" in said
    assert "count a-annotator far:1:io 2.50 GB" in said
    fragment = client.get(PAGE, headers={"HX-Request": "true"}).content.decode()
    assert fragment.lstrip().startswith('<div id="now"') and "<html" not in fragment


@pytest.mark.django_db
def test_probes_hear_what_is_missing(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask() -> tuple[int, str]:
        answer = Client().get("/readyz")
        assert answer["Content-Type"] == "text/plain"
        return answer.status_code, answer.content.decode()

    a_worker(queue="gpu"), a_worker(queue="live")
    a_worker(queue="io", seconds=25)
    assert ask() == (503, "No worker serves the io queue.\n")
    a_worker(queue="io")
    assert ask() == (200, "ready\n")
    settings.DISK_RESERVE = 10**18
    status, said = ask()
    assert status == 503 and said.startswith("The disk of the data folder has only ")

    def gone() -> None:
        raise OperationalError

    monkeypatch.setattr(workers.connection, "ensure_connection", gone)
    assert ask() == (503, "The database does not answer.\n")


@pytest.mark.django_db
def test_the_api_tells_the_same(api: Any) -> None:
    row = a_worker(seconds=100)
    (found,) = good(api("viewer", "get", "/workers", scope="read"))["items"]
    assert found["name"] == row.name and found["silent"] and found["machine"] == FAR
    assert api("stranger", "get", "/workers").status_code == api("stranger", "get", "/metrics").status_code == 403
    assert Client().get(reverse("api:metrics_text")).status_code == 401


@pytest.mark.django_db
def test_prometheus_reads_the_metrics(api: Any, user_of: Any) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    def read() -> dict[tuple[str, ...], float]:
        answer = api("viewer", "get", "/metrics", scope="read")
        assert answer.status_code == 200 and answer["Content-Type"].startswith("text/plain; version=0.0.4")
        families = list(text_string_to_metric_families(answer.content.decode()))
        assert all(family.type == "gauge" and family.documentation for family in families)
        return {(one.name, *one.labels.values()): one.value for family in families for one in family.samples}

    before = read()
    assert before["saehub_workers", "io"] == before["saehub_jobs_waiting", "io"] == 0
    here = socket.gethostname()
    assert before["saehub_memory_total_bytes", here] > 0 and ("saehub_cpu_ratio", here) not in before
    a_worker(), a_worker("dead", "io", seconds=100)
    job = enqueue("probe", user_of("annotator"), title="count", steps=3)
    Job.objects.filter(pk=job.pk).update(offered_at=timezone.now() - timedelta(seconds=90))
    Job.objects.filter(pk=enqueue("probe", None, title="done", steps=1).pk).update(state=State.DONE)
    after = read()
    assert after["saehub_workers", "gpu"] == 2 and after["saehub_workers", "io"] == 0
    assert after["saehub_jobs_waiting", "io"] == 1 and after["saehub_jobs", "probe", "done"] == 1
    assert after["saehub_oldest_wait_seconds", "io"] >= 90 and after["saehub_oldest_wait_seconds", "gpu"] == 0
    assert after["saehub_cpu_ratio", "far"] == 0.25 and after["saehub_disk_free_bytes", "far"] == 10
    assert after["saehub_gpu_memory_free_bytes", "far", "0", GPU["name"]] == 20_000, "quotes in a name are kept"
    assert after["saehub_gpu_busy_ratio", "far", "0", GPU["name"]] == 0.5
    assert ("saehub_gpu_busy_ratio", "far", "1", GPU["name"]) not in after
    assert not [key for key in after if "dead" in key]


@pytest.mark.django_db
def test_who_used_the_workers(client_of: Any, user_of: Any, api: Any) -> None:
    now, ada, bob = timezone.now(), user_of("annotator"), user_of("researcher")
    for owner, queue, hours_ago, seconds, state in (
        (ada, "gpu", 5, 3600, State.DONE), (ada, "gpu", 3, 1800, State.FAILED), (ada, "io", 2, 60, State.CANCELLED),
        (bob, "gpu", 1, None, State.RUNNING), (bob, "gpu", 40 * 24, 9999, State.DONE), (None, "io", 1, 30, State.DONE),
        (bob, "io", 1, None, State.QUEUED),  # given back by a worker that was stopped
    ):  # fmt: skip
        job = enqueue("probe", owner, title="count", steps=1)
        began = now - timedelta(hours=hours_ago)
        over = began + timedelta(seconds=seconds) if seconds else None
        Job.objects.filter(pk=job.pk).update(queue=queue, state=state, started_at=began, finished_at=over)
    first, second, nobody = usage(30)
    assert (first.name, first.seconds, first.jobs) == (ada.username, {"gpu": 5400.0, "io": 60.0}, 3)
    assert second.name == bob.username and 3600 <= second.seconds["gpu"] < 4000 and second.jobs == 1
    assert (nobody.name, nobody.seconds) == ("nobody", {"io": 30.0})
    said = text_of(client_of("viewer").get(PAGE))
    assert f"{ada.username} 1 min 1 h 30 min – 3" in said, said
    found = good(api("viewer", "get", "/workers/usage?days=100", scope="read"))
    assert found[0]["name"] == bob.username and found[0]["jobs"] == 2, "with the job of 40 days ago"


@pytest.mark.django_db
def test_the_log_of_a_job_is_downloaded(client_of: Any, user_of: Any) -> None:
    job = enqueue("probe", user_of("annotator"), title="count", steps=3)
    assert "Download the log" not in client_of("viewer").get(job.get_absolute_url()).content.decode()
    for text in ("one", "two <b>", "déjà vu"):
        job.write(text)
    assert "Download the log" in client_of("viewer").get(job.get_absolute_url()).content.decode()
    answer = client_of("viewer").get(f"/jobs/{job.pk}/log.txt")
    lines = b"".join(answer.streaming_content).decode().splitlines()
    assert [line[21:] for line in lines] == ["one", "two <b>", "déjà vu"] and re.match(r"\d{4}-\d\d-\d\d ", lines[0])
    assert answer["Content-Disposition"] == f'attachment; filename="job-{job.pk}.log"'
    assert client_of("stranger").get(f"/jobs/{job.pk}/log.txt").status_code == 403
    assert client_of("viewer").get("/jobs/999999/log.txt").status_code == 404
