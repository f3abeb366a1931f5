"""Numbers in addresses: whatever is written there, a page answers."""

from __future__ import annotations

from typing import Any

import pytest
from django.urls import reverse

from saehub.typed import row_number, whole_number
from tests.sae_rows import a_trained_sae

ENDLESS = "9" * 5000  # int() refuses so many digits


@pytest.mark.parametrize(
    ("text", "number"),
    [("7", 7), (" 12 ", 12), (3, 3), ("0", 0), ("-1", None), ("1.0", None), ("", None), (None, None), ("²", None), (ENDLESS, None)],
)  # fmt: skip
def test_a_number_as_typed(text: object, number: int | None) -> None:
    assert whole_number(text) == number and row_number(text) == (number or 0)


@pytest.mark.django_db
def test_a_number_without_an_end_is_none(client_of: Any) -> None:
    client, sae = client_of("researcher"), a_trained_sae()
    for page, names in (
        (reverse("training:capture_create"), ["model", "corpus"]),
        (reverse("training:run_create"), ["like", "capture", "sae"]),
        (reverse("inference:promptbatch_create"), ["corpus", "sae"]),
        (reverse("inference:generation_create"), ["sae", "feature"]),
        (reverse("saes:sae_detail", args=[sae.pk]), ["evaluation"]),
        (reverse("search"), ["q"]),
    ):
        for name in names:
            assert client.get(page, {name: ENDLESS}).status_code == 200, (page, name)
