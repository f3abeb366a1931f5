"""The page of all features of an SAE, served from a view's columns by numpy alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from django.contrib import messages
from django.core.paginator import Paginator
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseBase
from django.shortcuts import get_object_or_404, redirect, render

from concepts import exports, featurefile
from concepts.chosen import chosen_view, columns_of, feature_url, kept, no_feature, views_of
from concepts.forms import FeatureFilterForm, HarvestForm
from concepts.models import Label, name_of
from saehub.accounts.access import check, needs
from saehub.charts import Chart, density_histogram
from saehub.fragments import part
from saehub.streaming import attachment
from saehub.typed import whole_number
from saes.listing import Column, Header
from saes.models import SAE

LIST_TOKENS = 6
COLUMNS = (
    Column("feature", "Feature", "feature"),
    Column("label", "Label", "label"),
    Column("token", "Top tokens", "token"),
    Column("density", "Density", "density", figures=True),
    Column("max", "Maximum", "max", figures=True),
    Column("mean", "Mean active", "mean", figures=True),
    Column("n_fires", "Fires", "n_fires", figures=True),
    Column("n_contexts", "Contexts", "n_contexts", figures=True),
)


# ------------------------------------------------------------------------------------------------------- all features


@needs("concepts.view_featureview", post="concepts.add_featureview")
def feature_list(request: HttpRequest, pk: int) -> HttpResponse:
    sae = get_object_or_404(SAE.objects.select_related("model", "run__capture"), pk=pk)
    if request.method == "POST":
        return _harvest(request, sae)
    if request.GET.get("feature"):
        return _jump(request, sae)
    return _list_page(request, sae, HarvestForm(sae))


def _list_page(request: Any, sae: SAE, harvest: HarvestForm) -> HttpResponse:
    views = views_of(sae)
    view = chosen_view(request, sae, views)
    columns, fault = columns_of(view)
    context = {"section": "saes", "sae": sae, "views": views, "view": view, "fault": fault, "harvest": harvest}
    if columns is not None:
        context |= _listing(request, sae, columns)
    fragment = part(request, "rows" if columns is not None and request.htmx.target == "rows" else "live")
    if columns is not None and fragment != "#rows":
        context["densities"] = _densities(columns)
    return render(request, f"concepts/feature_list.html{fragment}", context, status=422 if harvest.errors else 200)


def _harvest(request: HttpRequest, sae: SAE) -> HttpResponse:
    form = HarvestForm(sae, request.POST)
    if not form.is_valid():
        return _list_page(request, sae, form)
    view = form.view(request.user)
    check(request.user, "concepts.add_featureview", view)
    if view.job is not None and view.job.is_live:
        messages.info(request, "These features are being harvested already.")
    else:
        view.start(request.user)
    return redirect(f"{view.get_absolute_url()}?view={view.pk}")


def _jump(request: HttpRequest, sae: SAE) -> HttpResponse:
    """The jump-to form: any index, answered by that feature's page or the 404 that names the range."""
    text = request.GET["feature"].strip().replace(",", "")
    feature = whole_number(text)
    if feature is None:
        raise Http404(no_feature(sae, text[:40]))
    return redirect(feature_url(sae, feature, kept(request)))


@needs("concepts.view_featureview")
def feature_export(request: HttpRequest, pk: int) -> HttpResponseBase:
    """Features of a view as a file: those of `?feature=` (several), else those that the filters of the list leave."""
    sae = get_object_or_404(SAE.objects.select_related("model", "run__capture"), pk=pk)
    form = request.GET.get("format", "top_texts")
    if form not in exports.FORMATS:
        raise Http404(f"There is no format {form[:40]}; choose one of {', '.join(exports.FORMATS)}.")
    view = chosen_view(request, sae, views_of(sae))
    columns, fault = columns_of(view)
    if view is None or columns is None:
        raise Http404(fault or f"{sae.name} has no harvested features yet.")
    chosen = asked_features(request, sae, columns)
    kind = exports.FORMATS[form]
    if refused := kind.too_many(len(chosen)):
        raise Http404(refused)
    name = f"features-of-sae-{sae.pk}-view-{view.pk}{f'-{chosen[0]}' if len(chosen) == 1 else ''}-{form}.{kind.suffix}"
    return attachment(request, kind.write(view, columns, chosen), name=name, kind=kind.content_type)


