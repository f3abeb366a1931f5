"""Answers that a browser keeps as a file: large ones are written while they are sent, so that nothing is held whole."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable, Iterator
from itertools import chain
from typing import Any

from asgiref.sync import sync_to_async
from django.core.handlers.asgi import ASGIRequest
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.utils.http import content_disposition_header

PIECE = 2**16  # bytes sent at once, about


def small_file(text: str, *, name: str, kind: str) -> HttpResponse:
    """A file of that name and content type, of a text that is there whole already."""
    return HttpResponse(text, content_type=f"{kind}; charset=utf-8", headers=_kept_as(name))


def json_file(value: Any, *, name: str) -> HttpResponse:
    """The same of what JSON can hold, indented for people who open it."""
    return small_file(json.dumps(value, indent=1, ensure_ascii=False), name=name, kind="application/json")


def attachment(request: HttpRequest, pieces: Iterable[str], *, name: str, kind: str) -> StreamingHttpResponse:
    """The same written while it is sent. The first piece is made at once, so that what it raises becomes a page."""
    return stored(request, _joined(pieces), name=name, kind=f"{kind}; charset=utf-8")


def stored(
    request: HttpRequest, pieces: Iterable[bytes], *, name: str, kind: str, size: int | None = None
) -> StreamingHttpResponse:
    """The same of bytes that lie somewhere, with their number where it is known."""
    parts = iter(pieces)
    whole = chain([next(parts, b"")], parts)
    # given a plain iterator, Django's ASGI handler would collect it whole before it sends anything
    content: Any = _later(whole) if isinstance(request, ASGIRequest) else whole
    response = StreamingHttpResponse(content, content_type=kind, headers=_kept_as(name))
    if size is not None:
        response["Content-Length"] = str(size)
    return response


def _kept_as(name: str) -> dict[str, str]:
    # Django's function quotes what a name may hold; Content-Type and "nosniff" (SecurityMiddleware) keep it from being run
    return {"Content-Disposition": content_disposition_header(True, name) or ""}


def _joined(pieces: Iterable[str]) -> Iterator[bytes]:
    held, size = [], 0
    for piece in pieces:
        held.append(piece.encode("utf-8", "replace"))
        size += len(held[-1])
        if size >= PIECE:
            yield b"".join(held)
            held, size = [], 0
    if held:
        yield b"".join(held)


async def _later(parts: Iterator[bytes]) -> AsyncIterator[bytes]:
    """The parts, each made in a thread (the request's own, where its database connection lives)."""
    following = sync_to_async(lambda: next(parts, b""))
    while part := await following():
        yield part
