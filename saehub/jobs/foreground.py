"""Commands that make a row by the same job as the page does, and stay until it is over."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

from django.contrib.auth import get_user_model
from django.core.management.base import BaseCommand, CommandError
from django.db import connections
from tqdm import tqdm

from saehub.jobs.models import Job
from saehub.jobs.processes import kill_tree
from saehub.jobs.runner import run as run_here
from saehub.jobs.server import start_server

POLL_SECONDS = 0.3
STOP_SECONDS = 60


class ForegroundCommand(BaseCommand):
    """quiet: no bar. stopping: what is said at Ctrl-C."""

    quiet = False
    stopping = "Stopping."

    def user(self, name: str) -> Any:
        users = get_user_model().objects.filter(is_active=True)
        found = users.filter(username=name).first() if name else users.filter(is_superuser=True).order_by("pk").first()
        if name and found is None:
            raise CommandError(f"There is no user {name}.", returncode=2)
        return found

    # -- while it runs
    def see_through(self, job: Job | None) -> Job:
        """Do the job in this process, or watch it where a worker was faster; Ctrl-C cancels it."""
        assert job is not None
        job = Job.objects.get(pk=job.pk)
        server = start_server(job.queue)
        worker = threading.Thread(target=self.work, args=(job.pk,), daemon=True, name="job")
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        worker.start()
        try:
            with tqdm(
                total=job.total,
                unit=f" {job.unit}" if job.unit else "",
                unit_scale=True,
                disable=True if self.quiet else None,
            ) as bar:
                while self.look(job, bar):
                    time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            self.stderr.write(f"\n{self.stopping}")
            job.cancel()
            self.wait(job)
        finally:
            signal.signal(signal.SIGTERM, before)
        worker.join(STOP_SECONDS)
        if server:
            kill_tree(server.pid)
        job.refresh_from_db()
        return job

    @staticmethod
    def work(pk: int) -> None:
        try:
            run_here(pk)
        finally:
            connections.close_all()

    def look(self, job: Job, bar: Any) -> bool:
        job.refresh_from_db()
        bar.total = job.total
        bar.update(max(job.done - bar.n, 0))
        bar.set_description(job.step[:60])
        return job.is_live

    def wait(self, job: Job) -> None:
        until = time.monotonic() + STOP_SECONDS
        while time.monotonic() < until:
            job.refresh_from_db()
            if not job.is_live:
                return
            time.sleep(POLL_SECONDS)
