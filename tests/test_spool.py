"""A body that is too large is answered by a real server at its first bytes, and never written anywhere."""

import asyncio
import io
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings

from saehub.spool import BODY, PIECE, reading_spooled
from tests.conftest import child_environment, free_port, manage, wait_for

pytestmark = pytest.mark.usefixtures("committed")
PATIENCE = 300  # seconds for an answer


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    with served(monkeypatch, "1") as (number, _):
        yield number


@contextmanager
def served(monkeypatch: pytest.MonkeyPatch, megabytes: str) -> Iterator[tuple[int, int]]:
    """Port and process of a real server that takes files of so many MB."""
    environment = child_environment()
    for name, value in (environment | {"SAEHUB_UPLOAD_MB": megabytes, "SAEHUB_SAE_UPLOAD_MB": megabytes}).items():
        monkeypatch.setenv(name, value)
    number = free_port()
    with manage("web", "--port", str(number)) as child:
        wait_for(lambda: answers(number), 300, "the server")
        yield number, child.pid


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def spoken(port: int, head: str, body: bytes = b"") -> bytes:
    """What the server says to the beginning of a request."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as client:
        client.sendall(f"POST /saes/import/ HTTP/1.1\r\nHost: localhost\r\n{head}\r\n".encode() + body)
        return answer(client)


def answer(client: socket.socket) -> bytes:
    """The whole answer, in however many pieces it comes."""
    said = b""
    while not (length := re.search(rb"\r\nContent-Length: (\d+)\r\n.*?\r\n\r\n", said, re.I | re.S)) or (
        len(said) < length.end() + int(length[1])
    ):
        piece = client.recv(65536)
        assert piece, f"the answer ends after {said!r}"
        said += piece
    return said


def test_what_says_it_is_too_large_is_refused_before_it_is_sent(port: int) -> None:
    said = spoken(port, f"Content-Length: {100 * 2**30}\r\n")
    assert (
        said.startswith(b"HTTP/1.1 413 ")
        and b"problem+json" in said
        and b'"status": 413' in said
        and b"larger than the 17 MB" in said
    )
    said = spoken(port, f"Accept: text/html,*/*\r\nContent-Length: {100 * 2**30}\r\n", b"x" * 1000)
    assert (
        said.startswith(b"HTTP/1.1 413 ")
        and b"<h1>This is too large" in said
        and b"base.css" in said
        and b"give its path" in said
    )
    assert b"Content-Security-Policy: default-src 'none'" in said and b"X-Content-Type-Options: nosniff" in said


def test_what_does_not_say_is_cut_off_where_it_is_too_large(port: int) -> None:
    chunk = b"100000\r\n" + b"x" * 2**20 + b"\r\n"
    said = spoken(port, "Transfer-Encoding: chunked\r\n", chunk * 18)
    assert said.startswith(b"HTTP/1.1 413 ")


def test_what_is_small_enough_comes_through(port: int) -> None:
    said = spoken(port, f"Content-Length: {2**20}\r\nContent-Type: text/plain\r\n", b"x" * 2**20)
    assert said.startswith((b"HTTP/1.1 403 ", b"HTTP/1.1 302 ")), said  # no cookie, no login: a page of ours answered


def test_a_large_form_is_never_whole_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither Twisted's own parser of forms nor daphne's queue of pieces holds it; Django then reads it from its file."""
    megabytes, edge = 96, "edge"
    before = f'--{edge}\r\nContent-Disposition: form-data; name="file"; filename="big.csv"\r\n\r\n'.encode()
    after = f"\r\n--{edge}--\r\n".encode()
    length = len(before) + megabytes * 2**20 + len(after)
    head = f"POST /login/ HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary={edge}\r\n"
    with served(monkeypatch, "200") as (port, process):
        assert spoken(port, "Content-Length: 0\r\n").startswith((b"HTTP/1.1 403 ", b"HTTP/1.1 302 "))
        held = most_memory(process)
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as client:
            client.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode() + before)
            for _ in range(megabytes):
                client.sendall(b"x" * 2**20)
            client.sendall(after)
            assert answer(client).startswith(b"HTTP/1.1 403 "), "no cookie"
        assert most_memory(process) - held < megabytes * 2**20 / 2


def most_memory(process: int) -> int:
    """Bytes that the process has held at most."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


@pytest.mark.parametrize("size", [0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE])
def test_the_application_reads_the_file_and_then_hears_of_a_disconnect(size: int) -> None:
    sent, heard, body = os.urandom(size), [{"type": "http.request", "body": b""}, {"type": "http.disconnect"}], b""
    file = io.BytesIO(sent)

    async def application(scope: Any, receive: Any, send: Any) -> None:
        nonlocal body
        assert scope == {"type": "http"}
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
        assert message["type"] == "http.disconnect" and not heard

    async def receive() -> Any:
        return heard.pop(0)

    asyncio.run(reading_spooled(application)({"type": "http", BODY: file}, receive, None))
    assert body == sent and file.closed


def test_it_is_spooled_below_the_data_folder(monkeypatch: Any) -> None:
    import tempfile

    import daphne.http_protocol

    from saehub import spool

    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(daphne.http_protocol, "WebRequest", daphne.http_protocol.WebRequest)
    spool.install()
    assert Path(settings.DATA_DIR) in Path(tempfile.gettempdir()).parents
    assert daphne.http_protocol.WebRequest is spool.LimitedRequest


def test_a_disk_that_is_too_full_refuses(monkeypatch: Any) -> None:
    from saehub import spool

    monkeypatch.setattr(spool.shutil, "disk_usage", lambda path: type("usage", (), {"free": 10**7})())
    assert spool.refusal(1000) is None
    assert (spool.refusal(9 * 10**6) or (0, ""))[0] == 507
