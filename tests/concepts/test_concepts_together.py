"""Features that fire together, on the page of a feature, in its JSON and in the API."""

from __future__ import annotations

from typing import Any

from django.urls import reverse

from concepts.models import FeatureView, Label
from tests.api_calls import good
from tests.steering_rows import DEAD, Rows


def test_what_fires_together_is_on_the_page(rows: Rows, view: FeatureView, client_of: Any, api: Any) -> None:
    columns = view.opened()
    feature = next(i for i in range(96) if len(columns.companions(i)) > 1)
    first, second, *_ = columns.companions(feature)
    Label.objects.name_feature(rows.sae, first.feature, "<b>cities", rows.owner)
    url = reverse("concepts:feature_detail", args=[rows.sae.pk, feature])
    page = client_of("viewer").get(url).content.decode()
    panel = page.partition('id="together"')[2].partition("</section>")[0]
    assert f"over {view.n_tokens:,} evenly spaced tokens" in panel and "&lt;b&gt;cities" in panel
    for one in (first, second):
        assert reverse("concepts:feature_detail", args=[rows.sae.pk, one.feature]) in panel
    found = client_of("viewer").get(url, {"format": "json"}).json()
    assert found["together"][0] == vars(first) and found["n_together"] == view.n_tokens
    asked = good(api("viewer", "get", f"/saes/{rows.sae.pk}/features/{feature}"))
    assert asked["together"] == [vars(one) for one in columns.companions(feature)]
    dead = client_of("viewer").get(reverse("concepts:feature_detail", args=[rows.sae.pk, DEAD])).content.decode()
    assert 'id="together"' not in dead
