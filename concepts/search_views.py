"""The page that looks for features of all SAEs: by label, by a token they write, by where they point."""

from __future__ import annotations

from typing import Any

from django.core.paginator import Paginator
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render

from concepts.models import FeatureView
from concepts.search import SearchError, alike, alike_in, by_label, by_promoted, comparable
from saehub.accounts.access import needs
from saehub.typed import row_number, whole_number
from saes.models import SAE

PAGE = 25
WAYS = {
    "label": ("By label", "What people and files call them"),
    "raises": ("That raise a token", "Features whose direction adds most to a token's logit"),
    "lowers": ("That lower a token", "Features whose direction takes most from a token's logit"),
    "like": (
        "Like another feature",
        "Features by the cosine of their decoder directions: of the same SAE, or of others that write into its hook point",
    ),
}


@needs("concepts.view_featureview")
def feature_search(request: HttpRequest) -> HttpResponse:
    way = request.GET.get("by", "") if request.GET.get("by") in WAYS else "label"
    text = request.GET.get("q", "")[:200]
    saes = list(SAE.objects.filter(pk__in=FeatureView.objects.ready().values("sae")).order_by("-pk")[:400])
    sae = _sae(request)
    context: dict[str, Any] = {
        "section": "features", "ways": WAYS, "way": way, "about": WAYS[way][1], "q": text, "saes": saes, "sae": sae,
        "first": sae or next(iter(saes), None),
    }  # fmt: skip
    try:
        if text.strip() or way == "label":
            context |= _found(request, way, text, sae)
    except SearchError as error:
        context["fault"] = str(error)
    return render(request, "concepts/feature_search.html", context)


def _sae(request: HttpRequest) -> SAE | None:
    pk = row_number(request.GET.get("sae", ""))
    return SAE.objects.filter(pk=pk).first() if pk else None


def _found(request: HttpRequest, way: str, text: str, sae: SAE | None) -> dict[str, Any]:
    if way == "label":
        page: Any = Paginator(by_label(text, sae), PAGE).get_page(request.GET.get("page"))
        return {"labels": page}
    if way != "like":
        return {"found": by_promoted(text, [sae] if sae else None, lowered=way == "lowers")}
    name, _, index = text.strip().rpartition("/")
    chosen = _named(name) if name else sae
    if chosen is None:
        raise SearchError(
            f"There is no SAE {name[:60]} here." if name else "Choose the SAE, or write the feature as SAE/number."
        )
    feature = whole_number(index)
    if feature is None:
        raise SearchError("Write the feature's number, or SAE/number.")
    return _alike(request, chosen, feature)


def _alike(request: HttpRequest, sae: SAE, index: int) -> dict[str, Any]:
    """Where `?in=` says: the same SAE ("", also where it is unknown), one other, or all others."""
    others = comparable(sae)
    wanted = request.GET.get("in", "")
    among = [other for other in others if wanted in ("others", str(other.pk))]
    context: dict[str, Any] = {"sae": sae, "origin": index, "others": others, "among": wanted if among else ""}
    try:
        context["found"], context["left"] = alike_in(sae, index, among) if among else (alike(sae, index), [])
    except SearchError as error:
        context["fault"] = str(error)
    return context


def _named(name: str) -> SAE | None:
    return SAE.objects.filter(pk=row_number(name)).first() or SAE.objects.filter(name__iexact=name.strip()).first()
