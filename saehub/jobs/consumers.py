"""The socket of a job card: on "changed" it reads the row again and sends the fragment that the poll returns."""

from __future__ import annotations

from typing import Any

from channels.auth import get_user
from channels.db import database_sync_to_async
from channels.generic.websocket import AsyncWebsocketConsumer
from django.contrib.sessions.backends.db import SessionStore
from django.template.loader import render_to_string

from saehub.accounts.access import Can, allowed
from saehub.jobs.models import Job


class JobConsumer(AsyncWebsocketConsumer):
    """Closes with 4403 for whoever may not see jobs, at once or as soon as that is so."""

    async def connect(self) -> None:
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

    async def card(self) -> str | None:
        """The card as this user may see it now, or None. Who it is is read from the session each time: a user object keeps
        the rights it was first asked for, so that a logout or a lost right would not end the stream."""
        return await self._card_for(await get_user({"session": SessionStore(self.scope["session"].session_key)}))

    @database_sync_to_async
    def _card_for(self, user: Any) -> str | None:
        if not allowed(user, "jobs.view_job"):
            return None
        job = Job.objects.select_related("owner").filter(pk=self.pk).first()
        return render_to_string("jobs/job_detail.html#card", {"job": job, "can": Can(user)}) if job else None
