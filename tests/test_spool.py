"""A body that is too large is answered by a real server at its first bytes, and never written anywhere."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings

from tests.conftest import child_environment, manage, wait_for

pytestmark = pytest.mark.usefixtures("committed")


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    environment = child_environment()
    for name, value in (environment | {"SAEHUB_UPLOAD_MB": "1", "SAEHUB_SAE_UPLOAD_MB": "1"}).items():
        monkeypatch.setenv(name, value)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    with manage("web", "--port", str(number)):
        wait_for(lambda: answers(number), 60, "the server")
        yield number


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def spoken(port: int, head: str, body: bytes = b"") -> bytes:
    """What the server says to the beginning of a request."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        client.sendall(f"POST /saes/import/ HTTP/1.1\r\nHost: localhost\r\n{head}\r\n".encode() + body)
        return client.recv(4096)


def test_what_says_it_is_too_large_is_refused_before_it_is_sent(port: int) -> None:
    said = spoken(port, f"Content-Length: {100 * 2**30}\r\n")
    assert said.startswith(b"HTTP/1.1 413 ") and b"problem+json" in said and b"larger than the 17 MB" in said
    said = spoken(port, f"Accept: text/html,*/*\r\nContent-Length: {100 * 2**30}\r\n", b"x" * 1000)
    assert said.startswith(b"HTTP/1.1 413 ") and b"<h1>This is too large" in said and b"give its path" in said
    assert b"Content-Security-Policy: default-src 'none'" in said and b"X-Content-Type-Options: nosniff" in said


def test_what_does_not_say_is_cut_off_where_it_is_too_large(port: int) -> None:
    chunk = b"100000\r\n" + b"x" * 2**20 + b"\r\n"
    said = spoken(port, "Transfer-Encoding: chunked\r\n", chunk * 18)
    assert said.startswith(b"HTTP/1.1 413 ")


def test_what_is_small_enough_comes_through(port: int) -> None:
    said = spoken(port, f"Content-Length: {2**20}\r\nContent-Type: text/plain\r\n", b"x" * 2**20)
    assert said.startswith((b"HTTP/1.1 403 ", b"HTTP/1.1 302 ")), said  # no cookie, no login: a page of ours answered


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
