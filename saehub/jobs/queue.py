"""The two messengers: django-q2 carries a job's id to a worker, Channels carries "changed" to the pages."""

from __future__ import annotations

import logging

from asgiref.sync import async_to_sync
from channels.layers import get_channel_layer
from django.db import DatabaseError

log = logging.getLogger(__name__)


def push(job_id: int, queue: str) -> None:
    from django_q.tasks import async_task

    async_task("saehub.jobs.runner.run", job_id, task_name=f"job-{job_id}", cluster=queue)


def pushed(queue: str) -> set[str]:
    """Names of the tasks that wait in, or were taken from, `queue`."""
    from django_q.models import OrmQ

    return {str(task.name()) for task in OrmQ.objects.filter(key=queue)}


def announce(job_id: int) -> None:
    """Tell the pages that watch a job. A page that misses it sees the same row at its next poll, so failing is harmless."""
    layer = get_channel_layer()
    if layer is None:
        return
    try:
        async_to_sync(layer.group_send)(f"job-{job_id}", {"type": "changed", "job": job_id})
    except (DatabaseError, OSError, RuntimeError) as error:
        log.warning("job %s: pages not told of a change: %s", job_id, error)
