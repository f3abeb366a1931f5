"""Two people press Resume at once."""

from __future__ import annotations

import threading

import pytest
from django.contrib.auth import get_user_model
from django.db import connections
from django.utils import timezone

from saehub.jobs.models import Job
from tests.training.rows import a_run
from training.models import Run

pytestmark = pytest.mark.usefixtures("committed")


def test_a_run_that_is_resumed_twice_at_once_has_one_job() -> None:
    user = get_user_model().objects.create(username="ada")
    run = a_run(pause_at=timezone.now())
    together = threading.Barrier(4)

    def press() -> None:
        try:
            row = Run.objects.get(pk=run.pk)
            together.wait(60)
            row.resume(user)
        finally:
            connections.close_all()

    pressed = [threading.Thread(target=press) for _ in range(4)]
    for thread in pressed:
        thread.start()
    for thread in pressed:
        thread.join(60)
    run.refresh_from_db()
    assert [job.pk for job in Job.objects.filter(kind="train")] == [run.job_id] and run.pause_at is None
