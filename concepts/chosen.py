"""Which view of an SAE a page of features looks at, and the addresses of features that keep what was chosen."""

from __future__ import annotations

from typing import Any

from django.http import Http404, HttpRequest
from django.urls import reverse
from django.utils.http import urlencode

from concepts import featurefile
from concepts.models import FeatureView
from saes.models import SAE

KEPT = ("view", "around", "scale", "lines", "logits", "text", "reading")
LONGEST_KEPT = 2000  # characters of a text that a link carries


def views_of(sae: SAE) -> list[FeatureView]:
    """The largest first: what is shown where nobody has chosen."""
    return list(sae.views.largest_first().select_related("capture__model", "job__owner", "sae__model"))


def chosen_view(request: HttpRequest, sae: SAE, views: list[FeatureView]) -> FeatureView | None:
    """The view named in the URL, else the largest that can be looked at, else the newest."""
    wanted = request.GET.get("view", "")
    if wanted:
        found = next((view for view in views if str(view.pk) == wanted), None)
        if found is None:
            raise Http404(f"{sae.name} has no feature view {wanted[:40]}.")
        return found
    return next((view for view in views if view.ready), views[0] if views else None)


def columns_of(view: FeatureView | None) -> tuple[featurefile.FeatureView | None, str]:
    """The columns of a finished view, or the sentence that says why they cannot be read."""
    if view is None or not view.ready:
        return None, ""
    try:
        return view.opened(), ""
    except featurefile.ViewError as error:
        return None, str(error)


def kept(request: HttpRequest) -> dict[str, str]:
    """What goes along from feature to feature: which view, how examples are shown, and the text that is tried."""
    return {name: value for name in KEPT if (value := request.GET.get(name)) and len(value) <= LONGEST_KEPT}


def feature_url(sae: SAE, index: int, parameters: dict[str, str]) -> str:
    url = reverse("concepts:feature_detail", args=[sae.pk, index])
    return f"{url}?{urlencode(parameters)}" if parameters else url


def no_feature(sae: SAE, index: Any) -> str:
    """The sentence that names the range."""
    return f"There is no feature {index}; {sae.name} has features 0 to {sae.n_features - 1:,}."
