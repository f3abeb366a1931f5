"""A text of one's own on a feature's page, by keyboard, in a real browser with real workers."""

from __future__ import annotations

from typing import Any

import pytest

from concepts.models import FeatureView
from inference.models import Inference
from tests.e2e.looking import no_violations
from tests.steering_rows import Rows

pytestmark = pytest.mark.timeout(900)
TEXT = "Paris is the capital of <b>France</b>. مرحبا 你好 😀"


def test_a_text_of_ones_own_stays_in_the_link_from_feature_to_feature(
    page: Any,
    harvested: tuple[Rows, FeatureView],
) -> None:
    rows, view = harvested
    first = int(view.opened().sorted("n_fires")[0])
    page.goto(f"/saes/{rows.sae.pk}/features/{first}/")
    page.keyboard.press("t")
    page.keyboard.type(TEXT)
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#own-reading .tokens", timeout=300_000)
    page.wait_for_url("**text=Paris**")
    assert "fire" in page.inner_text("#own-reading")
    assert "<b>France</b>" in page.inner_text("#own-reading .tokens"), "shown as text"
    no_violations(page)
    # The next feature shows the same text at once, from the same reading.
    page.keyboard.press("Escape")
    page.keyboard.press("j")
    page.wait_for_url(f"**/features/{first + 1}/?**text=Paris**")
    page.wait_for_selector("#own-reading .tokens")
    assert Inference.objects.count() == 1
    # The search over all SAEs knows the text too, and leads to features that carry it.
    page.goto("/features/text/")
    page.fill("#own-text", TEXT)
    page.click("main form .primary")
    page.wait_for_selector("#found table .rowlink")
    no_violations(page)
    page.click("#found .rowlink >> nth=0")
    page.wait_for_selector("#own-reading .tokens")
    assert Inference.objects.count() == 1
    page.goto(f"/features/?by=like&q={rows.sae.pk}/{first}")
    page.wait_for_selector("table .rowlink")
    no_violations(page)
