"""Pages of language models and of the registry of SAEs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from django.db.models import Count
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render

from saehub.accounts.access import needs
from saehub.fragments import part
from saehub.jobs.models import Job, State
from saes.forms import LanguageModelForm
from saes.listing import Column, listing
from saes.metrics import density_chart, grouped
from saes.models import SAE, LanguageModel

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
SAE_COLUMNS = (
    Column("name", "SAE", "name"),
    Column("model", "Model, hook point", "model_name"),
    Column("architecture", "Architecture", "architecture"),
    Column("features", "Features", "d_sae", figures=True),
    Column("l0", "L0", "l0", figures=True),
    Column("ev", "Expl. var.", "explained_variance", figures=True),
    Column("size", "Size", "size_bytes", figures=True),
    Column("source", "Source", "source"),
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


@needs("saes.view_sae")
def sae_list(request: HttpRequest) -> HttpResponse:
    context = {"section": "saes"} | listing(
        request,
        SAE.objects.select_related("model", "owner"),
        SAE_COLUMNS,
        search=("name", "model_name", "hook_name", "notes"),
        facets={
            "model": ("Model", "model_name"),
            "hook": ("Hook point", "hook_name"),
            "architecture": ("Architecture", "architecture"),
            "source": ("Source", "source"),
        },
    )
    return render(request, "saes/sae_list.html" + part(request, "rows"), context)


@needs("saes.view_sae")
def sae_detail(request: HttpRequest, pk: int) -> HttpResponse:
    sae = get_object_or_404(SAE.objects.select_related("model", "owner", "run__capture__corpus"), pk=pk)
    jobs = jobs_of(sae)
    context = {
        "section": "saes",
        "sae": sae,
        "jobs": jobs,
        "busy": any(job.is_live for job in jobs),
        "evaluations": sae.evaluations.select_related("capture", "job")[:20],
        "captures": _fitting_captures(sae),
        "files": _files(sae),
        "metrics": grouped(sae.metrics),
        "density": density_chart(sae.metrics),
    }
    return render(request, "saes/sae_detail.html" + part(request, "live"), context)


def jobs_of(sae: SAE) -> list[Job]:
    """The newest job of each kind that measures this SAE, where it is on or went wrong."""
    kinds = ("evaluate", "harvest")
    newest = Job.objects.filter(kind__in=kinds, subject_id=sae.pk).order_by("kind", "-pk").distinct("kind")
    return [job for job in newest.select_related("owner") if job.is_live or job.state == State.FAILED]


def _fitting_captures(sae: SAE) -> list[Any]:
    """Finished captures of its model that hold its hook point, the one it was trained on first."""
    if sae.model is None:
        return []
    fitting = list(sae.model.captures.ready().filter(hook_names__contains=[sae.hook_name])[:50])
    run = getattr(sae, "run", None)
    return sorted(fitting, key=lambda capture: run is None or capture.pk != run.capture_id)


def _files(sae: SAE) -> list[tuple[str, int]]:
    if not sae.files.is_dir():
        return []
    return sorted((file.name, file.stat().st_size) for file in sae.files.iterdir() if file.is_file())
