"""Bodies of requests on their way in: refused when their header says they are too large, else spooled beside the data.

Daphne takes a whole body before it asks the application, into the system's temporary folder, which may be small or in
memory. Here it goes below the data folder, and one that no page takes is answered at its first byte and never written.
Daphne then hands a body over in memory, as one queue of pieces; here the application reads the file piece by piece, so
that the largest SAE that is sent takes no more memory than a small form.
"""

from __future__ import annotations

import asyncio
import io
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import IO, Any

import daphne.http_protocol
from daphne.cli import CommandLineInterface
from daphne.http_protocol import WebRequest
from daphne.server import Server
from django.conf import settings

from saehub import error_pages

HEADERS = (  # Django's middleware, which adds them to every other answer, is not asked
    "Content-Security-Policy: default-src 'none'; style-src 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options: nosniff",
    "Connection: close",
)
SMALL = 2**20  # bytes that are not worth looking at the disk for
PIECE = 2**18
BODY = "saehub.body"  # of a scope: the file with the request's body

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Application = Callable[..., Awaitable[None]]


def install() -> None:
    """Make daphne's requests of this process LimitedRequests, and spool below the data folder."""
    tempfile.tempdir = settings.FILE_UPLOAD_TEMP_DIR
    daphne.http_protocol.WebRequest = LimitedRequest


def refusal(length: int) -> tuple[int, str] | None:
    """Status and sentence for a body of so many bytes, None where it may come."""
    if length > settings.BODY_LIMIT:
        most = settings.BODY_LIMIT // 2**20
        return 413, f"This is larger than the {most:,} MB a page takes; put it on the server and give its path."
    free = shutil.disk_usage(settings.FILE_UPLOAD_TEMP_DIR).free if length > SMALL else 0
    if length > SMALL and 2 * length > free - settings.DISK_RESERVE:  # once as it comes, once as the form's files
        return 507, "The server's disk is too full for these files; free some space first."
    return None


class Sink:
    """What is written here is gone."""

    def write(self, data: bytes) -> int:
        return len(data)

    def seek(self, *_: int) -> int:
        return 0

    def read(self, *_: int) -> bytes:
        return b""

    def close(self) -> None:
        pass


class LimitedRequest(WebRequest):  # type: ignore[misc]
    """Answers at once when the header says too much, and lets the rest run into nothing, so that browsers see the answer."""

    refused = False
    seen = 0
    content: Any
    body: IO[bytes]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Twisted would read a form whole and parse it too, in the event loop: 200 MB took it 13 s and 2 GB
        self._parsePOSTFormSubmission = False

    def gotLength(self, length: int | None) -> None:
        found = refusal(length or 0)
        if found is None:
            super().gotLength(length)
        else:
            self._refuse(*found)

    def handleContentChunk(self, data: bytes) -> None:
        self.seen += len(data)
        if not self.refused and self.seen > settings.BODY_LIMIT:  # of a length that was not said
            self.content.close()
            self._refuse(*(refusal(self.seen) or (413, "")))
        if not self.refused:
            super().handleContentChunk(data)

    def process(self) -> Any:
        if self.refused:
            self.channel.loseConnection()
            return None
        self.body, self.content = self.content, io.BytesIO()  # what daphne would put into a queue, all at once
        return super().process()

    def _refuse(self, status: int, sentence: str) -> None:
        self.refused = True
        self.content = Sink()
        accept = b",".join(self.requestHeaders.getRawHeaders(b"accept", [])).decode("latin-1")
        kind, body = error_pages.refusal(status, sentence, accept)
        head = [
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
            f"Content-Type: {kind}",
            f"Content-Length: {len(body)}",
            *HEADERS,
        ]
        self.channel.transport.write("\r\n".join([*head, "", ""]).encode() + body)


class SpoolingServer(Server):  # type: ignore[misc]
    """Tells the application where a request's body lies."""

    def create_application(self, protocol: Any, scope: dict[str, Any]) -> Any:
        if isinstance(protocol, LimitedRequest):
            scope[BODY] = protocol.body
        return super().create_application(protocol, scope)


class SpoolingCommand(CommandLineInterface):  # type: ignore[misc]
    server_class = SpoolingServer


def reading_spooled(app: Application) -> Application:
    """ASGI: the body of a request comes from its file, where the server has said which."""

    async def asked(scope: dict[str, Any], receive: Receive, send: Any) -> None:
        body: IO[bytes] | None = scope.pop(BODY, None)
        if body is None:
            return await app(scope, receive, send)
        body.seek(0)
        over = False

        async def piece() -> Message:
            nonlocal over
            if over:
                return await receive()
            await asyncio.sleep(0)  # others' requests between two pieces
            read = body.read(PIECE)
            over = len(read) < PIECE
            if over:
                body.close()
                await receive()  # the empty body that daphne knows of
            return {"type": "http.request", "body": read, "more_body": not over}

        return await app(scope, piece, send)

    return asked
