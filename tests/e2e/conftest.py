"""A real site with real workers on the test database, and the system's Chromium driven by Playwright."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from typing import Any

import pytest

from tests.conftest import make_user, manage, wait_for

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
PASSWORD = "correct horse battery"


@pytest.fixture(scope="module")
def running_site(django_db_setup: None) -> Iterator[str]:
    """Address of a running site with the workers of all three queues. Starting its processes takes longer than most tests,
    so that those of a file share it."""
    with site_processes() as address:
        yield address


@contextmanager
def site_processes() -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with ExitStack() as stack:
        calls = (["web", "--port", str(port)], ["work", "io"], ["work", "gpu"], ["work", "live"])
        children = [stack.enter_context(manage(*call)) for call in calls]
        wait_for(lambda: _answers(port), 120, "the site to answer")
        yield f"http://127.0.0.1:{port}"
        for child in children:  # all at once; each is waited for afterwards
            child.terminate()


@pytest.fixture
def site(committed: None, running_site: str) -> Iterator[str]:
    """The site for one test: no rows before it, and no job of it goes on after it."""
    yield running_site
    from saehub.jobs.models import Job

    for job in Job.objects.live():
        job.cancel()
    wait_for(lambda: not Job.objects.live().exists(), 60, "the test's jobs to end")


def _answers(port: int) -> bool:
    try:
        connection = HTTPConnection("127.0.0.1", port, timeout=2)
        connection.request("GET", "/healthz")
        return connection.getresponse().status == 200
    except OSError:
        return False


# Not for longer than a file: while Playwright's loop runs, other tests of the process cannot use theirs.
@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    if CHROMIUM is None:
        message = "Chromium is not installed, so no page was opened (apt-get install chromium)"
        if os.environ.get("SAEHUB_REQUIRE_BROWSER"):
            pytest.fail(message)
        pytest.skip(message)
    before = dict(os.environ)
    os.environ["DJANGO_ALLOW_ASYNC_UNSAFE"] = "1"  # Playwright's loop runs in the thread that also asks the database
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()
    if "DJANGO_ALLOW_ASYNC_UNSAFE" not in before:
        del os.environ["DJANGO_ALLOW_ASYNC_UNSAFE"]


@pytest.fixture
def page(chromium: Any, site: str) -> Iterator[Any]:
    """A page of a logged-in researcher, 1440 wide; the test fails on a script error, a 5xx or a breach of the CSP."""
    user = make_user("ada", "researcher")
    user.set_password(PASSWORD)
    user.save()
    context = chromium.new_context(viewport={"width": 1440, "height": 900}, base_url=site)
    page = context.new_page()
    page.set_default_timeout(60_000)
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(f"script: {error}"))
    page.on("console", lambda line: faults.append(line.text) if "Content Security Policy" in line.text else None)
    page.on("response", lambda answer: faults.append(f"{answer.status} {answer.url}") if answer.status >= 500 else None)
    page.goto("/login/")
    page.fill("[name=username]", "ada")
    page.fill("[name=password]", PASSWORD)
    page.click("main button")
    page.wait_for_url(f"{site}/")
    yield page
    context.close()
    assert not faults, faults
