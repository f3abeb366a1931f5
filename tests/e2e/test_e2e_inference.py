"""The playground's ribbon, steering by a name, and Stop while tokens stream, in a real browser with real workers."""

from __future__ import annotations

import re
from typing import Any

import pytest

from concepts.models import FeatureView, Label
from inference.codes import CodesFile
from inference.models import Generation, Inference
from tests.e2e.test_e2e_browser import no_violations
from tests.e2e.test_e2e_concepts import harvested  # noqa: F401
from tests.steering_rows import Rows, steering_files  # noqa: F401

pytestmark = pytest.mark.timeout(420)
TEXT = "Paris is the capital of France."
LONG = 3500  # tokens, which take long enough to be stopped


def test_a_token_of_the_ribbon_shows_what_fires_on_it(page: Any, harvested: tuple[Rows, FeatureView]) -> None:  # noqa: F811
    rows, _ = harvested
    page.goto(f"/playground/new/?sae={rows.sae.pk}")
    page.fill("[name=prompt]", TEXT)
    no_violations(page)
    page.keyboard.press("Control+Enter")
    page.wait_for_url(re.compile(r"/playground/\d+/$"))
    page.wait_for_selector(".ribbon .t", timeout=120_000)
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


def test_a_name_typed_into_an_edit_steers(page: Any, harvested: tuple[Rows, FeatureView]) -> None:  # noqa: F811
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
    page.wait_for_selector("#state .chip.ok", timeout=120_000)
    assert [edit["feature"] for edit in Generation.objects.get().edits] == [feature]
    assert "talk of Paris" in page.inner_text("main table")
    no_violations(page)
