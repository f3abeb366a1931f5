"""The socket of a job card: who may open it, from where, and that it closes when a right or a login is gone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from channels.db import database_sync_to_async
from channels.layers import get_channel_layer
from channels.testing import WebsocketCommunicator
from django.contrib.auth.models import Group
from django.db import connections
from django.test import Client

from saehub.asgi import application
from saehub.jobs.models import Job, enqueue
from saehub.origins import is_ours
from tests.conftest import make_user

pytestmark = pytest.mark.usefixtures("committed")
HERE = "http://localhost:8000"


@pytest.fixture(autouse=True)
def layer(settings: Any) -> None:
    """Messages stay in this process: the database's own layer is what the browser tests use."""
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": "channels.layers.InMemoryChannelLayer"}}


@pytest.fixture
def job() -> Job:
    return enqueue("probe", None, title="count to three", steps=3)


def browser(role: str) -> tuple[Any, Client]:
    """A user of that role and their browser."""
    user, client = make_user(f"a-{role}", None if role == "stranger" else role), Client()
    client.force_login(user, backend="django.contrib.auth.backends.ModelBackend")
    return user, client


def talk(client: Client, job: Job, origin: str = HERE, then: Callable[[], Any] | None = None) -> dict[str, Any]:
    """What the socket says first; with `then`, what it says to the next change, after `then` was done."""

    async def speak() -> dict[str, Any]:
        cookies = "; ".join(f"{name}={morsel.value}" for name, morsel in client.cookies.items())
        headers = [(b"host", b"localhost:8000"), (b"origin", origin.encode()), (b"cookie", cookies.encode())]
        socket = WebsocketCommunicator(application, f"/ws/jobs/{job.pk}/", headers)
        await socket.send_input({"type": "websocket.connect"})
        said = await socket.receive_output(60)
        if said["type"] == "websocket.accept":
            said = await socket.receive_output(60)
            if then is not None:
                await database_sync_to_async(then)()
                await get_channel_layer().group_send(job.group, {"type": "changed"})
                said = await socket.receive_output(60)
        await socket.disconnect(60)
        await database_sync_to_async(connections.close_all)()
        return said

    with ThreadPoolExecutor(1) as thread:  # the browser tests leave a running loop in this one
        return thread.submit(asyncio.run, speak()).result()


def test_who_may_see_jobs_gets_the_card_and_its_changes(job: Job) -> None:
    _, client = browser("viewer")
    assert "count to three" in talk(client, job)["text"]

    def change() -> None:
        Job.objects.filter(pk=job.pk).update(title="count to four")

    assert "count to four" in talk(client, job, then=change)["text"]


def test_nobody_else_gets_anything(job: Job) -> None:
    for client in (Client(), browser("stranger")[1]):
        assert talk(client, job) == {"type": "websocket.close", "code": 4403}


def test_another_site_cannot_listen_with_our_cookie(job: Job) -> None:
    _, client = browser("viewer")
    for origin in ("http://elsewhere.example", "http://elsewhere.example:8000", "http://localhost:8888", "null", ""):
        assert talk(client, job, origin=origin)["type"] == "websocket.close", origin


@pytest.mark.parametrize(
    ("origin", "host", "ours"),
    [
        ("http://127.0.0.1:8000", "127.0.0.1:8000", True),
        ("https://localhost", "localhost", True),
        ("http://[::1]:8000", "[::1]:8000", True),
        ("http://rebound.example", "rebound.example", False),  # a name of somebody else's that leads here
        ("https://sae.lab.example", "backend:8000", True),  # by CSRF_TRUSTED_ORIGINS
        ("http://[::1", "localhost", False),
    ],
)
def test_which_pages_are_ours(origin: str, host: str, ours: bool, settings: Any) -> None:
    settings.ALLOWED_HOSTS = ["127.0.0.1", "localhost", "[::1]"]
    settings.CSRF_TRUSTED_ORIGINS = ["https://sae.lab.example"]
    assert is_ours(origin, host) is ours


def test_a_lost_right_a_logout_and_a_new_password_end_the_stream(job: Job) -> None:
    user, client = browser("viewer")

    def new_password() -> None:
        user.set_password("correct horse battery")
        user.save()

    for lose in (client.logout, user.groups.clear, new_password):
        user.groups.set(Group.objects.filter(name="viewer"))
        client.force_login(user, backend="django.contrib.auth.backends.ModelBackend")
        assert talk(client, job, then=lose) == {"type": "websocket.close", "code": 4403}, lose
