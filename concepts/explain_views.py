"""Pages of features that a language model names: what to ask it for, and what it said."""

from __future__ import annotations

from typing import Any

from django.core.paginator import Paginator
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseBase
from django.shortcuts import get_object_or_404, redirect, render

from concepts.chosen import chosen_view, columns_of, views_of
from concepts.explain_forms import ExplainForm
from concepts.explanations import MOST_FEATURES, Explanation, as_ranges
from concepts.numerics.explain_prompts import DEFINITIONS
from concepts.views import asked_features
from saehub.accounts.access import needs
from saehub.fragments import part
from saehub.streaming import json_file
from saes.models import SAE

PAGE = 50
ORDERS = {"feature": "by feature", "score": "by score"}
EARLIER = 10


@needs("concepts.add_explanation")
def explanation_create(request: HttpRequest, pk: int) -> HttpResponse:
    """For the features of `?feature=` (several), else those that the filters of the list leave, the first MOST_FEATURES."""
    sae = get_object_or_404(SAE.objects.select_related("model", "run__capture"), pk=pk)
    view = chosen_view(request, sae, views_of(sae))
    columns, fault = columns_of(view)
    context: dict[str, Any] = {"section": "saes", "sae": sae, "view": view, "fault": fault}
    if view is None or columns is None:
        return render(request, "concepts/explanation_create.html", context)
    if request.method == "POST":
        form = ExplainForm(view, request.POST)
        if form.is_valid():
            return redirect(form.begin(request.user))
    elif "features" in request.GET:  # the estimate looks at what is typed
        form = ExplainForm(view, request.GET)
        form.is_valid()
    else:
        chosen = asked_features(request, sae, columns)
        context["left_out"] = max(0, len(chosen) - MOST_FEATURES)
        form = ExplainForm(view, initial={"features": as_ranges(chosen[:MOST_FEATURES])})
    wrong = request.method == "POST" and form.errors
    context |= {"form": form, "estimate": form.estimate() if form.is_bound else None}
    context["earlier"] = Explanation.objects.filter(view__sae=sae).select_related("model", "owner", "job")[:EARLIER]
    fragment = part(request, "estimate") if request.method == "GET" else ""
    return render(request, f"concepts/explanation_create.html{fragment}", context, status=422 if wrong else 200)


@needs("concepts.view_explanation")
def explanation_detail(request: HttpRequest, pk: int) -> HttpResponseBase:
    rows = Explanation.objects.select_related("model", "owner", "job__owner", "view__sae", "view__capture")
    row = get_object_or_404(rows, pk=pk)
    if request.GET.get("format") == "json":
        return json_file(as_json(row), name=f"names-{row.pk}.json")
    fragment = part(request, "live")
    if fragment and not row.busy:  # a poll when the work is over: the title line has changed too
        return HttpResponse(headers={"HX-Refresh": "true"})
    order = request.GET.get("order", "feature")
    if order not in ORDERS:
        raise Http404(f"There is no order {order[:40]}; choose one of {', '.join(ORDERS)}.")
    page = Paginator(_ordered(row, order), PAGE).get_page(request.GET.get("page"))
    context = {"section": "saes", "row": row, "sae": row.view.sae, "page": page, "order": order, "orders": ORDERS}
    context["definition"] = DEFINITIONS["detection_auroc_1"]
    return render(request, f"concepts/explanation_detail.html{fragment}", context)


def _ordered(row: Explanation, order: str) -> list[dict[str, Any]]:
    if order == "feature":
        return sorted(row.found, key=lambda one: one["feature"])
    return sorted(row.found, key=lambda one: (one["score"] is None, -(one["score"] or 0), one["feature"]))


def as_json(row: Explanation) -> dict[str, Any]:
    """All of it, with the definition of the scores."""
    return {
        "id": row.pk, "sae_id": row.view.sae_id, "view_id": row.view_id, "model_id": row.model_id, "model": row.model.name,
        "features": row.features, "n_shown": row.n_shown, "n_tested": row.n_tested, "accept_from": row.accept_from,
        "definitions": DEFINITIONS, "found": row.found,
    }  # fmt: skip
