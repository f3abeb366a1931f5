"""Child process of a worker: run one claimed job, then exit. Not for people."""

import uuid
from typing import Any

from django.core.management.base import BaseCommand, CommandParser

from saehub.jobs.models import Job
from saehub.jobs.processes import end_with_parent
from saehub.jobs.runner import execute


class Command(BaseCommand):
    help = "Run one job that a worker has claimed (used by the workers themselves)."
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("job", type=int)
        parser.add_argument("token", type=uuid.UUID)

    def handle(self, *args: Any, **options: Any) -> None:
        end_with_parent()
        job = Job.objects.select_related("owner").get(pk=options["job"])
        job.token = options["token"]
        execute(job)
