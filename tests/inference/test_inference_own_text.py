"""A feature on a text of one's own: read once, shown for every feature, linked by the text itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from django.urls import reverse

from concepts.models import FeatureView
from inference.models import Inference
from saehub.jobs.models import State
from saes.numerics.formats import load_sae
from saes.numerics.lm import load_lm
from tests.steering_rows import DEAD, Rows
from tests.tiny_models import RESID

TEXT = "Paris is the capital of France."
HTMX = {"HX-Request": "true", "HX-Target": "own-reading"}


def panel(rows: Rows, index: int, query: str = "") -> str:
    return reverse("inference:feature_text", args=[rows.sae.pk, index]) + query


def read(rows: Rows, client: Any, run_job: Any, text: str = TEXT, index: int = 3) -> Any:
    response = client.post(panel(rows, index), {"text": text})
    row = Inference.objects.get(prompt=text)
    assert run_job(row.job).state == State.DONE, row.job.traceback
    return response


def dense(rows: Rows, text: str = TEXT) -> tuple[list[int], np.ndarray]:
    """Ids with BOS and codes (t, d_sae), by the model and the SAE themselves."""
    lm, sae = load_lm(rows.model.location), load_sae(rows.sae.files)
    ids = [lm.tokenizer.bos_token_id, *lm.tokenizer(text, add_special_tokens=False)["input_ids"]]
    with torch.inference_mode():
        return ids, sae.encode(lm.activations(torch.tensor([ids]), [RESID])[RESID][0]).numpy()


def test_the_values_are_those_of_the_sae_with_the_policy_of_the_harvest(
    rows: Rows, view: FeatureView, client_of: Any, run_job: Any
) -> None:
    client = client_of("researcher")
    response = read(rows, client, run_job)
    assert response.status_code == 302 and "text=Paris+is+the" in response.url
    ids, codes = dense(rows)
    codes[0] = 0  # BOS is not counted, as in the view
    for index in range(96):
        shown = client.get(panel(rows, index), {"text": TEXT}).context
        np.testing.assert_allclose(shown["values"], codes[:, index], rtol=1e-4, atol=1e-5)
        assert shown["n_fires"] == (codes[:, index] > 0).sum() and shown["n_counted"] == len(ids) - 1
    strongest = int(codes.max(0).argmax())
    page = client.get(panel(rows, strongest), {"text": TEXT})
    assert page.context["peak"] == codes[:, strongest].argmax()
    known = view.opened().feature(strongest).maximum
    assert page.context["share"] == pytest.approx(codes[:, strongest].max() / known, rel=1e-4)
    assert "does not fire on any" in client.get(panel(rows, DEAD), {"text": TEXT}).content.decode()


def test_a_text_is_read_once_for_every_feature_and_everybody(rows: Rows, client_of: Any, run_job: Any) -> None:
    read(rows, client_of("researcher"), run_job)
    for role, index in (("researcher", 3), ("curator", 40)):
        assert client_of(role).post(panel(rows, index), {"text": TEXT}).status_code == 302
    assert Inference.objects.count() == 1
    page = client_of("viewer").get(panel(rows, 40), {"text": TEXT}).content.decode()
    assert "fire" in page and "<textarea" not in page
    rows.sae.sha256 = "f" * 64
    rows.sae.save()
    page = client_of("viewer").get(panel(rows, 40), {"text": TEXT}).content.decode()
    assert "Nobody has read this text here yet" in page, "other weights, another reading"


def test_opening_a_link_starts_nothing_and_the_panel_asks_by_post(rows: Rows, client_of: Any) -> None:
    client = client_of("researcher")
    page = client.get(panel(rows, 3), {"text": TEXT}, headers=HTMX).content.decode()
    assert page.strip().startswith('<div id="own-reading"') and 'hx-trigger="load, submit"' in page
    assert not Inference.objects.exists()
    assert client_of("viewer").post(panel(rows, 3), {"text": TEXT}).status_code == 403
    started = client.post(
        panel(rows, 3), {"text": TEXT}, headers=HTMX | {"HX-Current-URL": "http://testserver/saes/1/features/3/?scale=snippet"}
    )  # fmt: skip
    assert started["HX-Redirect"] == "/saes/1/features/3/?scale=snippet&text=Paris+is+the+capital+of+France."
    started = client.post(
        panel(rows, 3), {"text": TEXT}, headers=HTMX | {"HX-Current-URL": f"http://testserver{started['HX-Redirect']}"}
    )
    assert "Waiting for the worker" in started.content.decode() and "load delay:700ms" in started.content.decode()


def test_a_reading_that_failed_says_why_and_is_not_begun_again_by_itself(rows: Rows, client_of: Any) -> None:
    client = client_of("researcher")
    client.post(panel(rows, 3), {"text": TEXT})
    job = Inference.objects.get().job
    type(job).objects.filter(pk=job.pk).update(state=State.FAILED, error="The model is gone.")
    page = client.get(panel(rows, 3), {"text": TEXT}, headers=HTMX).content.decode()
    assert "The model is gone." in page and "hx-trigger" not in page
    client.post(panel(rows, 3), {"text": TEXT})
    assert Inference.objects.count() == 2


@pytest.mark.parametrize("text", ["", "   ", "x" * 10**6])
def test_a_text_that_cannot_be_read_is_one_sentence(rows: Rows, client_of: Any, text: str) -> None:
    response = client_of("researcher").post(panel(rows, 3), {"text": text}, headers=HTMX)
    assert response.status_code == 422 and not Inference.objects.exists()
    page = response.content.decode()
    assert ("Write the text to read." if len(text) < 9 else "1,000,000 characters") in page


def test_a_long_text_is_linked_by_its_number(rows: Rows, client_of: Any) -> None:
    rows.model.context_length = 4096
    rows.model.save()
    text = "word " * 600
    response = client_of("researcher").post(panel(rows, 3), {"text": text})
    row = Inference.objects.get()
    assert response.url.endswith(f"?reading={row.pk}")
    page = client_of("viewer").get(response.url)
    assert page.context["row"] == row


@pytest.mark.parametrize(
    "text", ["<script>alert(1)</script> & more", "مرحبا بالعالم", "你好，世界", "👩‍👩‍👧 emoji 😀", "a\u202eb\0c"]
)
def test_hostile_texts_are_shown_as_text(rows: Rows, client_of: Any, run_job: Any, text: str) -> None:
    client = client_of("researcher")
    client.post(panel(rows, 3), {"text": text})
    row = Inference.objects.get()
    assert row.prompt == text.replace("\0", "")
    assert run_job(row.job).state == State.DONE, row.job.traceback
    page = client.get(panel(rows, 3), {"text": text}).content.decode()
    assert "<script>alert" not in page and "fire" in page
    feature = client.get(reverse("concepts:feature_detail", args=[rows.sae.pk, 3]), {"text": text}).content.decode()
    assert "<script>alert" not in feature


def test_the_page_of_a_feature_carries_the_text_along(rows: Rows, view: FeatureView, client_of: Any) -> None:
    page = client_of("researcher").get(reverse("concepts:feature_detail", args=[rows.sae.pk, 3]), {"text": TEXT})
    assert page.context["step"]["next"].endswith("/4/?text=Paris+is+the+capital+of+France.")
    assert f"{TEXT}</textarea>" in page.content.decode()
    assert client_of("viewer").get(panel(rows, 96)).status_code == 404
