"""The pages of steering: the form and what it refuses, the page of a generation, the list, who may."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from django.urls import reverse

from inference.edit_forms import MAX_EDITS
from inference.forms import MAX_NEW_TOKENS
from inference.models import Generation
from saehub.jobs.models import Job, State
from tests.steering_rows import Rows

CREATE = "/steering/new/"
LIST_QUERIES = 10


def posted(rows: Rows, *edits: tuple[Any, str, Any], **changes: Any) -> dict[str, Any]:
    """What a browser sends: the form with `edits` (feature, mode, value) in its first rows."""
    data = {
        "sae": rows.sae.pk, "prompt": "The cat sat", "scope": "all", "max_new_tokens": 6, "temperature": 0, "seed": 0,
        "edits-TOTAL_FORMS": 8, "edits-INITIAL_FORMS": 0,
    }  # fmt: skip
    for i in range(8):
        feature, mode, value = edits[i] if i < len(edits) else ("", "add", "")
        data |= {f"edits-{i}-feature": feature, f"edits-{i}-mode": mode, f"edits-{i}-value": value}
    return {name: value for name, value in (data | changes).items() if value is not None}


def test_names_agree_with_the_numerics() -> None:
    from inference.numerics.generate import MAX_NEW_TOKENS as MOST
    from inference.numerics.steer import MODES, SCOPES

    assert {mode.value: mode.label for mode in Generation.Mode} == {n: f"{n}: {m.formula}" for n, m in MODES.items()}
    assert set(Generation.Scope.values) == set(SCOPES) and MAX_NEW_TOKENS == MOST


# -- the form
def test_a_generation_is_saved_and_queued(rows: Rows, client_of: Any, user_of: Any) -> None:
    data = posted(rows, (3, "add", "4.5"), (9, "ablate", ""), prompt="  The cat\r\nsat", scope="generated")
    response = client_of("researcher").post(CREATE, data)
    row = Generation.objects.get()
    assert response.status_code == 302 and response.url == f"/steering/{row.pk}/"
    assert row.prompt == "  The cat\nsat", "spaces of the prompt are its own; line ends are the model's"
    assert row.edits == [
        {"feature": 3, "mode": "add", "value": 4.5},
        {"feature": 9, "mode": "ablate", "value": 0.0},
    ]
    assert (row.model, row.sae, row.owner) == (rows.model, rows.sae, user_of("researcher"))
    assert (row.scope, row.max_new_tokens, row.temperature, row.seed) == ("generated", 6, 0.0, 0)
    job = Job.objects.get()
    assert (job.kind, job.queue, job.params, row.job_id) == ("generate", "live", {"generation": row.pk}, job.pk)


@pytest.mark.parametrize(
    ("edits", "changes", "sentence"),
    [
        ([(3, "add", "nan")], {}, "The value must be a finite number such as 4.5, not nan or inf."),
        ([(3, "clamp", "inf")], {}, "The value must be a finite number such as 4.5, not nan or inf."),
        ([(3, "add", "1e400")], {}, "The value must be a finite number such as 4.5, not nan or inf."),
        ([(3, "add", "-2e6")], {}, "The value must lie between -1,000,000 and 1,000,000."),
        ([(3, "add", "")], {}, "Give the value v of this edit."),
        ([("", "add", "4")], {}, "Which feature? Give its index, or clear this row."),
        ([("x", "add", "4")], {}, "a whole number: no label or concept of tiny-sae is “x”."),
        ([("1.5", "add", "4")], {}, "Give the feature&#x27;s index, a whole number, or its label."),
        ([(-1, "add", "4")], {}, "Features are counted from 0."),
        ([(96, "add", "4")], {}, "There is no feature 96; tiny-sae has features 0 to 95."),
        ([(3, "add", "4"), (3, "clamp", "2")], {}, "Feature 3 is edited twice; keep one row of it, or a scale and an add."),
        ([(3, "explode", "4")], {}, "Select a valid choice."),
        ([], {"prompt": ""}, "Write a prompt: the text the model goes on from."),
        ([], {"prompt": " \n "}, "Write a prompt: the text the model goes on from."),
        ([], {"prompt": "a" * 1025}, "The prompt has 1,025 characters; tiny-llama reads 256 tokens, and at most 1,024"),
        ([], {"chat": "on"}, "tiny-llama has no chat template; leave this off to give it the plain text."),
        ([], {"max_new_tokens": 256}, "tiny-llama holds 256 tokens in all, prompt included; choose fewer."),
        ([], {"max_new_tokens": 0}, "Choose a length from 1 to 4,096 tokens."),
        ([], {"max_new_tokens": 5000}, "Choose a length from 1 to 4,096 tokens."),
        ([], {"temperature": "nan"}, "Enter a number."),
        ([], {"temperature": -1}, "Choose a temperature from 0 to 10."),
        ([], {"seed": -1}, "Choose a seed from 0 to 9223372036854775807."),
        ([], {"sae": ""}, "Choose the SAE whose features are edited."),
        ([], {"sae": 999}, "That SAE cannot be used here"),
        ([], {"scope": "some"}, "Select a valid choice."),
    ],
)  # fmt: skip
def test_bad_input_gets_one_sentence_and_nothing_is_made(
    rows: Rows, client_of: Any, edits: Any, changes: dict[str, Any], sentence: str
) -> None:
    data = posted(rows, *edits, **({"prompt": "Kept as typed"} | changes))
    response = client_of("researcher").post(CREATE, data)
    page = response.content.decode()
    assert response.status_code == 422 and sentence in page
    assert not Generation.objects.exists() and not Job.objects.exists()
    for feature, _, value in edits:
        assert f'value="{feature}"' in page or feature == ""
        assert f'value="{value}"' in page or value == ""
    assert data["prompt"].strip() in page, "what was typed is kept"


def test_an_sae_that_does_not_fit_its_model_is_refused(rows: Rows, client_of: Any) -> None:
    rows.sae.hook_name = "blocks.1.mlp.hook_post"
    rows.sae.save()
    page = client_of("researcher").post(CREATE, posted(rows)).content.decode()
    assert (
        "tiny-sae cannot steer. It reads vectors of 32 numbers, but blocks.1.mlp.hook_post of tiny-llama gives 64."
        in page
    )
    rows.sae.hook_name = "blocks.9.hook_resid_post"
    rows.sae.save()
    page = client_of("researcher").post(CREATE, posted(rows)).content.decode()
    assert "tiny-sae cannot steer. tiny-llama has no hook point blocks.9.hook_resid_post." in page
    assert not Generation.objects.exists()


def test_an_sae_that_cannot_steer_is_shown_with_the_reason(rows: Rows, client_of: Any) -> None:
    from saes.models import SAE

    SAE.objects.filter(pk=rows.sae.pk).update(architecture="transcoder", hook_name_out="blocks.1.hook_mlp_out")
    response = client_of("researcher").get(f"{CREATE}?sae={rows.sae.pk}")
    page = response.content.decode()
    assert (
        f'<option value="{rows.sae.pk}" selected disabled>' in page
        or f'<option value="{rows.sae.pk}" disabled selected>' in page
    )
    assert "tiny-sae cannot steer. A transcoder predicts blocks.1.hook_mlp_out from" in page
    page = client_of("researcher").post(CREATE, posted(rows, (3, "add", 1))).content.decode()
    assert "tiny-sae cannot steer." in page and not Generation.objects.exists()


def test_an_edit_may_have_an_sae_of_its_own(rows: Rows, client_of: Any) -> None:
    from tests.inference.test_inference_jobs import another_sae

    other = another_sae(rows)
    data = posted(rows, (3, "add", 4), (3, "add", 5), (7, "cap", 1)) | {
        "edits-1-sae": other.pk,
        "edits-2-sae": rows.sae.pk,
    }
    assert client_of("researcher").post(CREATE, data).status_code == 302
    assert Generation.objects.get().edits == [
        {"feature": 3, "mode": "add", "value": 4.0},
        {"sae": other.pk, "feature": 3, "mode": "add", "value": 5.0},
        {"feature": 7, "mode": "cap", "value": 1.0},
    ]
    twice = data | {"edits-2-sae": other.pk, "edits-2-feature": 3}
    assert "Feature 3 is edited twice" in client_of("researcher").post(CREATE, twice).content.decode()
    model = type(rows.model).objects.get(pk=rows.model.pk)
    model.pk, model.name = None, "other"
    model.save()
    type(other).objects.filter(pk=other.pk).update(model=model)
    page = client_of("researcher").post(CREATE, data).content.decode()
    assert "second is of other, not of tiny-llama; one generation has one model." in page
    wrong = client_of("researcher").post(CREATE, data | {"edits-1-sae": 999})
    assert "That SAE cannot be used here: choose another." in wrong.content.decode()
    assert Generation.objects.count() == 1


def test_all_of_a_generation_is_kept_for_its_fork(rows: Rows, client_of: Any) -> None:
    from tests.inference.test_inference_jobs import another_sae

    other = another_sae(rows)
    data = posted(rows, (3, "add", 4), scope="from", scope_from=5, instruction="Talk of dogs.") | {
        "edits-0-sae": other.pk
    }
    client_of("researcher").post(CREATE, data)
    row = Generation.objects.get()
    assert (row.scope, row.scope_from, row.instruction) == ("from", 5, "Talk of dogs.")
    response = client_of("researcher").get(f"{CREATE}?fork={row.pk}")
    form, (shown, *_) = response.context["form"], response.context["shown"][0]
    assert [form[name].value() for name in ("scope", "scope_from", "instruction")] == ["from", 5, "Talk of dogs."]
    assert shown["sae"].value() == other.pk and shown["feature"].value() == 3


def test_ten_megabytes_are_refused(rows: Rows, client_of: Any) -> None:
    response = client_of("researcher").post(CREATE, posted(rows, prompt="a" * 10_000_000))
    assert response.status_code in (400, 413, 422) and not Generation.objects.exists()


def test_everything_wrong_is_said_at_once(rows: Rows, client_of: Any) -> None:
    data = posted(rows, (3, "add", "nan"), (200, "add", "1"), prompt="", max_new_tokens=0)
    page = client_of("researcher").post(CREATE, data).content.decode()
    for sentence in ("finite number", "There is no feature 200", "Write a prompt", "Choose a length"):
        assert sentence in page
    assert '<details class="advanced" id="advanced" open>' in page, "a fold with an error is open"


def test_a_row_too_many_is_refused(rows: Rows, client_of: Any) -> None:
    last = f"edits-{MAX_EDITS}"
    data = posted(rows) | {
        "edits-TOTAL_FORMS": MAX_EDITS + 1,
        f"{last}-feature": 1,
        f"{last}-mode": "add",
        f"{last}-value": 1,
    }
    assert client_of("researcher").post(CREATE, data).status_code == 422
    assert client_of("researcher").post(CREATE, {"sae": rows.sae.pk}).status_code == 422, "without the rows' own fields"


def test_the_form_is_filled_from_the_url(rows: Rows, view: Any, client_of: Any) -> None:
    url = f"{CREATE}?sae={rows.sae.pk}&prompt=Paris&feature=3&mode=clamp&value=2.5&feature=5&mode=scale&value=0"
    response = client_of("researcher").get(url)
    (first, known, _), (second, *_) = response.context["shown"]
    assert [first[name].value() for name in ("feature", "mode", "value")] == ["3", "clamp", "2.5"]
    assert [second[name].value() for name in ("feature", "mode", "value")] == ["5", "scale", "0"]
    assert known.maximum == view.opened().feature(3).maximum and len(response.context["folded"]) == MAX_EDITS - 2
    page = response.content.decode()
    assert f'data-max="{known.maximum}"' in page and "Paris</textarea>" in page
    odd = client_of("researcher").get(f"{CREATE}?sae=x&feature=abc&mode=nonsense&feature=999999999999999999999")
    assert odd.status_code == 200


def test_without_an_sae_it_says_what_to_do(client_of: Any) -> None:
    assert "No SAE to steer with yet" in client_of("researcher").get(CREATE).content.decode()


def test_who_may_steer(rows: Rows, client_of: Any) -> None:
    for role, status in (("viewer", 403), ("researcher", 200)):
        assert client_of(role).get(CREATE).status_code == status
    assert client_of("viewer").post(CREATE, posted(rows)).status_code == 403
    assert not Generation.objects.exists()


# -- one generation
@pytest.fixture
def made(rows: Rows, view: Any, run_job: Any) -> Generation:
    feature = int(view.opened().sorted("max")[0])
    row = Generation.objects.create(
        name="The cat sat", prompt="The cat sat", model=rows.model, sae=rows.sae, owner=rows.owner, max_new_tokens=8,
        edits=[{"feature": feature, "mode": "add", "value": 40.0}, {"feature": 5, "mode": "scale", "value": 2.0}],
    )  # fmt: skip
    job = run_job(row.start(rows.owner))
    assert job.state == State.DONE, job.traceback
    row.refresh_from_db()
    return row


def test_a_generation_shows_both_texts_and_its_edits(made: Generation, view: Any, client_of: Any) -> None:
    response = client_of("viewer").get(made.get_absolute_url())
    page = response.content.decode()
    baseline, steered = response.context["sides"]
    for side, stored in ((baseline, made.baseline), (steered, made.steered)):
        assert "".join(text for text, _ in side.runs) == stored["text"] and side.n_tokens == len(stored["ids"])
    assert made.baseline["ids"] != made.steered["ids"] and any(differs for _, differs in steered.runs)
    first = made.edits[0]["feature"]
    assert f"/features/{first}/" in page
    sae, _, _, known, times, share = response.context["edits"][0]
    assert sae == made.sae
    assert times == pytest.approx(40 / view.opened().feature(first).maximum) and share == pytest.approx(
        40 * known.per_norm
    )
    assert response.context["edits"][1][4:] == (None, None), "a factor is no multiple of the maximum"
    assert 'hx-trigger="every' not in page.partition('id="live"')[2], "at rest nothing polls"


def test_while_it_runs_the_page_polls_and_shows_what_is_written(rows: Rows, client_of: Any) -> None:
    row = Generation.objects.create(name="x", prompt="The cat", model=rows.model, sae=rows.sae, owner=rows.owner)
    row.start(rows.owner)
    Job.objects.update(state=State.RUNNING)
    Generation.objects.update(baseline={"ids": [1, 2], "pieces": [" sat", " <b>"], "text": " sat <b>"})
    page = client_of("viewer").get(row.get_absolute_url(), headers={"HX-Request": "true"}).content.decode()
    assert " sat &lt;b&gt;" in page and "2 tokens so far" in page and "every 2s" in page and "<html" not in page
    assert 'id="state" hx-swap-oob="true"' in page and 'id="stop"' not in page, "Stop stays under the pointer"
    whole = client_of("researcher").get(row.get_absolute_url()).content.decode()
    assert f'action="/jobs/{row.job_id}/cancel/"' in whole and "Stop</button>" in whole
    Job.objects.update(state=State.FAILED, error="Memory ran out.")
    page = client_of("viewer").get(row.get_absolute_url(), headers={"HX-Request": "true"}).content.decode()
    assert 'id="stop" hx-swap-oob="true"' in page and "Stop</button>" not in page, "at the end it goes"
    page = client_of("viewer").get(row.get_absolute_url()).content.decode()
    assert "Memory ran out." in page and "every 2s" not in page


def test_no_edits_says_so(rows: Rows, client_of: Any) -> None:
    row = Generation.objects.create(name="x", prompt="The cat", model=rows.model, sae=rows.sae)
    assert "the steered text is the baseline itself" in client_of("viewer").get(row.get_absolute_url()).content.decode()


def test_a_fork_begins_with_the_same_settings(made: Generation, client_of: Any) -> None:
    response = client_of("researcher").get(f"{CREATE}?fork={made.pk}")
    form = response.context["form"]
    assert form["prompt"].value() == made.prompt and form["max_new_tokens"].value() == 8
    rows = [
        (row["feature"].value(), row["mode"].value(), row["value"].value()) for row, *_ in response.context["shown"]
    ]
    assert rows == [(edit["feature"], edit["mode"], edit["value"]) for edit in made.edits]
    assert f"generation {made.pk}" in response.content.decode()
    assert client_of("researcher").get(f"{CREATE}?fork=999").status_code == 404
    assert client_of("researcher").get(f"{CREATE}?fork=x").status_code == 404


def test_the_python_on_the_page_writes_the_same_texts(made: Generation, client_of: Any, tmp_path: Path) -> None:
    code = client_of("viewer").get(made.get_absolute_url()).context["python"]
    script = tmp_path / "page.py"
    script.write_text(code)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        runpy.run_path(str(script))
    assert printed.getvalue() == f"{made.steered['text']}\n{made.baseline['text']}\n"


def test_the_json_holds_all_that_decided_it(made: Generation, client_of: Any) -> None:
    response = client_of("viewer").get(made.get_absolute_url() + "?format=json")
    assert response["Content-Disposition"] == f'attachment; filename="generation-{made.pk}.json"'
    found = json.loads(response.content)
    words = {"formula": "z' = z + v", "sae": made.sae_id, "scope": "all", "first": 0, "where": "all tokens"}
    assert found["edits"][0] == made.edits[0] | words
    assert found["model"]["name"] == "tiny-llama" and found["saes"][0]["hook_name"] == "blocks.1.hook_resid_post"
    assert found["steered"]["ids"] == made.steered["ids"] and found["policy"]["n_prompt_tokens"] > 1
    assert set(found["versions"]) == {"saehub", "torch", "transformers"} and found["seed"] == 0


# -- the list
@pytest.mark.parametrize("n", [1, 3])
def test_the_list_asks_the_same_queries_for_one_and_three_rows(
    n: int, rows: Rows, client_of: Any, django_assert_num_queries: Any
) -> None:
    for i in range(n):
        row = Generation.objects.create(
            name=f"prompt {i}", prompt=f"prompt {i}", model=rows.model, sae=rows.sae, owner=rows.owner,
            edits=[{"feature": i, "mode": "add", "value": 1.0}],
        )  # fmt: skip
        row.start(rows.owner)
    client = client_of("viewer")
    client.get("/steering/")
    with django_assert_num_queries(LIST_QUERIES):
        page = client.get("/steering/").content.decode()
    assert all(f"prompt {i}" in page for i in range(n))


def test_the_list_is_searched_and_empty_lists_say_what_to_do(rows: Rows, client_of: Any) -> None:
    page = client_of("researcher").get("/steering/").content.decode()
    assert "Nothing generated yet" in page and CREATE in page
    assert CREATE not in client_of("viewer").get("/steering/").content.decode()
    Generation.objects.create(name="Rome", prompt="Rome", model=rows.model)
    assert "Rome" in client_of("viewer").get("/steering/?q=rome").content.decode()
    assert "Nothing matches" in client_of("viewer").get("/steering/?q=paris").content.decode()
    fragment = client_of("viewer").get("/steering/", headers={"HX-Request": "true"}).content.decode()
    assert fragment.strip().startswith('<div id="rows"')


def test_the_admin_keeps_a_generation_as_it_was(rows: Rows, client_of: Any) -> None:
    row = Generation.objects.create(name="Rome", prompt="Rome", model=rows.model, sae=rows.sae, owner=rows.owner)
    page = client_of("admin").get(reverse("admin:inference_generation_changelist") + "?q=rome").content.decode()
    assert row.get_absolute_url() in page
    page = client_of("admin").get(reverse("admin:inference_generation_change", args=[row.pk])).content.decode()
    assert 'name="name"' in page and 'name="prompt"' not in page and 'name="edits"' not in page
