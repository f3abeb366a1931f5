"""Features that tell two sets of texts apart: the page, its numbers, the API."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from django.urls import reverse

from concepts.models import FeatureView, Label
from inference.contrast import contrasts
from inference.models import Inference
from saehub.jobs.models import State
from tests.api_calls import good, problem
from tests.inference.test_inference_own_text import dense
from tests.inference.test_inference_playground import second_sae
from tests.steering_rows import Rows

PAGE = "/features/contrast/"
FIRST = ["Paris is the capital of France.", "Rome is that of Italy."]
SECOND = ["The cat sat on the mat.", "Numbers such as 3.14 are floats.", "the dog slept"]


def compared(rows: Rows, client: Any, run_job: Any) -> tuple[Inference, str]:
    """Both sets sent by the page's form and read; the row, and where the page led."""
    answer = client.post(PAGE, {"first": "\r\n".join(FIRST), "second": "\r\n\r\n".join(SECOND), "model": rows.model.pk})
    row = Inference.objects.get()
    assert run_job(row.job).state == State.DONE, row.job.traceback
    row.refresh_from_db()
    return row, answer.url


def peaks(rows: Rows) -> np.ndarray:
    """m (texts, features), by the model and the SAE themselves; BOS left out."""
    return np.stack([dense(rows, text)[1][1:].max(0) for text in [*FIRST, *SECOND]])


def test_the_numbers_are_those_of_the_dense_codes(rows: Rows, view: FeatureView, client_of: Any, run_job: Any) -> None:
    row, _ = compared(rows, client_of("researcher"), run_job)
    assert row.prompts == [*FIRST, *SECOND]
    m, summary = peaks(rows), view.opened().summary
    difference = m[:2].mean(0) - m[2:].mean(0)
    score = difference * np.log((view.n_tokens + 1) / (summary["n_fires"] + 1))
    effect = np.array(
        [np.mean([np.sign(a - b) for a in m[:2, i] for b in m[2:, i]]) for i in range(96)]
    )  # pairs one by one
    for order, by in {"score": score, "difference": difference, "effect": effect}.items():
        (found,) = contrasts(row, 2, order=order, n=96)
        assert found.n_features == (m.max(0) > 0).sum() and found.harvested
        for side, sign in ((found.first, 1), (found.second, -1)):
            assert {one.feature for one in side} == set(np.flatnonzero(sign * by > 0).tolist())
            ranked = [abs(by[one.feature]) for one in side]
            np.testing.assert_allclose(ranked, sorted(ranked, reverse=True), rtol=1e-4, atol=1e-5)
            for one in side:
                i = one.feature
                expected = [m[:2, i].mean(), m[2:, i].mean(), difference[i], score[i], effect[i]]
                given = [one.first, one.second, one.difference, one.score, one.effect]
                np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-4)
                assert (one.n_first, one.n_second) == ((m[:2, i] > 0).sum(), (m[2:, i] > 0).sum())
    (few,) = contrasts(row, 2, n=3)
    (whole,) = contrasts(row, 2, n=96)
    assert few.first == whole.first[:3] and len(whole.first) > 3 and few.second == whole.second[:3] != []
    (seldom,) = contrasts(row, 2, density_max=0.05, n=96)
    assert 0 < seldom.n_features < found.n_features
    assert all(summary["density"][one.feature] <= 0.05 for one in seldom.first + seldom.second)


def test_one_text_against_one_turned_round_is_its_mirror(
    rows: Rows, view: FeatureView, client_of: Any, run_job: Any
) -> None:
    client = client_of("researcher")
    for first, second in ((FIRST[0], SECOND[0]), (SECOND[0], FIRST[0])):
        client.post(PAGE, {"first": first, "second": second, "model": rows.model.pk})
    rows_made = list(Inference.objects.order_by("pk"))
    assert len(rows_made) == 2
    for row in rows_made:
        run_job(row.job)
        row.refresh_from_db()
    (one,), (other,) = (contrasts(row, 1, n=96) for row in rows_made)
    assert [hit.feature for hit in one.first] == [hit.feature for hit in other.second] != []
    assert [-hit.score for hit in one.first] == [hit.score for hit in other.second]


