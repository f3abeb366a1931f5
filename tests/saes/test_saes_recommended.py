"""Which SAE to use at each place of a model: pinned by a curator, else chosen by a rule that is said."""

from __future__ import annotations

from typing import Any

import pytest
from django.urls import reverse
from django.utils import timezone

from saes.models import SAE
from saes.recommended import recommended, recommended_beside
from tests.sae_rows import a_catalogue_row

pytestmark = pytest.mark.django_db


def a_row(name: str, **fields: Any) -> SAE:
    given = {"model_name": "m", "site": "resid_post", "layer": 3, "d_sae": 16_384, "architecture": "jumprelu"}
    return a_catalogue_row(name, **given | fields)


def names(*given: Any, **more: Any) -> list[str]:
    return [one.sae.name for one in recommended(*given, **more)]


def test_the_rule_takes_the_width_and_then_the_l0() -> None:
    a_row("wide", d_sae=65_536, published_l0=100.0)
    far = a_row("far", published_l0=300.0)
    near = a_row("near", published_l0=80.0)
    a_row("unknown")
    assert names("m") == ["near"]
    found = recommended("m")[0]
    assert (found.of, found.pinned) == (4, False)
    assert (
        found.why
        == "16,384 features are nearest 16,384; of the 2 with that width its L0, 80.0 as published, is nearest 100."
    )
    near.l0 = 2000.0
    near.save()
    assert names("m") == ["far"], "what was measured here counts before what was published"
    far.curation = "deprecated"
    far.save()
    assert names("m") == ["near"]


def test_ratios_are_compared_and_zero_is_not_known() -> None:
    a_row("half", published_l0=50.0)
    a_row("more", published_l0=180.0)
    a_row("zero", published_l0=0.0)
    assert names("m") == ["more"], "180 is 1.8 times 100, 50 is 2 times less"


def test_of_two_that_are_as_good_the_one_that_is_here() -> None:
    a_row("there", published_l0=100.0)
    a_row("here", published_l0=100.0, ready_at=timezone.now(), path="/somewhere")
    assert names("m") == ["here"]


def test_places_stand_apart_and_in_order() -> None:
    a_row("t", site="transcoder", published_l0=10.0)
    a_row("b", layer=10, published_l0=10.0)
    a_row("a", layer=2, published_l0=10.0)
    a_row("gone", layer=4, gone_at=timezone.now())
    a_row("other", model_name="n")
    assert names("m") == ["a", "b", "t"] and names("m", "resid_post", 10) == ["b"] and names("nothing") == []
    assert recommended("m")[0].why == "It is the only one here."


def test_a_curators_pin_goes_before_the_rule(client_of: Any) -> None:
    rule, pinned = a_row("rule", published_l0=100.0), a_row("pinned", d_sae=1024)
    url = reverse("saes:sae_curate", args=[pinned.pk])
    assert client_of("researcher").post(url, {"pin": "mine"}).status_code == 403
    client_of("curator").post(url, {"pin": "least dead features"})
    found = recommended_beside(rule)
    assert found is not None and found.sae == pinned and found.why == "Pinned by a curator: least dead features"
    page = client_of("viewer").get(rule.get_absolute_url()).content.decode()
    assert 'id="beside"' in page and pinned.get_absolute_url() in page and "least dead features" in page
    assert (
        "Recommended: least dead features"
        in client_of("viewer").get(f"{pinned.get_absolute_url()}?tab=history").content.decode()
    )
    client_of("curator").post(url, {"pin": ""})
    assert names("m") == ["rule"]
    lone = a_row("lone", layer=9)
    assert (
        recommended_beside(lone) is None
        and 'id="beside"' not in client_of("viewer").get(lone.get_absolute_url()).content.decode()
    )


@pytest.mark.parametrize("n", [1, 3])
def test_the_page_asks_the_same_few_questions(n: int, client_of: Any, django_assert_num_queries: Any) -> None:
    for i in range(n):
        a_row(f"s{i}", layer=i, published_l0=90.0)
    client = client_of("researcher")
    with django_assert_num_queries(7):
        page = client.get(reverse("saes:sae_recommended"), {"model": "m"}).content.decode()
    assert page.count('<th scope="row"') == n and 'value="fetch"' in page
    assert "No SAE of strange" in client.get(reverse("saes:sae_recommended"), {"model": "strange"}).content.decode()


def test_the_api_does_the_same(api: Any) -> None:
    row = a_row("one", published_l0=90.0)
    found = api("viewer", "get", "/saes/recommended?model=m&layer=3").json()["items"]
    assert [(one["sae"]["id"], one["sae"]["l0"], one["pinned"]) for one in found] == [(row.pk, 90.0, False)]
    assert api("curator", "patch", f"/saes/{row.pk}", {"pin": "best"}).json()["pin"] == "best"
    assert api("viewer", "get", "/saes/recommended?model=m").json()["items"][0]["why"] == "Pinned by a curator: best"
    assert api("viewer", "get", "/saes/recommended").status_code == 422
