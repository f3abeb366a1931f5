"""Pages of language models and of the registry of SAEs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from django.db.models import Count
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render

from saehub.accounts.access import needs
from saehub.fragments import part
from saes.forms import LanguageModelForm
from saes.listing import Column, listing
from saes.models import LanguageModel

MODEL_COLUMNS = (
    Column("name", "Model", "name"),
    Column("architecture", "Architecture", "architecture"),
    Column("layers", "Layers", "n_layers", figures=True),
    Column("width", "d_model", "d_model", figures=True),
    Column("parameters", "Parameters", "n_parameters", figures=True),
    Column("size", "Size", "size_bytes", figures=True),
    Column("captures", "Captures", "n_captures", figures=True),
    Column("saes", "SAEs", "n_saes", figures=True),
    Column("state", "State"),
)


@needs("saes.view_languagemodel")
def model_list(request: HttpRequest) -> HttpResponse:
    rows = LanguageModel.objects.select_related("job").annotate(
        n_captures=Count("captures", distinct=True), n_saes=Count("saes", distinct=True)
    )
    context = {"section": "models"} | listing(
        request,
        rows,
        MODEL_COLUMNS,
        search=("name", "location", "architecture"),
        facets={"source": ("Source", "source"), "architecture": ("Architecture", "architecture")},
    )
    return render(request, "saes/model_list.html" + part(request, "rows"), context)


@needs("saes.add_languagemodel")
def model_create(request: HttpRequest) -> HttpResponse:
    form = LanguageModelForm(request.POST or None, user=request.user)
    if request.method == "POST" and form.is_valid():
        return redirect(form.make())
    context = {"section": "models", "form": form}
    return render(request, "saes/model_create.html", context, status=422 if form.errors else 200)


@needs("saes.view_languagemodel")
def model_detail(request: HttpRequest, pk: int) -> HttpResponse:
    model = get_object_or_404(LanguageModel.objects.select_related("job", "owner"), pk=pk)
    context = {
        "section": "models",
        "model": model,
        "layers": hook_table(model.hook_points),
        "captures": model.captures.select_related("corpus", "job")[:25],
        "saes": model.saes.all()[:25],
    }
    return render(request, "saes/model_detail.html" + part(request, "live"), context)


@dataclass(frozen=True)
class HookLayer:
    """The hook points of one layer; `label` is its number, or "embedding" for those outside of the blocks."""

    label: str
    points: list[dict[str, Any]]


def hook_table(points: list[dict[str, Any]]) -> list[HookLayer]:
    """Hook points by layer, in the order of a forward pass."""
    layers: dict[Any, list[dict[str, Any]]] = {}
    for point in points:
        layers.setdefault(point.get("layer"), []).append(point)
    return [HookLayer("embedding" if layer is None else str(layer), rows) for layer, rows in layers.items()]