def test_the_page_shows_both_sides_and_its_address_says_all(
    rows: Rows, view: FeatureView, client_of: Any, run_job: Any
) -> None:
    other = second_sae(rows)
    client = client_of("researcher")
    row, url = compared(rows, client, run_job)
    assert url == f"{PAGE}?reading={row.pk}&first=2"
    page = client_of("viewer").get(url)
    assert [one.sae for one in page.context["contrasts"]] == [other, rows.sae]
    (best, *_), text = page.context["contrasts"][1].first, page.content.decode()
    Label.objects.name_feature(rows.sae, best.feature, "<i>capitals", rows.owner)
    text = client.get(url).content.decode()
    assert "More in the 2 first texts" in text and "More in the 3 texts they are held against" in text
    assert "&lt;i&gt;capitals" in text and "not harvested: ranked by difference" in text
    assert reverse("concepts:feature_detail", args=[rows.sae.pk, best.feature]) in text
    assert FIRST[1] in text and SECOND[2] in text, "what was typed stands in the form again"
    assert 'name="first"' not in client_of("viewer").get(url).content.decode().partition('id="found"')[0]
    client.post(PAGE, {"first": "\n".join(FIRST), "second": "\n".join(SECOND), "model": rows.model.pk})
    assert Inference.objects.count() == 1, "read once"
    by_effect = client.get(url + "&order=effect").context["contrasts"][1].first
    assert [abs(one.effect) for one in by_effect] == sorted((abs(one.effect) for one in by_effect), reverse=True)
    assert client.get(url + "&order=x&density=nan").status_code == 200


def test_while_it_is_read_and_when_it_was_not(rows: Rows, client_of: Any) -> None:
    client = client_of("researcher")
    url = client.post(PAGE, {"first": "a b", "second": "c d", "model": rows.model.pk}).url
    waiting = client.get(url, headers={"HX-Request": "true", "HX-Target": "found"}).content.decode()
    assert waiting.lstrip().startswith('<div id="found"') and "load delay:700ms" in waiting and "Waiting for" in waiting
    Inference.objects.get().job.cancel()
    assert "Press Compare to read them again." in client.get(url).content.decode()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"first": " \n "}, "Write at least one text."),
        ({"second": ""}, "Write at least one text to hold the others against."),
        ({"first": "x\n" * 40, "second": "y\n" * 30}, "At most 64 texts are read at once, and these are 70."),
        ({"first": "z" * 400_000}, "Shorten it, or read it as a batch of prompts."),
    ],
)
def test_what_cannot_be_compared_is_said(change: dict[str, str], said: str, rows: Rows, client_of: Any) -> None:
    answer = client_of("researcher").post(PAGE, {"first": "a", "second": "b", "model": rows.model.pk} | change)
    assert answer.status_code == 422 and said in answer.content.decode()
    assert not Inference.objects.exists()


def test_who_may_and_addresses_that_say_too_little(rows: Rows, client_of: Any) -> None:
    assert client_of("viewer").post(PAGE, {"first": "a", "second": "b"}).status_code == 403
    assert client_of("stranger").get(PAGE).status_code == 403
    client = client_of("researcher")
    assert "Every SAE of the model reads all texts" in client.get(PAGE).content.decode()
    url = client.post(PAGE, {"first": "a b", "second": "c d", "model": rows.model.pk}).url
    for wrong in ("first=0", "first=2", "first=x", ""):
        assert "does not say which of the texts" in client.get(url.replace("first=1", wrong)).content.decode()
    assert client.get(PAGE + "?reading=999&first=1").status_code == 200


def test_without_an_sae_the_page_says_what_is_needed(client_of: Any) -> None:
    assert "No SAE to read with yet" in client_of("researcher").get(PAGE).content.decode()
    assert client_of("researcher").post(PAGE, {"first": "a", "second": "b"}).status_code == 422


def test_by_api(rows: Rows, view: FeatureView, client_of: Any, run_job: Any, api: Any) -> None:
    row, _ = compared(rows, client_of("researcher"), run_job)
    found = good(api("viewer", "get", f"/infer/{row.pk}/contrast?first=2&top=5"))
    (one,), (expected,) = found["items"], contrasts(row, 2, n=5)
    assert one["first"] == [vars(hit) for hit in expected.first] and len(one["first"]) == 5
    assert one["second"] == [vars(hit) for hit in expected.second] != []
    problem(api("viewer", "get", f"/infer/{row.pk}/contrast?first=5"), 422, "5 texts were read")
    problem(api("viewer", "get", f"/infer/{row.pk}/contrast"), 422)
    Inference.objects.update(ready_at=None)
    problem(api("viewer", "get", f"/infer/{row.pk}/contrast?first=2"), 409)
