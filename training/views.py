"""Pages of corpora, captures and training runs."""

from __future__ import annotations

import csv
from typing import Any

from django.contrib import messages
from django.db.models import Count
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.utils import timezone
from django.views.decorators.http import require_POST

from saehub.accounts.access import check, needs
from saehub.fragments import part
from saes.listing import Column, listing
from saes.models import SAE
from training.curves import config_rows, curves, now, snippet
from training.estimates import free_bytes
from training.forms import CaptureForm, CorpusForm, EvaluationForm
from training.models import Capture, Corpus, Run
from training.preview import preview
from training.run_form import RunForm, like

CORPUS_COLUMNS = (
    Column("name", "Corpus", "name"),
    Column("source", "From", "source"),
    Column("documents", "Documents", "n_documents", figures=True),
    Column("characters", "Characters", "n_characters", figures=True),
    Column("size", "Size", "size_bytes", figures=True),
    Column("captures", "Captures", "n_captures", figures=True),
    Column("added", "Added", "created_at"),
    Column("state", "State"),
)
CAPTURE_COLUMNS = (
    Column("name", "Capture", "name"),
    Column("model", "Model", "model__name"),
    Column("corpus", "Corpus", "corpus__name"),
    Column("hooks", "Hook points"),
    Column("tokens", "Tokens", "n_tokens", figures=True),
    Column("size", "Size", "size_bytes", figures=True),
    Column("runs", "Runs", "n_runs", figures=True),
    Column("state", "State"),
)
RUN_COLUMNS = (
    Column("name", "Run", "name"),
    Column("model", "Model, hook point", "capture__model__name"),
    Column("architecture", "Architecture", "architecture"),
    Column("tokens", "Tokens", "tokens", figures=True),
    Column("time", "Time", "seconds", figures=True),
    Column("ev", "Expl. var.", "sae__explained_variance", figures=True),
    Column("state", "State"),
)


# ---------------------------------------------------------------------------------------------------- corpora


@needs("training.view_corpus")
def corpus_list(request: HttpRequest) -> HttpResponse:
    rows = Corpus.objects.select_related("job", "owner").annotate(n_captures=Count("captures"))
    context = {"section": "corpora"} | listing(
        request, rows, CORPUS_COLUMNS, search=("name", "location"), facets={"source": ("From", "source")}
    )
    return render(request, "training/corpus_list.html" + part(request, "rows"), context)


@needs("training.add_corpus")
def corpus_create(request: HttpRequest) -> HttpResponse:
    form = CorpusForm(request.POST or None, request.FILES or None, user=request.user)
    if request.method == "POST" and form.is_valid():
        return redirect(form.make())
    context = {"section": "corpora", "form": form}
    return render(request, "training/corpus_create.html", context, status=422 if form.errors else 200)


@needs("training.view_corpus")
def corpus_detail(request: HttpRequest, pk: int) -> HttpResponse:
    corpus = get_object_or_404(Corpus.objects.select_related("job", "owner"), pk=pk)
    context = {
        "section": "corpora",
        "corpus": corpus,
        "captures": corpus.captures.select_related("model", "job")[:25],
    }
    return render(request, "training/corpus_detail.html" + part(request, "live"), context)


# ---------------------------------------------------------------------------------------------------- captures


@needs("training.view_capture")
def capture_list(request: HttpRequest) -> HttpResponse:
    rows = Capture.objects.select_related("job", "model", "corpus").annotate(n_runs=Count("runs"))
    context = {"section": "captures"} | listing(
        request,
        rows,
        CAPTURE_COLUMNS,
        search=("name", "model__name", "corpus__name"),
        facets={"model": ("Model", "model__name"), "corpus": ("Corpus", "corpus__name")},
    )
    return render(request, "training/capture_list.html" + part(request, "rows"), context)


@needs("training.add_capture")
def capture_create(request: HttpRequest) -> HttpResponse:
    """The form; for htmx the hook points of the chosen model, or what the form as it stands would cost."""
    if getattr(request, "htmx", False) and request.method == "GET":
        return _capture_part(request)
    form = CaptureForm(request.POST or None, user=request.user, initial=_given(request, "model", "corpus"))
    if request.method == "POST" and form.is_valid():
        return redirect(form.make())
    context = {"section": "captures", "form": form, "estimate": form.estimate()}
    return render(request, "training/capture_create.html", context, status=422 if form.errors else 200)


def _capture_part(request: HttpRequest) -> HttpResponse:
    if part(request, "") and request.htmx.target == "hooks":  # type: ignore[attr-defined]
        form = CaptureForm(user=request.user, initial=_given(request, "model"))
        return HttpResponse(form["hook_names"].as_widget())
    form = CaptureForm(request.GET, user=request.user)
    return render(request, "training/capture_create.html#estimate", {"estimate": form.estimate()})


