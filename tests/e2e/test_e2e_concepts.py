"""From a name given by keyboard to a steered generation with a concept of it, in a real browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from concepts.models import Concept, ConceptConfig, ConceptDictionary, FeatureView, Label
from inference.models import Generation
from tests.conftest import wait_for
from tests.e2e.looking import becomes, click, no_violations
from tests.steering_rows import Rows

pytestmark = pytest.mark.timeout(900)


def test_from_a_name_to_a_steered_generation_with_its_concept(
    page: Any, harvested: tuple[Rows, FeatureView], tmp_path: Path
) -> None:
    rows, view = harvested
    first, second = (int(i) for i in view.opened().sorted("max")[:2])
    # One key, one field: the feature has a name.
    page.goto(f"/saes/{rows.sae.pk}/features/{first}/")
    page.keyboard.press("l")
    page.keyboard.type("about cats")
    page.keyboard.press("Enter")
    page.wait_for_selector(".chip.label:has-text('about cats')")
    assert Label.objects.accepted_of(rows.sae, [first]) == {first: "about cats"}
    no_violations(page)
    # The list finds it, and the filter that finds it is in the address.
    page.goto(f"/saes/{rows.sae.pk}/features/")
    page.fill("#id_label", "CATS")
    page.wait_for_url("**label=CATS**")
    becomes(page, "#rows tbody tr", 1)
    assert "about cats" in page.inner_text("#rows tbody")
    no_violations(page)
    # A dictionary, filled from a file that is looked at first.
    page.goto("/concepts/")
    no_violations(page)
    click(page, "text=New dictionary >> nth=0")
    page.fill("[name=name]", "animals")
    page.click("main form .primary")
    page.wait_for_selector("h1:has-text('animals')")
    no_violations(page)
    dictionary = ConceptDictionary.objects.get()
    click(page, ".act >> text=Import")
    file = tmp_path / "names.csv"
    file.write_text(f"neuron_idx,concept_name,score\n{first},cats,0.9\n{second},cats,0.5\n9999,dogs,1\n")
    page.set_input_files("[name=file]", file)
    no_violations(page)
    page.click("main form .primary")
    page.wait_for_selector("text=There is no feature 9999")
    assert dictionary.states() == {}
    no_violations(page)
    page.click("text=Apply it")
    page.wait_for_selector(".rowlink:has-text('cats')")
    no_violations(page)
    # The concept shows what its features fire on, and goes into a config.
    click(page, ".rowlink:has-text('cats')")
    page.wait_for_selector(".member-texts .tokens")
    no_violations(page)
    concept = Concept.objects.get()
    click(page, "text=Into a config")
    page.fill("[name=edits-1-target]", str(first))
    page.fill("[name=edits-1-value]", "0.5")
    page.click("text=Preview")
    page.wait_for_selector("text=What moves")
    no_violations(page)
    page.fill("[name=name]", "more cats")
    page.click("text=Save it")
    page.wait_for_selector("text=version 1")
    no_violations(page)
    config = ConceptConfig.objects.get()
    assert [edit["feature"] for edit in config.compiled()] == sorted([first, second])
    # And the config into a generation.
    click(page, "text=Use in steering")
    page.fill("[name=prompt]", "The cat sat")
    page.keyboard.press("Control+Enter")
    page.wait_for_url("**/steering/*/")
    found = wait_for(lambda: Generation.objects.ready().first(), 300, "the generation")
    assert {(edit["feature"], edit["mode"]) for edit in found.edits} == {
        (edit["feature"], edit["mode"]) for edit in concept.edit("add", 1.0)["members"] and config.compiled()
    }
    page.goto(f"/concepts/{dictionary.pk}/history/?revision=1")
    no_violations(page)
    page.goto(f"/saes/{rows.sae.pk}/labels/")
    no_violations(page)
    page.goto(f"/concepts/configs/read/?sae={rows.sae.pk}")
    no_violations(page)
