"""The socket of a job card: on "changed" it reads the row again and sends the fragment that the poll returns."""

from __future__ import annotations

from typing import Any

from channels.db import database_sync_to_async
from channels.generic.websocket import AsyncWebsocketConsumer
from django.template.loader import render_to_string

from saehub.accounts.access import Can, allowed
from saehub.jobs.models import Job


class JobConsumer(AsyncWebsocketConsumer):
    async def connect(self) -> None:
        self.user = self.scope["user"]
        self.pk = self.scope["url_route"]["kwargs"]["pk"]
        card = await self.card()
        if card is None:
            await self.close(code=4403)
            return
        await self.channel_layer.group_add(f"job-{self.pk}", self.channel_name)
        await self.accept()
        await self.send(text_data=await self.card() or card)  # what changed while we were joining

    async def disconnect(self, code: int) -> None:
        await self.channel_layer.group_discard(f"job-{self.pk}", self.channel_name)

    async def changed(self, event: dict[str, Any]) -> None:
        card = await self.card()
        if card is None:
            await self.close(code=4403)
        else:
            await self.send(text_data=card)

    @database_sync_to_async
    def card(self) -> str | None:
        """The card as this user may see it now, or None; asked anew each time, so that a lost right ends the stream."""
        if not allowed(self.user, "jobs.view_job"):
            return None
        job = Job.objects.select_related("owner").filter(pk=self.pk).first()
        return render_to_string("jobs/job_detail.html#card", {"job": job, "can": Can(self.user)}) if job else None
