"""The playground's ribbon, steering by a name, and Stop while tokens stream, in a real browser with real workers."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from concepts.models import FeatureView, Label
from inference.codes import CodesFile
from inference.models import Generation, Inference
from inference.numerics.generate import generate
from inference.numerics.steer import Edit, Steering
from saehub.jobs.models import Job, State
from saes.numerics.formats import load_sae
from saes.numerics.lm import load_lm
from tests.conftest import make_user, wait_for
from tests.e2e.conftest import PASSWORD, PATIENCE
from tests.e2e.looking import click, no_violations
from tests.steering_rows import Rows

pytestmark = pytest.mark.timeout(900)
TEXT = "Paris is the capital of France."
LONG = 3500  # tokens, which take long enough to be stopped


def test_a_token_of_the_ribbon_shows_what_fires_on_it(page: Any, harvested: tuple[Rows, FeatureView]) -> None:
    rows, _ = harvested
    page.goto(f"/playground/new/?sae={rows.sae.pk}")
    page.fill("[name=prompt]", TEXT)
    no_violations(page)
    page.keyboard.press("Control+Enter")
    page.wait_for_url(re.compile(r"/playground/\d+/$"))
    page.wait_for_selector(".ribbon .t", timeout=300_000)
    row = Inference.objects.get()
    file = CodesFile(row.folder)
    fires = file.sae(0)
    token = max(range(1, len(file)), key=fires.count)
    strongest = fires.at(token, 15)
    assert page.locator(".ribbon .t").count() == len(file)
    # A click on a token shows its features, and the address says so.
    page.locator(".ribbon .t").nth(token).click()
    page.wait_for_selector(f"#token h2:has-text('Token {token} ')")
    shown = [int(text) for text in page.locator("#token tbody td:first-child").all_inner_texts()]
    assert shown == [feature for feature, _ in strongest]
    page.wait_for_url(re.compile(rf"token={token}\b"))
    # A click on a value colours the text by that feature; its codes are those of the file.
    last = strongest[-1][0]
    page.locator(f"#token a[title='Colour the text by feature {last}']").click()
    page.wait_for_selector(f".group .sub a:text-is('{last}')")
    lit = page.eval_on_selector_all(
        ".ribbon .t", "all => all.map((t, i) => [i, t.dataset.v]).filter(([, v]) => v !== '0').map(([i]) => i)"
    )
    assert lit == [i for i, value in enumerate(fires.along(last).tolist()) if value]
    # A name given elsewhere stands beside the number, and reloading keeps what was chosen.
    Label.objects.name_feature(rows.sae, last, "about <i>capitals</i>", rows.owner)
    page.reload()
    assert page.locator("#token tr.here .label").inner_text() == "about <i>capitals</i>"
    no_violations(page)
    page.keyboard.press("n")
    page.wait_for_selector(f"#token h2:has-text('Token {min(token + 1, len(file) - 1)} ')")
    with page.expect_download() as download:
        page.click(".act >> text=CSV")
    lines = Path(download.value.path()).read_text().splitlines()
    assert len(lines) == 1 + len(fires)
    # And on to steering with it.
    page.keyboard.press("s")
    page.wait_for_url(re.compile(r"/steering/new/"))
    assert page.input_value("[name=edits-0-feature]") == str(last)


def test_a_name_typed_into_an_edit_steers(page: Any, harvested: tuple[Rows, FeatureView]) -> None:
    rows, view = harvested
    feature = int(view.opened().sorted("max")[0])
    Label.objects.name_feature(rows.sae, feature, "talk of Paris", rows.owner)
    page.goto(f"/steering/new/?sae={rows.sae.pk}")
    page.click("[name=edits-0-feature]")
    page.keyboard.type("of paris")
    page.wait_for_selector(f"datalist option[value='{feature}']", state="attached")
    page.fill("[name=edits-0-feature]", str(feature))  # what choosing the suggestion does
    page.keyboard.press("Tab")
    page.wait_for_selector("[data-name] .label:has-text('talk of Paris')")
    maximum = float(page.locator(".edit").first.get_attribute("data-max"))
    assert maximum == pytest.approx(view.opened().feature(feature).maximum)
    # The three units move together.
    page.locator("[data-times]").first.fill("2")
    assert float(page.input_value("[name=edits-0-value]")) == pytest.approx(2 * maximum, rel=1e-3)
    share = float(page.locator("[data-share]").first.input_value())
    page.locator("[data-share]").first.fill(str(share / 2))
    assert float(page.locator("[data-times]").first.input_value()) == pytest.approx(1, rel=1e-2)
    no_violations(page)
    page.fill("[name=edits-0-feature]", "TALK OF PARIS")
    page.fill("[name=prompt]", "The cat sat")
    page.keyboard.press("Control+Enter")
    page.wait_for_url(re.compile(r"/steering/\d+/$"))
    page.wait_for_selector("#state .chip.ok", timeout=300_000)
    assert [edit["feature"] for edit in Generation.objects.get().edits] == [feature]
    assert "talk of Paris" in page.inner_text("main table")
    no_violations(page)


def endless(model: Path, copy: Path) -> Path:
    """The same weights, which may write longer texts and know no end of them."""
    shutil.copytree(model, copy)
    changes = {
        "config.json": {"max_position_embeddings": 2 * LONG, "eos_token_id": None},
        "generation_config.json": {"eos_token_id": None},
        "tokenizer_config.json": {"eos_token": None},
    }
    for name, change in changes.items():
        kept = json.loads((copy / name).read_text())
        (copy / name).write_text(json.dumps(kept | change))
    return copy


def test_stop_while_tokens_stream(page: Any, harvested: tuple[Rows, FeatureView], tmp_path: Path) -> None:
    rows, _ = harvested
    patient = endless(Path(rows.model.location), tmp_path / "patient")
    type(rows.model).objects.filter(pk=rows.model.pk).update(location=str(patient), context_length=2 * LONG)
    page.goto(f"/steering/new/?sae={rows.sae.pk}&feature=3&mode=add&value=2&prompt=The+cat+sat")
    page.locator("details#advanced > summary").click()
    page.fill("[name=max_new_tokens]", str(LONG))
    page.fill("[name=temperature]", "1")
    page.click("main form button.primary")
    page.wait_for_url(re.compile(r"/steering/\d+/$"))
    seen: set[int] = set()
    output = page.locator("#live .output").first

    def streams() -> bool:
        seen.add(len(output.inner_text()))
        page.wait_for_timeout(50)
        return len(seen) > 3

    wait_for(streams, 300, "tokens that come while the page is looked at")
    page.click("#stop button")
    page.wait_for_selector("#stop:not(:has(button))", state="attached", timeout=300_000)
    row = Generation.objects.get()
    wait_for(lambda: Job.objects.get(pk=row.job_id).state == State.CANCELLED, 300, "the job to stop")
    row.refresh_from_db()
    assert 0 < len(row.baseline["ids"]) < LONG and not row.steered and not row.ready, "stopped in the first text"
    page.goto(f"/steering/{row.pk}/")
    assert row.baseline["text"].strip()[:40] in output.inner_text(), "what was written is kept"
    no_violations(page)
    # The worker is free at once for the next.
    click(page, ".act >> text=Fork")
    page.locator("details#advanced > summary").click()
    page.fill("[name=max_new_tokens]", "6")
    page.click("main form button.primary")
    page.wait_for_selector("#state .chip.ok", timeout=300_000)
    assert Generation.objects.ready().count() == 1


def test_two_at_once_get_what_each_asked_for(
    page: Any,
    chromium: Any,
    site: str,
    harvested: tuple[Rows, FeatureView],
) -> None:
    rows, _ = harvested
    bob = make_user("bob", "researcher")
    bob.set_password(PASSWORD)
    bob.save()
    context = chromium.new_context(base_url=site)
    context.set_default_timeout(PATIENCE)
    other = context.new_page()
    other.goto("/login/")
    other.fill("[name=username]", "bob")
    other.fill("[name=password]", PASSWORD)
    other.click("main button")
    other.wait_for_url(f"{site}/")
    asked = {page: ("The cat sat", 3, 60.0), other: ("Paris is", 9, 45.0)}
    for one, (prompt, feature, value) in asked.items():
        one.goto(f"/steering/new/?sae={rows.sae.pk}&feature={feature}&mode=add&value={value}")
        one.fill("[name=prompt]", prompt)
    for one in asked:  # the second is asked for while the first is under way
        one.click("main form button.primary")
    for one in asked:
        one.wait_for_url(re.compile(r"/steering/\d+/$"))
        one.wait_for_selector("#state .chip.ok", timeout=300_000)
    lm, sae = load_lm(rows.model.location), load_sae(rows.sae.files)
    for one, (prompt, feature, value) in asked.items():
        row = Generation.objects.get(pk=int(one.url.rstrip("/").rpartition("/")[2]))
        steering = [Steering(sae, rows.sae.hook_name, [Edit(feature, "add", value)])]
        assert row.prompt == prompt and row.owner.username == ("ada" if one is page else "bob")
        assert row.baseline["ids"] == generate(lm, prompt, max_new_tokens=row.max_new_tokens).ids
        assert row.steered["ids"] == generate(lm, prompt, max_new_tokens=row.max_new_tokens, steering=steering).ids
        assert row.steered["text"].strip()[:20] in one.locator("#live .output").nth(1).inner_text()
    context.close()
