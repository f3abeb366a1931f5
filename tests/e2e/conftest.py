"""A real site with real workers on the test database, and the system's Chromium driven by Playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import free_port, make_user, manage, wait_for
from tests.mini_hub import MiniHub
from tests.steering_rows import Rows, rows_of_the_run, steering_files  # noqa: F401

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
PASSWORD = "correct horse battery"
PATIENCE = 120_000  # milliseconds for what takes one: the machine may do much else


@pytest.fixture(scope="package")
def sites_hub() -> Iterator[MiniHub]:
    """The Hub that the site and its workers know of."""
    made = MiniHub()
    yield made
    made.close()


@pytest.fixture(scope="package")
def hub_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the site's workers keep what they have from there."""
    return tmp_path_factory.mktemp("cache") / "hub"


@pytest.fixture(scope="package")
def running_site(django_db_setup: None, sites_hub: MiniHub, hub_cache: Path) -> Iterator[str]:
    """Address of a running site with the workers of all three queues. Starting its processes takes longer than most tests,
    so that all tests of this folder share it; it ends with them, because its workers take any test's jobs."""
    hub = {"HF_ENDPOINT": sites_hub.url, "HF_HUB_CACHE": str(hub_cache), "HF_HUB_OFFLINE": "0"}
    lease = {
        "SAEHUB_JOB_LEASE": "120"
    }  # no worker is killed here, and none is to lose its job to a machine that stalls
    port = free_port()
    with ExitStack() as stack:
        calls = (["web", "--port", str(port)], ["work", "io"], ["work", "gpu"], ["work", "live"])
        children = [stack.enter_context(manage(*call, **hub, **lease)) for call in calls]
        wait_for(lambda: _answers(port), 300, "the site to answer")
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
    wait_for(lambda: not Job.objects.live().exists(), 300, "the test's jobs to end")


def _answers(port: int) -> bool:
    try:
        connection = HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/healthz")
        return connection.getresponse().status == 200
    except OSError:
        return False


# Not for longer than this folder: while Playwright's loop runs, other tests of the process cannot use theirs.
@pytest.fixture(scope="package")
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
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS, timeout=300_000)
        yield browser
        browser.close()
    if "DJANGO_ALLOW_ASYNC_UNSAFE" not in before:
        del os.environ["DJANGO_ALLOW_ASYNC_UNSAFE"]


@pytest.fixture(scope="package")
def found() -> dict[str, Any]:
    """What the harvest of the first test found, for the others."""
    return {}


@pytest.fixture
def harvested(
    page: Any,
    steering_files: Path,  # noqa: F811
    tiny_model_dir: Path,
    found: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Rows, Any]]:
    """Rows and a view of the SAE's features that the site's own workers harvested, once for all tests of this folder."""
    from django.contrib.auth.models import User

    from concepts.models import FeatureView
    from saehub.jobs.models import Job

    with rows_of_the_run(steering_files, tiny_model_dir, User.objects.get(username="ada")) as rows:
        view = FeatureView.objects.create(name="view", sae=rows.sae, capture=rows.capture, owner=rows.owner, k=12)
        if found:
            shutil.rmtree(view.folder, ignore_errors=True)  # an earlier run's
            shutil.copytree(found["folder"], view.folder)
            view.finish(**found["fields"])
        else:
            job = view.start(rows.owner)
            wait_for(lambda: Job.objects.get(pk=job.pk).state == "done", 300, "the harvest")
            view.refresh_from_db()
            found["folder"] = shutil.copytree(view.folder, tmp_path_factory.mktemp("view") / "1")
            found["fields"] = {name: getattr(view, name) for name in ("n_tokens", "alive", "dead", "seconds")}
        yield rows, view


@pytest.fixture
def page(chromium: Any, site: str) -> Iterator[Any]:
    """A page of a logged-in researcher, 1440 wide; the test fails on a script error, a 5xx or a breach of the CSP."""
    user = make_user("ada", "researcher")
    user.set_password(PASSWORD)
    user.save()
    context = chromium.new_context(viewport={"width": 1440, "height": 900}, base_url=site)
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
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
