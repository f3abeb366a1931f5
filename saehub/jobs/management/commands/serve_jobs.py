"""The job server of a queue's workers, and the processes it forks. Not for people."""

import gc
import socket
import uuid
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandParser

from saehub.jobs.models import Job
from saehub.jobs.processes import end_with_parent, name_process
from saehub.jobs.runner import execute
from saehub.jobs.server import end_with_worker, serve


class Command(BaseCommand):
    help = "Fork a process for each job that a worker has claimed (used by the workers themselves)."
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("queue", choices=sorted(settings.QUEUES))
        parser.add_argument("requests", type=int, help="The descriptor of the socket that requests come along.")

    def handle(self, *args: Any, **options: Any) -> None:
        name_process(f"jobs of {options['queue']}")
        order = serve(options["queue"], socket.socket(fileno=options["requests"]))
        if order is None:
            return
        gc.freeze()  # what the server imported is never garbage; looking through it would also unshare its memory
        name_process(f"job {order.job}")
        end_with_parent()
        end_with_worker(order.channel)
        job = Job.objects.select_related("owner").filter(pk=order.job).first()
        if job is None:  # deleted meanwhile; the worker says so
            return
        job.token = uuid.UUID(bytes=order.token)
        execute(job)
