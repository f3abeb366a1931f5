"""Which features fire on a text, over all SAEs of a model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from django.urls import reverse

from concepts.models import FeatureView
from inference.models import Inference
from inference.text_search import rankings
from saehub.jobs.models import State
from tests.inference.test_inference_own_text import dense
from tests.inference.test_inference_playground import second_sae
from tests.steering_rows import Rows

PAGE = "/features/text/"
TEXT = "Paris is the capital of France."


def searched(rows: Rows, client: Any, run_job: Any) -> tuple[Inference, str]:
    response = client.post(PAGE, {"text": TEXT, "model": rows.model.pk})
    row = Inference.objects.get()
    assert run_job(row.job).state == State.DONE, row.job.traceback
    row.refresh_from_db()
    return row, response.url


def test_all_saes_of_the_model_read_at_once(rows: Rows, view: FeatureView, client_of: Any, run_job: Any) -> None:
    other = second_sae(rows)
    client = client_of("researcher")
    row, url = searched(rows, client, run_job)
    assert [fact["sae"] for fact in row.facts] == [other.pk, rows.sae.pk]
    page = client.get(url)
    assert [ranking.sae for ranking in page.context["rankings"]] == [other, rows.sae]
    assert "not harvested: ranked by activation" in page.content.decode()
    assert reverse("concepts:feature_detail", args=[rows.sae.pk, page.context["rankings"][1].hits[0].feature]) in (
        page.content.decode()
    )
    client.post(PAGE, {"text": TEXT, "model": rows.model.pk})
    assert Inference.objects.count() == 1, "read once"


def test_rankings_are_those_of_the_dense_codes(rows: Rows, view: FeatureView, client_of: Any, run_job: Any) -> None:
    row, *_ = searched(rows, client_of("researcher"), run_job)
    _, codes = dense(rows)
    codes[0] = 0
    summary = view.opened().summary
    idf = np.log((view.n_tokens + 1) / (summary["n_fires"] + 1))
    expected = {
        "value": codes.max(0),
        "score": codes.max(0) * idf,
        "total": codes.sum(0),
        "share": np.divide(codes.max(0), summary["max"], out=np.zeros(96), where=summary["max"] > 0),
    }
    for order, strength in expected.items():
        (found,) = rankings(row, order=order, n=96)
        assert found.n_features == (codes.max(0) > 0).sum() == len(found.hits)
        np.testing.assert_allclose(
            [strength[hit.feature] for hit in found.hits], np.sort(strength[codes.max(0) > 0])[::-1], rtol=1e-4
        )
        for hit in found.hits:
            assert hit.value == pytest.approx(codes[hit.token, hit.feature], rel=1e-4)
            assert hit.n_fires == (codes[:, hit.feature] > 0).sum()
            assert hit.score == pytest.approx(hit.value * idf[hit.feature], rel=1e-4)
    (third,) = rankings(row, order="value", token=3, n=96)
    assert {hit.feature for hit in third.hits} == set(np.flatnonzero(codes[3]).tolist())
    (seldom,) = rankings(row, density_max=0.05, n=96)
    fired = set(np.flatnonzero(codes.max(0)).tolist())
    assert {hit.feature for hit in seldom.hits} == {i for i in fired if summary["density"][i] <= 0.05} != fired


def test_bad_questions_are_answered_or_left_out(rows: Rows, view: FeatureView, client_of: Any, run_job: Any) -> None:
    client = client_of("researcher")
    assert "Write the text to read." in client.post(PAGE, {"text": " "}).content.decode()
    assert client_of("viewer").post(PAGE, {"text": TEXT}).status_code == 403
    _, url = searched(rows, client, run_job)
    for query in ("&token=99999", "&token=x", "&density=nan", "&order=nonsense", "&model=99999999"):
        assert client.get(url + query).status_code == 200
    assert (
        "<script>" not in client.get(PAGE, {"text": "<script>alert(1)</script>"}).content.decode().partition("<main")[2]
    )
    assert client.get(PAGE, {"reading": "99999"}).status_code == 200


def test_without_an_sae_it_says_what_is_needed(client_of: Any) -> None:
    assert "No SAE to read with yet" in client_of("viewer").get(PAGE).content.decode()
    assert client_of("researcher").post(PAGE, {"text": TEXT}).status_code == 200
