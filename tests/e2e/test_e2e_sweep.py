"""A sweep in a real browser, from the form over its members' curves to the plot of all; and a run that is paused, goes on, and
is stopped and kept, on a page that is never reloaded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from saehub.jobs.models import Job, State
from saes.models import SAE
from tests.conftest import wait_for
from tests.e2e.looking import click, no_violations, not_reloaded, stamp
from tests.steering_rows import rows_of_the_run
from training.models import Capture, Run, Sweep

pytestmark = pytest.mark.timeout(900)
HOOK = "blocks.1.hook_resid_post"


@pytest.fixture
def capture(page: Any, steering_files: Path, tiny_model_dir: Path) -> Iterator[Capture]:
    """A capture of one hook point, so that the form has nothing to ask about it."""
    with rows_of_the_run(steering_files, tiny_model_dir, None) as rows:
        Run.objects.all().delete()
        SAE.objects.all().delete()
        rows.capture.hook_names = [HOOK]
        rows.capture.save()
        yield rows.capture


def fill_form(page: Any, capture: Capture, **values: str) -> None:
    page.goto(f"/training/new/?capture={capture.pk}")
    page.check("[name=architecture][value=topk]")
    for name, value in values.items():
        page.fill(f"[name={name}]", value)
    page.uncheck("[name=evaluate_after]")
    page.uncheck("[name=harvest_after]")


def test_a_sweep_from_the_form_to_the_plot(page: Any, capture: Capture) -> None:
    fill_form(page, capture, k="4, 8", d_sae="128, 256", n_tokens="200000")
    page.wait_for_selector("#estimate dt:text('runs, side by side')")
    no_violations(page)
    page.click("main .form button.primary")
    page.wait_for_url(re.compile(r"/training/sweeps/\d+/$"))
    stamp(page)
    rows = page.locator("#live table[data-keys] tbody tr")
    assert rows.count() == 4
    page.wait_for_selector("#live .frontier svg", timeout=300_000)
    page.wait_for_selector(".job .chip.ok", timeout=300_000)
    page.wait_for_selector("#live table[data-keys] tbody tr:nth-child(4) .chip.ok", timeout=300_000)
    assert not_reloaded(page), "curves and rows came by themselves"
    assert page.locator("#live table[data-keys] .chip.ok").count() == 4
    page.locator("#live .frontier details summary").first.click()
    assert page.locator("#live .frontier details table tbody tr").count() == 4, "a point for each run"
    no_violations(page)
    sweep = Sweep.objects.get()
    assert sweep.ready and all(run.sae_id for run in sweep.runs.all())

    rows.first.locator(".rowlink").click()
    page.wait_for_url(re.compile(r"/training/\d+/$"))
    assert page.locator("#live .charts svg").count() == 4, "loss, explained variance, L0, dead features"
    assert page.get_by_role("link", name=sweep.name).count() == 1
    no_violations(page)


def test_a_run_is_paused_goes_on_and_is_kept_in_place(page: Any, capture: Capture) -> None:
    fill_form(page, capture, k="4", d_sae="256", n_tokens="100000000")
    page.click("main .form button.primary")
    page.wait_for_url(re.compile(r"/training/\d+/$"))
    page.wait_for_selector("#live .charts svg", timeout=300_000)
    click(page, "#pause")
    stamp(page)
    page.wait_for_selector("#paused", timeout=300_000)
    assert not_reloaded(page) and page.locator(".job").count() == 0, "the card made room for the note by itself"
    no_violations(page)
    click(page, "#resume")
    page.wait_for_selector(".job .step", timeout=300_000)
    wait_for(lambda: "continued at step" in page.locator(".job .log").inner_text(), 300, "the run to go on")
    click(page, "#stop-and-keep")
    page.wait_for_selector("#to-sae", timeout=300_000)
    run = Run.objects.get()
    job = Job.objects.get(pk=run.job_id)
    assert run.ready and run.tokens < 100_000_000 and job.state == State.DONE
    page.goto(job.get_absolute_url())
    assert page.locator(".job progress").get_attribute("value") != "1.0"
    assert float(page.evaluate("document.querySelector('.job progress').value")) < 1, "stopped is not all of it"
    no_violations(page)
