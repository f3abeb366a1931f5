"""Jobs through a real django-q2 cluster: run, cancel, and every way of `kill -9`."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from django.db import connection

from saehub.jobs.models import Job, State, enqueue
from saehub.jobs.runner import sweep
from tests.conftest import manage, process_named, wait_for

pytestmark = pytest.mark.usefixtures("committed")


def start(steps: int, seconds: float = 0.05) -> Job:
    return enqueue("probe", None, title="count", steps=steps, seconds=seconds)


def reaches(job: Job, *states: str, seconds: float = 300) -> Job:
    def there() -> bool:
        job.refresh_from_db()
        return job.state in states

    wait_for(there, seconds, f"{job} to be {states}; it is {job.state}")
    return job


def moves(job: Job) -> Job:
    """Wait until the job has counted."""

    def there() -> bool:
        job.refresh_from_db()
        return job.state == State.RUNNING and job.done > 0

    wait_for(there, 120, f"{job} to move")
    return job


def moves_for_long() -> Job:
    """A job that counts, and would for ten minutes; its next attempt is short."""
    job = moves(start(3000, seconds=0.2))
    Job.objects.filter(pk=job.pk).update(params=job.params | {"steps": 5})
    return job


def child_of(job: Job) -> psutil.Process:
    """The process that runs the job."""
    return process_named(f"job {job.pk}")


def test_a_job_is_run_reported_and_cancelled_by_real_workers() -> None:
    with manage("work", "io"):
        done = reaches(start(5), State.DONE)
        assert done.result == {"steps": 5} and done.worker.endswith(":io")
        long = moves_for_long()
        child = child_of(long)
        long.cancel()
        reaches(long, State.CANCELLED)
        assert long.done < 3000
        child.wait(120)


def test_a_killed_job_process_is_noticed_and_the_job_taken_up_again() -> None:
    with manage("work", "io"):
        job = moves_for_long()
        child_of(job).kill()
        reaches(job, State.DONE)
        assert job.attempt == 2
        assert "killed" in " ".join(job.lines.values_list("text", flat=True))


def test_a_killed_worker_takes_its_job_process_along_and_the_job_is_finished_by_another() -> None:
    with manage("work", "io"):
        job = moves_for_long()
        child = child_of(job)
        process_named(f"for job {job.pk}").kill()  # the django-q2 worker
        child.wait(120)
        reaches(job, State.DONE)
        assert job.attempt == 2


def test_a_killed_worker_machine_leaves_nothing_and_the_next_one_finishes() -> None:
    with manage("work", "io") as worker:
        job = moves_for_long()
        tree = psutil.Process(worker.pid).children(recursive=True)
        os.kill(worker.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(tree, timeout=120)
        assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE], "no orphan outlives its parent"
    with manage("work", "io"):
        reaches(job, State.DONE)
    assert job.attempt == 2


def test_a_killed_job_server_takes_its_jobs_along_and_the_next_one_finishes_them() -> None:
    with manage("work", "io"):
        job = moves_for_long()
        child = child_of(job)
        child.parent().kill()
        child.wait(120)
        reaches(job, State.DONE)
        assert job.attempt == 2
        assert "server" in " ".join(job.lines.values_list("text", flat=True))


def test_a_job_asked_for_while_there_is_no_server_is_cancelled_all_the_same() -> None:
    with manage("work", "io") as work:
        first = moves_for_long()
        server = child_of(first).parent()
        server.suspend()
        job = start(2000)
        reaches(job, State.RUNNING)
        job.cancel()
        reaches(job, State.CANCELLED)
        server.resume()
        first.cancel()
        reaches(first, State.CANCELLED)
        reaches(start(5), State.DONE)
        assert work.poll() is None and job.done == 0


def test_ctrl_c_in_the_terminal_of_a_worker_gives_its_job_back() -> None:
    with manage("work", "io") as worker:
        job = moves_for_long()
        os.killpg(worker.pid, signal.SIGINT)
        assert worker.wait(120) == 0
    job.refresh_from_db()
    assert (job.state, job.attempt) == (State.QUEUED, 0)


def test_stopping_a_worker_gives_its_job_back_at_once() -> None:
    with manage("work", "io") as worker:
        job = moves_for_long()
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(120) == 0
    job.refresh_from_db()
    assert (job.state, job.attempt) == (State.QUEUED, 0)


def test_a_job_that_is_deleted_while_it_runs_ends_with_a_line(tmp_path: Path) -> None:
    said = tmp_path / "said.txt"
    with manage("work", "io", said=said):
        job = moves_for_long()
        child = child_of(job)
        number = job.pk
        job.delete()
        child.wait(120)
        reaches(start(1), State.DONE)
        wait_for(lambda: "was deleted while it ran" in said.read_text(), 120, "the line")
    assert said.read_text().count(f"job {number}") == 1 and "Traceback" not in said.read_text()


def test_a_job_the_queue_lost_is_offered_again() -> None:
    from django_q.models import OrmQ

    job = start(1)
    assert [task.name() for task in OrmQ.objects.all()] == [f"job-{job.pk}"]
    OrmQ.objects.all().delete()
    assert sweep() == 1
    assert [task.name() for task in OrmQ.objects.all()] == [f"job-{job.pk}"]
    assert sweep() == 0, "what waits in the queue is not offered twice"


@contextmanager
def outage() -> Iterator[None]:
    """The database takes no connections and has cut those there were, but this one."""
    allow = "UPDATE pg_database SET datallowconn = %s WHERE datname = current_database()"
    with connection.cursor() as cursor:
        cursor.execute(allow, [False])
        cursor.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        try:
            yield
        finally:
            cursor.execute(allow, [True])


def test_a_worker_outlives_an_outage_of_the_database_and_ends_in_another_when_asked_to() -> None:
    with manage("work", "io") as work:
        reaches(start(1), State.DONE)
        with outage():
            time.sleep(3)  # longer than a look of the worker
        reaches(start(1), State.DONE)
        children = psutil.Process(work.pid).children(recursive=True)
        with outage():
            time.sleep(3)
            assert work.poll() is None
            work.terminate()
            assert work.wait(120) == 0
        _, alive = psutil.wait_procs(children, timeout=120)
        assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]
