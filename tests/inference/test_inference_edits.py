"""Edits by label, by concept, by concept config, and with tokens of their own."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from concepts.models import ConceptConfig, ConceptDictionary, Label, known_features
from inference.models import Generation
from inference.numerics.generate import generate
from inference.numerics.steer import Edit, Steering
from saes.numerics.formats import load_sae
from saes.numerics.lm import load_lm
from tests.inference.test_inference_jobs import PROMPT, another_sae, generation, run
from tests.inference.test_inference_views import CREATE, posted
from tests.steering_rows import Rows
from tests.tiny_models import RESID


def label(rows: Rows, feature: int, text: str) -> None:
    Label.objects.name_feature(rows.sae, feature, text, rows.owner)


def concept(rows: Rows, *members: tuple[int, float, int], name: str = "cats") -> ConceptDictionary:
    dictionary, _ = ConceptDictionary.objects.get_or_create(sae=rows.sae, name="animals", owner=rows.owner)
    dictionary.change(
        {name: {"description": "", "members": [[*member, None] for member in members]}}, rows.owner, "test"
    )
    return dictionary


def config(rows: Rows, *edits: tuple[int, str, float]) -> ConceptConfig:
    made = [{"feature": feature, "mode": mode, "value": value} for feature, mode, value in edits]
    return ConceptConfig.next_version(rows.sae, "more <cats>", made, rows.owner)


def post(rows: Rows, client_of: Any, *edits: Any, **changes: Any) -> tuple[Any, Generation | None]:
    response = client_of("researcher").post(CREATE, posted(rows, *edits, **changes))
    return response, Generation.objects.order_by("-pk").first()


# -- by label and by concept
def test_a_row_takes_a_label(rows: Rows, client_of: Any) -> None:
    label(rows, 9, "about <b>cats")
    response, row = post(rows, client_of, ("About <B>Cats", "add", "4"))
    assert response.status_code == 302 and row and row.edits == [{"feature": 9, "mode": "add", "value": 4.0}]
    page = client_of("viewer").get(row.get_absolute_url()).content.decode()
    assert "about &lt;b&gt;cats" in page and "<b>cats" not in page
    fork = client_of("researcher").get(f"{CREATE}?fork={row.pk}")
    assert fork.context["shown"][0][2] == "about <b>cats"


def test_a_link_brings_a_concept(rows: Rows, view: Any, client_of: Any) -> None:
    wanted = concept(rows, (3, 3.0, 1), (5, 4.0, -1)).concepts.get()
    known = known_features(rows.sae, [5])[5]
    form = client_of("researcher").get(f"{CREATE}?concept={wanted.pk}").context["rows"][0]
    assert (form["feature"].value(), form["mode"].value()) == ("animals/cats", "add")
    assert float(form["value"].value()) == pytest.approx(known.usual / 5, rel=1e-3), "all members together"
    form = client_of("researcher").get(f"{CREATE}?concept={wanted.pk}&strength=2").context["rows"][0]
    response, row = post(rows, client_of, (form["feature"].value(), "add", form["value"].value()))
    assert response.status_code == 302 and row and [edit["feature"] for edit in row.edits] == [3, 5]
    assert client_of("researcher").get(f"{CREATE}?concept=99").status_code == 404


def test_a_label_of_several_features_is_asked_about(rows: Rows, client_of: Any) -> None:
    for feature in (4, 9):
        label(rows, feature, "cats")
    response, row = post(rows, client_of, ("cats", "add", "4"))
    assert response.status_code == 422 and "Several features are labelled “cats” (4, 9)" in response.content.decode()
    assert row is None


@pytest.mark.parametrize("name", ["cats", "CATS", "animals/cats"])
def test_a_row_takes_a_concept_which_moves_its_members(rows: Rows, client_of: Any, run_job: Any, name: str) -> None:
    concept(rows, (3, 1.0, 1), (9, 0.5, -1))
    response, row = post(rows, client_of, (name, "add", "8"))
    assert response.status_code == 302 and row
    named = {"mode": "add", "concept": "animals/cats", "strength": 8.0}
    assert row.edits == [{"feature": 3, "value": 8.0} | named, {"feature": 9, "value": -4.0} | named]
    fork = client_of("researcher").get(f"{CREATE}?fork={row.pk}").context["shown"]
    assert [(form["feature"].value(), form["value"].value()) for form, *_ in fork] == [("animals/cats", 8.0)]


def test_a_concept_and_a_feature_of_it_are_twice(rows: Rows, client_of: Any) -> None:
    concept(rows, (3, 1.0, 1), (9, 0.5, 1))
    response, row = post(rows, client_of, ("cats", "add", "8"), (9, "add", "1"))
    assert "Feature 9 is edited twice" in response.content.decode() and row is None


def test_suggestions_are_of_the_sae_and_for_who_may_steer(rows: Rows, client_of: Any) -> None:
    label(rows, 9, "about cats")
    label(rows, 4, "dogs")
    concept(rows, (3, 1.0, 1), name="all cats")
    url = "/steering/suggest/"
    found = json.loads(client_of("researcher").get(url, {"sae": rows.sae.pk, "q": "CAT"}).content)["found"]
    assert [one["value"] for one in found] == ["9", "animals/all cats"] and "about cats" in found[0]["text"]
    other = another_sae(rows)
    for query in ({"sae": other.pk, "q": "cat"}, {"sae": "x", "q": "cat"}, {"sae": rows.sae.pk, "q": "\0"}):
        assert json.loads(client_of("researcher").get(url, query).content) == {"found": []}
    assert client_of("viewer").get(url).status_code == 403


# -- by config
def test_a_config_steers_and_stays_with_the_row(rows: Rows, client_of: Any, run_job: Any) -> None:
    wanted = config(rows, (3, "add", 60.0), (9, "ablate", 0.0))
    form = client_of("researcher").get(f"{CREATE}?config={wanted.pk}").context["form"]
    assert form["config"].value() == wanted.pk or form["config"].value() == wanted
    assert form["sae"].value() == rows.sae.pk
    response, row = post(rows, client_of, (5, "scale", "2"), config=wanted.pk, prompt=PROMPT, max_new_tokens=12)
    assert response.status_code == 302 and row
    assert [edit.get("config") for edit in row.edits] == [None, wanted.pk, wanted.pk]
    assert row.config_fact == {"id": wanted.pk, "name": "more <cats>", "version": 1, "sae": rows.sae.pk}
    row = run(row, run_job)
    edits = [Edit(5, "scale", 2.0), Edit(3, "add", 60.0), Edit(9, "ablate")]
    lm, sae = load_lm(rows.model.location), load_sae(rows.sae.files)
    assert row.steered["ids"] == generate(lm, PROMPT, max_new_tokens=12, steering=[Steering(sae, RESID, edits)]).ids
    page = client_of("viewer").get(row.get_absolute_url()).content.decode()
    assert "more &lt;cats&gt; v1" in page and "of the config" in page
    fork = client_of("researcher").get(f"{CREATE}?fork={row.pk}")
    assert [form["feature"].value() for form, *_ in fork.context["shown"]] == [5], "the config's edits are its own"
    ConceptConfig.objects.all().delete()
    row.refresh_from_db()
    assert row.config is None and len(row.edits) == 3
    page = client_of("viewer").get(row.get_absolute_url()).content.decode()
    assert "gone; its edits are kept" in page
    record = json.loads(client_of("viewer").get(f"{row.get_absolute_url()}?format=json").content)
    assert record["concept_config"]["version"] == 1


def test_a_config_and_a_row_of_one_feature_are_refused(rows: Rows, client_of: Any) -> None:
    response, row = post(rows, client_of, (3, "scale", "2"), config=config(rows, (3, "add", 1.0)).pk)
    page = response.content.decode()
    assert row is None and "Feature 3 is edited by more &lt;cats&gt; v1 too; keep one of them." in page


def test_a_config_of_another_model_is_refused(rows: Rows, client_of: Any) -> None:
    from saes.models import SAE, LanguageModel

    wanted = config(rows, (3, "add", 1.0))
    model = LanguageModel.objects.get(pk=rows.model.pk)
    model.pk, model.name = None, "another"
    model.save()
    sae = SAE.objects.get(pk=rows.sae.pk)
    sae.pk, sae.name, sae.model, sae.path = None, "its own", model, "saes/own"
    sae.save()
    response, row = post(rows, client_of, config=wanted.pk, sae=sae.pk)
    assert row is None and "of tiny-llama, not of another; one generation has one model." in response.content.decode()
    assert client_of("researcher").get(f"{CREATE}?config=99").status_code == 404


# -- tokens of its own
def test_every_edit_acts_on_tokens_of_its_own(rows: Rows, client_of: Any, run_job: Any, tmp_path: Path) -> None:
    extra = {"edits-1-scope": "generated", "edits-2-scope": "from", "edits-2-first": "3", "max_new_tokens": 12}
    edits = [(3, "add", "20"), (9, "add", "30"), (11, "add", "30")]
    response, row = post(rows, client_of, *edits, prompt=PROMPT, scope="not_special", **extra)
    assert response.status_code == 302 and row
    assert [(edit.get("scope"), edit.get("first")) for edit in row.edits] == [
        (None, None),
        ("generated", 0),
        ("from", 3),
    ]
    row = run(row, run_job)
    lm, sae = load_lm(rows.model.location), load_sae(rows.sae.files)
    steering = [
        Steering(sae, RESID, [Edit(3, "add", 20.0)], "not_special"),
        Steering(sae, RESID, [Edit(9, "add", 30.0)], "generated"),
        Steering(sae, RESID, [Edit(11, "add", 30.0)], "from", 3),
    ]
    assert row.steered["ids"] == generate(lm, PROMPT, max_new_tokens=12, steering=steering).ids
    assert len(row.steered["effects"]) == 3
    page = client_of("viewer").get(row.get_absolute_url())
    assert [edit["where"] for _, _, edit, *_ in page.context["edits"]] == [
        "all but control tokens", "generated tokens only", "from position 3 on"
    ]  # fmt: skip
    script = tmp_path / "again.py"
    script.write_text(page.context["python"])
    with contextlib.redirect_stdout(io.StringIO()) as said:
        again = runpy.run_path(str(script))
    assert again["steered"].ids == row.steered["ids"] and row.steered["text"] in said.getvalue()
    fork = client_of("researcher").get(f"{CREATE}?fork={row.pk}").context["shown"]
    assert [form["scope"].value() or "" for form, *_ in fork] == ["", "generated", "from"]


def test_many_edits_are_shown_in_part(rows: Rows, client_of: Any) -> None:
    row = generation(rows, *((i, "add", 1.0) for i in range(60)))
    response = client_of("viewer").get(row.get_absolute_url())
    assert len(response.context["edits"]) == 50 and "The first 50 of 60 edits" in response.content.decode()
