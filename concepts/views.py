"""Pages of features: all of an SAE's, and one. Served from a view's columns by numpy alone."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from django.contrib import messages
from django.core.paginator import Paginator
from django.http import Http404, HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.urls import reverse
from django.utils.http import urlencode

from concepts import featurefile
from concepts.concept_forms import LabelForm
from concepts.forms import FeatureFilterForm, HarvestForm
from concepts.models import Concept, FeatureView, Label, name_of
from concepts.snippets import CONTEXTS, SCALES, Snippet, as_python, snippet
from saehub.accounts.access import check, needs
from saehub.charts import Chart, density_histogram, histogram
from saehub.fragments import part
from saes.listing import Column, Header
from saes.models import SAE

LIST_TOKENS = 6
SHOWN_TOP = 8
SHOWN_SAMPLES = 2
SHOWN_CONCEPTS = 20
COLUMNS = (
    Column("feature", "Feature", "feature"),
    Column("label", "Label"),
    Column("tokens", "Top tokens"),
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
    views = _views(sae)
    view = _chosen(request, sae, views)
    columns, fault = _opened(view)
    context = {"section": "saes", "sae": sae, "views": views, "view": view, "fault": fault, "harvest": harvest}
    if columns is not None:
        context |= _listing(request, sae, columns)
    fragment = part(request, "rows" if columns is not None and request.htmx.target == "rows" else "live")
    if columns is not None and fragment != "#rows":
        context["densities"] = _densities(columns)
    return render(request, f"concepts/feature_list.html{fragment}", context, status=422 if harvest.errors else 200)


def _views(sae: SAE) -> list[FeatureView]:
    return list(sae.views.select_related("capture__model", "job__owner", "sae__model"))


def _chosen(request: HttpRequest, sae: SAE, views: list[FeatureView]) -> FeatureView | None:
    """The view named in the URL, else the newest that can be looked at, else the newest."""
    wanted = request.GET.get("view", "")
    if wanted:
        found = next((view for view in views if str(view.pk) == wanted), None)
        if found is None:
            raise Http404(f"{sae.name} has no feature view {wanted[:40]}.")
        return found
    return next((view for view in views if view.ready), views[0] if views else None)


def _opened(view: FeatureView | None) -> tuple[featurefile.FeatureView | None, str]:
    """The columns of a finished view, or the sentence that says why they cannot be read."""
    if view is None or not view.ready:
        return None, ""
    try:
        return view.opened(), ""
    except featurefile.ViewError as error:
        return None, str(error)


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
    if not (text.isdecimal() and len(text) < 12):
        raise Http404(_no_feature(sae, text[:40]))
    return redirect(_feature_url(sae, int(text), _kept(request)))


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
    form = FeatureFilterForm(request.GET)
    form.is_valid()
    key, descending = form.order
    order = columns.sorted(key, descending, form.filters() | _by_label(sae, form, columns.n_features))
    page: Any = Paginator(order, form.page_size).get_page(request.GET.get("page"))
    keep = _kept(request)
    labels = Label.objects.accepted_of(sae, page.object_list)
    page.object_list = [
        _row(columns, int(i), _feature_url(sae, int(i), keep), labels.get(int(i))) for i in page.object_list
    ]
    return {"filters": form, "page": page, "headers": _headers(key, descending), "n_features": columns.n_features}


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


# ------------------------------------------------------------------------------------------------------- one feature


@needs("concepts.view_featureview")
def feature_detail(request: HttpRequest, pk: int, index: int) -> HttpResponse:
    sae = get_object_or_404(SAE.objects.select_related("model", "run__capture"), pk=pk)
    if index >= sae.n_features:
        raise Http404(_no_feature(sae, index))
    views = _views(sae)
    view = _chosen(request, sae, views)
    columns, fault = _opened(view)
    if view is None or columns is None:
        messages.info(request, fault or f"The features of {sae.name} have not been harvested yet.")
        return redirect("concepts:feature_list", sae.pk)
    record = columns.feature(index)
    labels = list(Label.objects.filter(sae=sae, feature=index).select_related("owner"))
    if request.GET.get("format") == "json":
        return JsonResponse(_as_json(sae, view, columns, record) | {"labels": [_label(label) for label in labels]})
    others = Label.objects.accepted_of(sae, (other.feature for other in record.neighbours))
    around, scale = _choice(request, "around", CONTEXTS), _choice(request, "scale", SCALES)
    context = {
        "section": "saes",
        "sae": sae,
        "views": views,
        "view": view,
        "lens": columns.logit_lens,
        "feature": record,
        "name": name_of(columns, index),
        "labels": labels,
        "accepted": next((label for label in labels if label.accepted), None),
        "label_form": LabelForm(auto_id="label_%s"),
        "in_concepts": Concept.objects.filter(dictionary__sae=sae, members__feature=index).select_related("dictionary")[
            :SHOWN_CONCEPTS
        ],
        "around": around,
        "contexts": CONTEXTS,
        "scale": scale,
        "scales": SCALES,
        "kept": _kept(request),
        "steer_value": f"{record.maximum:.4g}" if record.n_fires else "",
        "groups": _groups(record, around, scale),
        "fires": _fires(record),
        "neighbours": [
            (other, others.get(other.feature), name_of(columns, other.feature)) for other in record.neighbours
        ],
        "step": _steps(sae, columns, index, _kept(request)),
        "python": as_python(sae, view, record),
    }
    return render(request, "concepts/feature_detail.html", context)


def _fires(record: featurefile.FeatureRecord) -> Chart | None:
    if not record.n_fires:
        return None
    found, n = record.histogram, f"{record.n_fires:,} tokens"
    return histogram(
        found.counts, found.edges, title="Activations", x_title="activation", n=n, log_y=True, size=(340, 190)
    )


@dataclass(frozen=True)
class Group:
    """Examples under one heading: the first few, and the rest under a fold."""

    interval: featurefile.Interval | None  # None: the top contexts
    shown: list[Snippet]
    folded: list[Snippet]

    @property
    def n(self) -> int:
        return len(self.shown) + len(self.folded)


def _groups(record: featurefile.FeatureRecord, around: str, scale: str) -> list[Group]:
    def group(examples: list[featurefile.Example], interval: featurefile.Interval | None, n: int) -> Group:
        made = [snippet(example, around, record.maximum if scale == "feature" else None) for example in examples]
        return Group(interval, made[:n], made[n:])

    intervals = [group(i.examples, i, SHOWN_SAMPLES) for i in record.intervals]
    return [group(record.top, None, SHOWN_TOP), *intervals] if record.top else []


def _choice(request: HttpRequest, name: str, choices: Collection[str]) -> str:
    """A parameter of the URL that is one of `choices`, else the default: the first."""
    value = request.GET.get(name, "")
    return value if value in choices else next(iter(choices))


def _steps(sae: SAE, columns: featurefile.FeatureView, index: int, keep: dict[str, str]) -> dict[str, str]:
    """Where previous, next and random lead. Random is a feature that fires, so that there is something to see."""
    alive = np.flatnonzero(columns.summary["n_fires"])
    where = {"previous": index - 1, "next": index + 1}
    if len(alive):
        where["random"] = int(alive[random.randrange(len(alive))])
    return {name: _feature_url(sae, i, keep) for name, i in where.items() if 0 <= i < sae.n_features}


def _kept(request: HttpRequest) -> dict[str, str]:
    """What goes along from feature to feature: which view, and how examples are shown."""
    return {name: request.GET[name] for name in ("view", "around", "scale") if request.GET.get(name)}


def _feature_url(sae: SAE, index: int, parameters: dict[str, str]) -> str:
    url = reverse("concepts:feature_detail", args=[sae.pk, index])
    return f"{url}?{urlencode(parameters)}" if parameters else url


def _no_feature(sae: SAE, index: Any) -> str:
    return f"There is no feature {index}; {sae.name} has features 0 to {sae.n_features - 1:,}."


def _label(label: Label) -> dict[str, Any]:
    return {
        "text": label.text, "accepted": label.accepted, "source": label.source, "by": label.by, "method": label.method,
        "owner": label.owner.username if label.owner else None, "score": label.score, "confidence": label.confidence,
    }  # fmt: skip


def _as_json(
    sae: SAE, view: FeatureView, columns: featurefile.FeatureView, record: featurefile.FeatureRecord
) -> dict[str, Any]:
    alive = record.n_fires > 0
    return {
        "sae": sae.pk,
        "view": view.pk,
        "feature": record.feature,
        "name": name_of(columns, record.feature),
        "n_tokens": record.n_tokens,
        "n_fires": record.n_fires,
        "density": record.density,
        "maximum": record.maximum if alive else None,
        "mean": record.mean if alive else None,
        "decoder_norm": record.decoder_norm,
        "layer_norm": view.layer_norm,
        "top_tokens": [{"id": t.id, "text": t.text, "count": t.count, "sum": t.total} for t in record.top_tokens],
        "raised": [{"id": t.id, "text": t.text, "value": t.value} for t in record.raised],
        "lowered": [{"id": t.id, "text": t.text, "value": t.value} for t in record.lowered],
        "neighbours": [{"feature": n.feature, "cosine": n.cosine} for n in record.neighbours],
    }