def _given(request: HttpRequest, *names: str) -> dict[str, Any]:
    """Numbers of rows that a link chose beforehand."""
    return {name: int(value) for name in names if (value := request.GET.get(name, "")).isdecimal()}


@needs("training.view_capture")
def capture_detail(request: HttpRequest, pk: int) -> HttpResponse:
    capture = get_object_or_404(Capture.objects.select_related("job", "owner", "model", "corpus"), pk=pk)
    norms = capture.manifest.get("norms", {})
    hooks = [(name, capture.model.hook(name), norms.get(name)) for name in capture.hook_names]
    context = {
        "section": "captures",
        "capture": capture,
        "hooks": hooks,
        "runs": capture.runs.select_related("job", "sae")[:25],
        "preview": preview(capture.model, capture.corpus.sample, capture.prepend_bos, capture.store_special),
        "free": free_bytes(),
    }
    return render(request, "training/capture_detail.html" + part(request, "live"), context)


# ---------------------------------------------------------------------------------------------------- training


@needs("training.view_run")
def run_list(request: HttpRequest) -> HttpResponse:
    context = {"section": "training"} | listing(
        request,
        Run.objects.select_related("job", "capture__model", "sae"),
        RUN_COLUMNS,
        search=("name", "hook_name", "capture__name", "capture__model__name"),
        facets={"model": ("Model", "capture__model__name"), "architecture": ("Architecture", "architecture")},
    )
    return render(request, "training/run_list.html" + part(request, "rows"), context)


@needs("training.add_run")
def run_create(request: HttpRequest) -> HttpResponse:
    """The form; for htmx what the form as it stands would cost."""
    if part(request, "estimate") and request.method == "GET":
        form = RunForm(request.GET, user=request.user)
        return render(request, "training/run_create.html#estimate", {"estimate": form.estimate()})
    form = RunForm(request.POST or None, user=request.user, initial=_run_initial(request))
    if request.method == "POST" and form.is_valid():
        return redirect(form.make())
    context = {"section": "training", "form": form, "estimate": form.estimate()}
    return render(request, "training/run_create.html", context, status=422 if form.errors else 200)


def _run_initial(request: HttpRequest) -> dict[str, Any]:
    """`?like=<run>`: train the same again. `?capture=<pk>`: its first hook point, or `&hook=<name>`."""
    given = _given(request, "like", "capture")
    if "like" in given:
        return like(get_object_or_404(Run, pk=given["like"]))
    capture = Capture.objects.ready().filter(pk=given.get("capture", 0)).first()
    if capture is None:
        return {}
    hook = request.GET.get("hook")
    return {"source": f"{capture.pk}:{hook if hook in capture.hook_names else capture.hook_names[0]}"}


@needs("training.view_run")
def run_detail(request: HttpRequest, pk: int) -> HttpResponse:
    run = get_object_or_404(
        Run.objects.select_related("job", "owner", "capture__model", "capture__corpus", "sae"), pk=pk
    )
    points = list(run.points.all())
    context = {
        "section": "training",
        "run": run,
        "points": points,
        "charts": curves(run, points),
        "now": now(run, points),
        "snippet": snippet(run),
        "config": config_rows(run),
    }
    return render(request, "training/run_detail.html" + part(request, "live"), context)


@require_POST
@needs("training.view_run", post="training.add_run")
def run_stop(request: HttpRequest, pk: int) -> HttpResponse:
    """Stop and keep: the run ends at its next step, and what it has trained becomes an SAE."""
    run = get_object_or_404(Run, pk=pk)
    check(request.user, "training.add_run", run)
    if run.ready:
        messages.warning(request, "This run is finished already.")
    else:
        Run.objects.filter(pk=pk, stop_at=None).update(stop_at=timezone.now())
        messages.success(request, "The run stops at its next step and keeps what it has trained.")
    return redirect(run)


@needs("training.view_run")
def run_points(request: HttpRequest, pk: int) -> HttpResponse:
    """The run's curve as CSV."""
    run = get_object_or_404(Run, pk=pk)
    points = list(run.points.all())
    names = sorted({name for point in points for name in point.values if not isinstance(point.values[name], dict)})
    response = HttpResponse(content_type="text/csv")
    response["Content-Disposition"] = f'attachment; filename="run-{run.pk}.csv"'
    table = csv.writer(response)
    table.writerow(["step", "tokens", *names])
    table.writerows([point.step, point.tokens, *(point.values.get(name) for name in names)] for point in points)
    return response


# ---------------------------------------------------------------------------------------------------- evaluation


@require_POST
@needs("training.view_evaluation", post="training.add_evaluation")
def evaluation_create(request: HttpRequest, pk: int) -> HttpResponse:
    sae = get_object_or_404(SAE.objects.select_related("model"), pk=pk)
    form = EvaluationForm(sae, request.POST)
    if form.is_valid():
        form.make(request.user)
    else:
        messages.error(request, " ".join(str(error) for errors in form.errors.values() for error in errors))
    return redirect(sae)
