"""The frame around every page, home, and the page of a job."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import pytest
from django.utils import timezone

from saehub.jobs.models import LOG_TAIL, Job, enqueue
from tests.conftest import ROOT
from tests.sae_rows import a_trained_sae

pytestmark = pytest.mark.django_db


def test_the_count_of_jobs_is_in_good_english(client_of: Any) -> None:
    client = client_of("viewer")
    found = []
    for _ in range(3):
        found.append(client.get("/jobs/running/").content.decode().split(">")[1].split("<")[0])
        enqueue("probe", None, title="count", steps=1, seconds=0.0)
    assert found == ["no jobs", "1 job", "2 jobs"]


SYMBOLS = {"n", "k", "v", "d_in", "d_out", "d_sae", "d_model"}


def test_heads_of_tables_begin_with_a_capital_but_symbols() -> None:
    heads = r'<th scope="col"[^>]*>(?:<(?:abbr|a)[^>]*>)?([a-z]\w*)'
    found = {
        f"{path.name}: {word}"
        for path in (ROOT / "templates").rglob("*.html")
        for word in re.findall(heads, path.read_text())
        if word not in SYMBOLS
    }
    assert not found


def test_code_that_scrolls_is_reached_by_keyboard_before_any_script_ran() -> None:
    code = [
        (path.name, tag)
        for path in (ROOT / "templates").rglob("*.html")
        for tag in re.findall(r'<pre class="copy[^>]*>', path.read_text())
    ]
    assert code and not [one for one in code if 'tabindex="0"' not in one[1]]


def test_pages_without_an_icon_of_their_own_have_one(client: Any) -> None:
    answer = client.get("/favicon.ico")
    assert answer.status_code == 302 and answer["Location"].endswith(".svg")


def test_home_leads_through_the_first_hour(client_of: Any) -> None:
    """Six steps, the first of them pressed; a viewer may start none, and who has no role is told what is missing."""
    page = client_of("researcher").get("/")
    assert [step["done"] for step in page.context["steps"]] == [False] * 6 and page.context["first_open"] == 0
    assert page.content.decode().count('class="btn small primary"') == 1
    assert "/models/new/" in page.content.decode()
    assert "/models/new/" not in client_of("viewer").get("/").content.decode()
    stranger = client_of("stranger").get("/").content.decode()
    assert "has no role yet" in stranger and "On this server" not in stranger


@pytest.mark.parametrize("n", [1, 3])
def test_home_asks_as_often_for_many_rows_as_for_one(client_of: Any, django_assert_num_queries: Any, n: int) -> None:
    for i in range(n):
        a_trained_sae(f"sae-{i}")
        enqueue("probe", None, title=f"count {i}", steps=1, seconds=0.0)
    client = client_of("researcher")
    client.get("/")
    with django_assert_num_queries(20):
        client.get("/")


def test_somebody_without_a_role_sees_no_jobs_of_others(client_of: Any) -> None:
    enqueue("probe", None, title="count secretly", steps=1, seconds=0.0)
    assert "count secretly" in client_of("viewer").get("/").content.decode()
    fragment = client_of("stranger").get("/", headers={"HX-Request": "true", "HX-Target": "jobs"})
    assert "count secretly" not in fragment.content.decode()


def test_a_job_nobody_takes_up_says_which_worker_is_missing(client_of: Any) -> None:
    job = enqueue("probe", None, title="count", steps=1, seconds=0.0)
    client = client_of("viewer")
    assert "manage.py work" not in client.get(job.get_absolute_url()).content.decode()
    long_ago = timezone.now() - timedelta(minutes=5)
    Job.objects.filter(pk=job.pk).update(created_at=long_ago, offered_at=long_ago)
    assert "manage.py work io" in client.get(job.get_absolute_url()).content.decode()
    other = enqueue("probe", None, title="count", steps=1, seconds=0.0)
    assert Job.objects.claim(other.pk, "somebody")
    assert "manage.py work" not in client.get(job.get_absolute_url()).content.decode(), "it waits for its turn"


def test_the_page_of_a_job_shows_a_short_log_once_and_figures_rounded(client_of: Any, run_job: Any) -> None:
    job = run_job(enqueue("probe", None, title="count", steps=2, seconds=0.0))
    job.lines.all().delete()
    Job.objects.filter(pk=job.pk).update(result={"explained_variance": 0.9113428}, params={"sae": 1})
    job.write("a line of its log")
    page = client_of("viewer").get(job.get_absolute_url()).content.decode()
    assert page.count("a line of its log") == 1 and "Whole log" not in page
    assert "explained variance</dt>" in page and ">0.911<" in page
    for i in range(LOG_TAIL):
        job.write(f"line {i}")
    page = client_of("viewer").get(job.get_absolute_url()).content.decode()
    assert "Whole log" in page and page.count("a line of its log") == 1 and page.count("line 7") == 2
