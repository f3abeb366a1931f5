"""manage.py work io|gpu|live: the workers of one queue on this machine, and the sweep for dead workers' jobs."""

import os
import signal
import socket
import threading
import time
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import InterfaceError, OperationalError, connections
from django.utils import timezone
from django_q.signals import post_spawn

from saehub.jobs.models import Job, State
from saehub.jobs.processes import end_with_parent, kill_tree
from saehub.jobs.runner import release, sweep
from saehub.jobs.server import import_all, modules_of, start_server
from saehub.jobs.workers import BEAT_SECONDS, beat, leave

SWEEP_SECONDS = 2.0
STUCK_SECONDS = 20.0


class Command(BaseCommand):
    help = "Run the workers of one queue until interrupted. Any number of machines may serve a queue."
    requires_system_checks: list[str] = []  # the site's process makes them; here they would import all its pages

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("queue", choices=sorted(settings.QUEUES))
        parser.add_argument(
            "--with-parent", action="store_true", help="End when the process that started this one ends."
        )

    def handle(self, *args: Any, **options: Any) -> None:
        self.queue = options["queue"]
        if os.environ.get("Q_CLUSTER_NAME") != self.queue:
            raise CommandError("A worker is a process of its own, started as: manage.py work QUEUE")
        self.over = threading.Event()
        end_with_parent(self.over.set if options["with_parent"] else lambda: None)
        self.worker = os.environ["SAEHUB_WORKER"] = f"{socket.gethostname()}:{os.getpid()}:{self.queue}"
        self.server = start_server(self.queue)
        post_spawn.connect(self.import_in_worker)
        cluster = self.start_cluster()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: self.over.set())
        began, said = timezone.now(), 0.0
        try:
            while not self.over.wait(SWEEP_SECONDS if said else 0):
                try:
                    if time.monotonic() - said > BEAT_SECONDS:
                        said = time.monotonic()
                        self.beat(began)
                    cluster = self.look_after(cluster)
                except (OperationalError, InterfaceError) as error:  # it may be back at the next look
                    self.stderr.write(f"{self.worker}: the database does not answer: {str(error).strip()}")
                    connections.close_all()
        finally:
            self.end()

    def import_in_worker(self, **_: Any) -> None:
        """Before its first job: what a worker needs that does jobs itself."""
        import_all(modules_of(self.queue, in_child=False))

    def beat(self, began: Any) -> None:
        try:
            beat(self.worker, self.queue, began)
        except OSError as error:  # a disk that went away ends jobs, not workers
            self.stderr.write(f"{self.worker}: {error}")

    def look_after(self, cluster: Any) -> Any:
        """Take up what dead workers left; the cluster, started again where it is stuck or gone."""
        sweep()
        if self.server and self.server.poll() is not None:
            self.server = start_server(self.queue)
        if not self.stuck() and cluster.sentinel.is_alive():
            return cluster
        self.stderr.write(f"{self.worker}: the cluster is stuck or gone, starting it again")
        self.stop_cluster()
        self.server = start_server(self.queue)
        return self.start_cluster()

    def end(self) -> None:
        """The cluster's processes first: Python would wait for them for ever, as they for the queue."""
        try:
            self.stop_cluster()
            leave(self.worker)
        except (OperationalError, InterfaceError):  # without a database the lease runs out instead
            self.stderr.write(f"{self.worker}: ended without a database to give its jobs back to")

    def start_cluster(self) -> Any:
        from django_q.cluster import Cluster

        self.started = timezone.now()
        connections.close_all()  # never share a connection with a forked process
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        cluster = Cluster()
        cluster.start()
        for number, handler in handlers.items():  # the cluster took them; the end is ours to order
            signal.signal(number, handler)
        return cluster

    def stop_cluster(self) -> None:
        """Kill, then give the jobs back at once: an orderly stop would wait for the running job, hours maybe."""
        kill_tree()
        release(self.worker, "Its worker was stopped.")

    def stuck(self) -> bool:
        """Jobs wait though no job of ours runs: an idle worker died by `kill -9` while it held the queue's lock."""
        waiting = Job.objects.filter(state=State.QUEUED, queue=self.queue).order_by("offered_at").first()
        if (
            waiting is None
            or waiting.offered_at is None
            or Job.objects.filter(state=State.RUNNING, worker=self.worker).exists()
        ):
            return False
        return (timezone.now() - max(waiting.offered_at, self.started)).total_seconds() > STUCK_SECONDS
