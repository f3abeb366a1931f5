"""Ends a request whose body is larger than anything a page takes, before it fills the disk."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from saehub.error_pages import refusal

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class BodyLimit:
    """ASGI: 413 for a body that says it is over `limit` bytes; one that does not say so is cut off there.

    Django writes the whole body to a temporary file before a form can refuse it.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        said = dict(scope.get("headers", ())).get(b"content-length", b"0")
        if said.isdigit() and int(said) > self.limit:
            await self._refuse(scope, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            return message if seen <= self.limit else {"type": "http.disconnect"}

        await self.app(scope, counted, send)

    async def _refuse(self, scope: dict[str, Any], send: Send) -> None:
        most = self.limit // 2**20
        text = f"This is larger than the {most:,} MB a page takes; put it on the server and give its path."
        accept = dict(scope.get("headers", ())).get(b"accept", b"").decode("latin-1")
        kind, body = refusal(413, text, accept)
        headers = [(b"content-type", kind.encode()), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body", "body": body})
