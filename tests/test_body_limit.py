"""A body over the limit is refused by its header, or cut off where it passes the limit."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from asgiref.testing import ApplicationCommunicator

from saehub.body_limit import BodyLimit


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers with how many bytes came, or with 499 when the client seems gone."""
    size, status = 0, 200
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            status = 499
            break
        size += len(message["body"])
        if not message["more_body"]:
            break
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": str(size).encode()})


async def asked(headers: list[tuple[bytes, bytes]], *pieces: bytes) -> tuple[int, bytes]:
    made = ApplicationCommunicator(BodyLimit(echo, 10), {"type": "http", "headers": headers})
    for number, piece in enumerate(pieces):
        await made.send_input({"type": "http.request", "body": piece, "more_body": number < len(pieces) - 1})
    status = (await made.receive_output())["status"]
    return status, (await made.receive_output())["body"]


@pytest.mark.parametrize(
    ("headers", "pieces", "status", "body"),
    [
        ([(b"content-length", b"10")], (b"12345", b"67890"), 200, b"10"),
        ([(b"content-length", b"11")], (b"x" * 11,), 413, b"larger than"),
        ([], (b"12345", b"67890"), 200, b"10"),
        ([], (b"12345", b"678901", b"more"), 499, b"5"),
        ([(b"content-length", b"three")], (b"123",), 200, b"3"),
        ([(b"content-length", b"3")], (b"123456", b"789012"), 499, b"6"),
    ],
)
def test_bodies(headers: Any, pieces: Any, status: int, body: bytes) -> None:
    with ThreadPoolExecutor(1) as thread:  # the browser tests leave a running loop in this one
        found = thread.submit(asyncio.run, asked(headers, *pieces)).result()
    assert found[0] == status and body in found[1]
