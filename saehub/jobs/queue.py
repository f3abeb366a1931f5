"""The two messengers: django-q2 carries a job's id to a worker, Channels carries "changed" to the pages."""

from __future__ import annotations

from datetime import timedelta

from channels.layers import get_channel_layer
from django.utils import timezone


def push(job_id: int, queue: str) -> None:
    from django_q.tasks import async_task

    async_task("saehub.jobs.runner.run", job_id, task_name=f"job-{job_id}", cluster=queue)


def pushed(queue: str) -> set[str]:
    """Names of the tasks that wait in, or were taken from, `queue`."""
    from django_q.models import OrmQ

    return {str(task.name()) for task in OrmQ.objects.filter(key=queue)}


def announce(job_id: int) -> None:
    """Tell the pages that watch a job.

    Does what the layer's `group_send` does, with the layer's own models on Django's connection: workers have no event loop,
    and the layer's connection pool belongs to the loop that first used it. The table's trigger notifies on commit, so no
    page reads the row before it has changed.
    """
    from channels_postgres.models import GroupChannel, Message

    layer = get_channel_layer()
    channels = GroupChannel.objects.filter(group_key=layer._group_key(f"job-{job_id}")).values_list(
        "channel", flat=True
    )
    message = layer.serialize({"type": "changed", "job": job_id})
    expire = timezone.now() + timedelta(seconds=layer.expiry)
    Message.objects.bulk_create([Message(channel=channel, message=message, expire=expire) for channel in set(channels)])