def asked_features(request: HttpRequest, sae: SAE, columns: featurefile.FeatureView) -> list[int]:
    """Those of `?feature=` (several), else those that the filters of the list leave, in its order."""
    given = {text: whole_number(text) for text in request.GET.getlist("feature")}
    chosen = {number for number in given.values() if number is not None and number < columns.n_features}
    if wrong := [text for text, number in given.items() if number not in chosen]:
        raise Http404(no_feature(sae, wrong[0][:40]))
    if chosen:
        return sorted(chosen)
    found: list[int] = _ordered(request, sae, columns)[1].tolist()
    return found


# ---------------------------------------------------------------------------------------------------- the table


def _densities(columns: featurefile.FeatureView) -> Chart:
    found = columns.density_histogram()
    n = f"{columns.n_features:,} features over {found.n_tokens:,} tokens"
    return density_histogram(found.counts, found.edges, found.dead, n=n, size=(760, 170))


@dataclass(frozen=True)
class Row:
    """A feature as the table shows it."""

    feature: int
    url: str
    label: str | None  # the accepted one
    tokens: list[str]
    figures: dict[str, Any]


def _listing(request: HttpRequest, sae: SAE, columns: featurefile.FeatureView) -> dict[str, Any]:
    form, order = _ordered(request, sae, columns)
    key, descending = form.order
    page: Any = Paginator(order, form.page_size).get_page(request.GET.get("page"))
    keep = kept(request)
    labels = Label.objects.accepted_of(sae, page.object_list)
    page.object_list = [
        _row(columns, int(i), feature_url(sae, int(i), keep), labels.get(int(i))) for i in page.object_list
    ]
    return {
        "filters": form,
        "page": page,
        "headers": _headers(key, descending),
        "n_features": columns.n_features,
        "partial": columns.facts.get("partial", False),
        "n_tokens_whole": columns.facts.get("n_tokens_whole"),
        "formats": exports.FORMATS,
        "has_logits": bool(columns.logit_lens and columns.logit_lens["logits"]),
    }


def _ordered(request: HttpRequest, sae: SAE, columns: featurefile.FeatureView) -> tuple[FeatureFilterForm, np.ndarray]:
    """The filters of the URL, and the features they leave in the order of the URL."""
    form = FeatureFilterForm(request.GET)
    form.is_valid()
    return form, chosen_features(sae, columns, form)


def chosen_features(sae: SAE, columns: featurefile.FeatureView, form: FeatureFilterForm) -> np.ndarray:
    """Numbers of the features that a checked form asks for, in its order."""
    filters = form.filters() | _by_label(sae, form, columns.n_features)
    if not (columns.logit_lens and columns.logit_lens["logits"]):
        filters.pop("raises", None)
    by = _label_order(sae, columns.n_features) if form.order[0] == "label" else None
    return columns.sorted(*form.order, filters, by=by)


def _label_order(sae: SAE, n: int) -> np.ndarray:
    """Place of every feature's accepted label by its letters (n,), NaN for one without."""
    rows = Label.objects.filter(sae=sae, accepted=True, feature__lt=n).values_list("text", "feature")
    named = [feature for _, feature in sorted((text.casefold(), feature) for text, feature in rows)]
    order = np.full(n, np.nan)
    order[named] = np.arange(len(named))
    return order


def _by_label(sae: SAE, form: FeatureFilterForm, n: int) -> dict[str, Any]:
    """The filter of the list that labels make: any label holds the words; one is accepted, or none is."""
    words, named = form.cleaned_data.get("label", ""), form.cleaned_data.get("named", "")
    if not words and not named:
        return {}
    chosen = np.ones(n, dtype=bool)
    for rows, wanted in (
        (Label.objects.filter(text__icontains=words) if words else None, True),
        (Label.objects.filter(accepted=True) if named else None, named == "named"),
    ):
        if rows is not None:
            marked = np.zeros(n, dtype=bool)
            marked[list(rows.filter(sae=sae, feature__lt=n).values_list("feature", flat=True))] = True
            chosen &= marked == wanted
    return {"chosen": chosen}


def _row(columns: featurefile.FeatureView, i: int, url: str, label: str | None) -> Row:
    figures = {key: columns.summary[key][i].item() for key in featurefile.SORT_KEYS}
    return Row(i, url, label, name_of(columns, i, LIST_TOKENS), figures)


def _headers(key: str, descending: bool) -> list[Header]:
    headers = []
    for column in COLUMNS:
        mine = column.key == key
        link = (column.key if descending else f"-{column.key}") if mine else column.first
        order = ("descending" if descending else "ascending") if mine else "none"
        headers.append(Header(column, link if column.by else "", order))
    return headers
