"""The way of a person in a real browser: from a new capture to a steered generation, with the cards moving by themselves."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from saehub.jobs.models import Job, State
from saes.models import SAE, LanguageModel
from tests.conftest import TEXT, wait_for
from tests.e2e.conftest import PATIENCE
from tests.e2e.looking import becomes, click, no_violations, not_reloaded, stamp
from tests.training.rows import a_run, some_points
from training.models import Capture, Corpus, Run

pytestmark = pytest.mark.timeout(900)
LONGEST = 300_000  # milliseconds that a job may take where much else is done


def prepared(folder: Path) -> tuple[LanguageModel, Corpus]:
    """A tiny real model and a corpus, brought in by their own jobs."""
    model = LanguageModel.objects.create(name="tiny-llama", source="folder", location=str(folder))
    corpus = Corpus.objects.create(name="sentences", source="text", location="text.txt")
    corpus.folder.mkdir(parents=True, exist_ok=True)
    corpus.file.write_text("\n\n".join(f"Number {i}. {TEXT}" for i in range(400)))
    for row in (model, corpus):
        row.start(None)
        wait_for(
            lambda row=row: Job.objects.get(pk=row.job_id).state not in ("queued", "running"), 300, f"{row} to be ready"
        )
        job = Job.objects.get(pk=row.job_id)
        assert job.state == State.DONE, job.error
    return model, corpus


def card_finishes(page: Any, url: str) -> None:
    """On the page of something being made: its card comes to an end in place."""
    page.wait_for_url(re.compile(url))
    stamp(page)
    page.wait_for_selector(".job .chip.ok", timeout=LONGEST)
    assert not_reloaded(page)


def test_from_a_capture_to_a_steered_generation(page: Any, site: str, tiny_model_dir: Path) -> None:
    model, corpus = prepared(tiny_model_dir)

    page.goto("/captures/new/")
    page.select_option("[name=model]", label=model.name)
    page.select_option("[name=corpus]", label=corpus.name)
    page.check("[value='blocks.1.hook_resid_post']")
    no_violations(page)
    page.click("main .form button.primary")
    card_finishes(page, r"/captures/\d+/$")
    capture = Capture.objects.get()
    assert capture.ready and capture.n_tokens and capture.hook_names == ["blocks.1.hook_resid_post"]
    no_violations(page)

    page.goto(f"/training/new/?capture={capture.pk}")
    page.select_option("[name=source]", index=page.locator("[name=source] option").count() - 1)
    page.check("[name=architecture][value=topk]")
    page.fill("[name=k]", "8")
    page.fill("[name=d_sae]", "256")
    page.fill("[name=n_tokens]", "100000000")
    page.click("main .form button.primary")
    page.wait_for_url(re.compile(r"/training/\d+/$"))
    stamp(page)
    watch_the_bar(page)
    page.wait_for_selector("#live .charts svg", timeout=LONGEST)
    assert not_reloaded(page)
    no_violations(page)
    click(page, "#stop-and-keep")
    stamp(page)
    page.wait_for_selector(
        "#to-sae", timeout=LONGEST
    )  # not the card: a run that is over before its page is back has none
    assert not_reloaded(page)
    no_violations(page)

    sae = SAE.objects.get()
    run = Run.objects.get()
    assert run.stop_at and run.tokens and run.tokens < 100_000_000
    wait_for(lambda: not Job.objects.filter(state__in=("queued", "running")).exists(), 300, "evaluation and harvest")
    assert set(Job.objects.values_list("state", flat=True)) == {State.DONE}, list(
        Job.objects.values_list("kind", "error")
    )
    page.goto(f"/saes/{sae.pk}/")
    no_violations(page)
    page.goto(f"/saes/{sae.pk}/features/?sort=-n_fires")
    no_violations(page)
    page.locator("table .rowlink").first.click()
    page.wait_for_url(re.compile(r"/features/\d+/"))
    assert page.locator(".t.peak").count() > 0, "tokens are highlighted"
    no_violations(page)

    page.get_by_role("link", name="Steer", exact=True).last.click()
    page.wait_for_url(re.compile(r"/steering/new/"))
    page.fill("[name=prompt]", "The cat sat on")
    value = float(page.locator("[name$='-value']").first.input_value())
    page.locator("[name$='-value']").first.fill(str(round(20 * value, 3)))
    no_violations(page)
    page.click("main form button.primary")
    page.wait_for_url(re.compile(r"/steering/\d+/$"))
    stamp(page)
    page.wait_for_selector("#live .figures", timeout=LONGEST)
    page.wait_for_selector("#state .chip.ok", timeout=LONGEST)
    assert not_reloaded(page)
    outputs = page.locator("#live .output").all_inner_texts()
    assert len(outputs) == 2 and all(text.startswith("The cat sat on") for text in outputs)
    assert outputs[0] != outputs[1], "turning one feature up changes the text"
    no_violations(page)


def watch_the_bar(page: Any) -> None:
    """The bar is seen to move twice in one step, by itself and one way; each step counts anew."""
    seen: dict[str, list[float]] = {}
    look = "() => [document.querySelector('.job .step')?.textContent ?? '', document.querySelector('.job progress')?.value ?? 0]"

    def moved() -> bool:
        step, share = page.evaluate(look)
        shares = seen.setdefault(step, [])
        if not shares or share != shares[-1]:
            shares.append(share)
        return len(shares) > 2

    wait_for(moved, 300, "the bar to move")
    assert all(shares == sorted(shares) for shares in seen.values()), f"the bar of a step goes one way: {seen}"


def test_a_card_without_its_socket_polls_and_a_reload_shows_the_same(page: Any, site: str) -> None:
    from saehub.jobs.models import enqueue

    page.add_init_script("window.WebSocket = class { constructor() { throw new Error('no sockets here'); } }")
    job = enqueue("probe", None, title="count", steps=3000, seconds=0.1)
    page.goto(job.get_absolute_url())
    first = page.evaluate("document.querySelector('.job progress')?.value ?? 0")
    wait_for(
        lambda: page.evaluate("document.querySelector('.job progress')?.value ?? 0") > first,
        120,
        "the polled card to move",
    )
    page.reload()
    assert page.evaluate("document.querySelector('.job progress').value") > first
    page.get_by_role("button", name="Cancel").click()
    page.wait_for_selector(".job .chip.off")
    job.refresh_from_db()
    assert job.state == State.CANCELLED


def test_forms_and_lists_work_without_javascript(chromium: Any, site: str, page: Any) -> None:
    context = chromium.new_context(java_script_enabled=False, base_url=site, storage_state=page.context.storage_state())
    context.set_default_timeout(PATIENCE)
    plain = context.new_page()
    plain.goto("/corpora/new/")
    plain.check("[name=source][value=text]")
    plain.fill("[name=text]", "")
    click(plain, "main .form button.primary")
    assert plain.locator(".error").count() >= 1, "the error stands beside its field"
    plain.fill("[name=text]", TEXT)
    click(plain, "main .form button.primary")
    assert re.search(r"/corpora/\d+/$", plain.url)
    wait_for(lambda: Corpus.objects.filter(ready_at__isnull=False).exists(), 300, "the corpus to be read")
    plain.reload()
    assert "done" in plain.locator("main").inner_text() or "ready" in plain.locator("main").inner_text()
    for path in (
        "/",
        "/models/",
        "/corpora/",
        "/captures/",
        "/training/",
        "/saes/",
        "/steering/",
        "/jobs/",
        "/jobs/workers/",
        "/account/",
    ):
        assert plain.goto(path).status == 200
        assert plain.locator("h1").count() == 1
    context.close()


def test_every_list_and_form_passes_axe_light_dark_and_narrow(page: Any) -> None:
    for scheme, width in (("light", 1440), ("dark", 1440), ("light", 800)):
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": 900})
        for path in (
            "/",
            "/models/",
            "/models/new/",
            "/corpora/new/",
            "/captures/",
            "/saes/",
            "/jobs/",
            "/jobs/workers/",
            "/account/",
        ):
            page.goto(path)
            no_violations(page)


def test_sockets_ask_for_permission_too(page: Any, site: str, chromium: Any) -> None:
    """Whoever may look at jobs is sent the card; without a login, or without a role, the socket is closed."""
    from saehub.jobs.models import enqueue

    job = enqueue("probe", None, title="count", steps=3, seconds=0.0)
    script = """(pk) => new Promise((done) => {
        const socket = new WebSocket(`ws://${location.host}/ws/jobs/${pk}/`);
        socket.onmessage = (event) => done(event.data.includes(`id="job-${pk}"`) ? "card" : "something else");
        socket.onclose = () => done("closed");
    })"""
    page.goto("/jobs/")
    assert page.evaluate(script, job.pk) == "card"
    context = chromium.new_context(base_url=site)
    context.set_default_timeout(PATIENCE)
    nobody = context.new_page()
    nobody.goto("/login/")
    assert nobody.evaluate(script, job.pk) == "closed"
    context.close()
    from django.contrib.auth.models import User

    User.objects.get(username="ada").groups.clear()
    assert page.evaluate(script, job.pk) == "closed"


def test_a_refused_form_leads_to_its_field_and_a_token_is_copied(page: Any) -> None:
    page.goto("/models/new/")
    click(page, "main form button.primary")
    assert page.locator(".field.has-error").count()
    assert page.evaluate("document.activeElement.name") == "location", "one goes on where it went wrong"
    told = page.locator("[name=location]").get_attribute("aria-describedby") or ""
    assert page.locator(f"#{told.split()[-1]}").inner_text().strip(), "the error is read with its field"
    no_violations(page)

    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.goto("/account/")
    page.fill("[name=name]", "a notebook")
    page.get_by_role("button", name="Make token").click()
    secret = page.locator("code.copy").inner_text()
    page.get_by_role("button", name="Copy: Your new token").click()
    page.get_by_text("Copied", exact=True).first.wait_for()
    assert secret.startswith("sae_") and page.evaluate("navigator.clipboard.readText()") == secret
    no_violations(page)


def test_a_filtered_list_tells_how_many_rows_are_left(page: Any) -> None:
    from tests.sae_rows import a_trained_sae

    for name in ("red", "green", "green too"):
        a_trained_sae(name)
    page.goto("/saes/")
    page.fill("#facets [name=q]", "green")
    page.keyboard.press("Enter")
    becomes(page, "#rows tbody tr", 2)
    wait_for(lambda: "2 rows" in page.locator("#status").inner_text(), 120, "the status to tell it")


def test_a_charts_csv_computes_nothing_in_a_spreadsheet(page: Any) -> None:
    run = a_run()
    some_points(run)
    page.goto(run.get_absolute_url())
    chart = page.locator(".chart").first
    chart.locator("summary").click()
    chart.locator("thead th").first.evaluate("cell => { cell.textContent = '=1+1'; }")
    with page.expect_download() as download:
        chart.locator("[data-save=csv]").click()
    head, first, *_ = Path(download.value.path()).read_text().splitlines()
    assert head.startswith("'=1+1,") and [float(cell) for cell in first.split(",")]
