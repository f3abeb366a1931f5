"""Pages of training runs and sweeps."""

from __future__ import annotations

from typing import Any

from django.contrib import messages
from django.db.models import Count, Q
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.http import require_POST

from saehub.accounts.access import check, needs
from saehub.fragments import part
from saehub.spreadsheets import csv_lines
from saehub.streaming import small_file
from saes.listing import Column, listing
from saes.models import SAE
from training.curves import config_rows, curves, now, pareto, snippet, sweep_rows
from training.links import given
from training.models import Capture, Run, Sweep
from training.numerics.hints import hints
from training.presets import PRESETS
from training.run_document import DocumentError, form_of, from_yaml, of_run, of_sweep, said, to_yaml
from training.run_form import RunForm, context_size, like, like_sae
from training.sweep_form import AXES

RUN_COLUMNS = (
    Column("name", "Run", "name"),
    Column("model", "Model, hook point", "capture__model__name"),
    Column("architecture", "Architecture", "architecture"),
    Column("tokens", "Tokens", "tokens", figures=True),
    Column("time", "Time", "seconds", figures=True),
    Column("ev", "Expl. var.", "sae__explained_variance", figures=True),
    Column("state", "State"),
)
SWEEP_COLUMNS = (
    Column("name", "Sweep", "name"),
    Column("model", "Model", "capture__model__name"),
    Column("runs", "Runs", "n_runs", figures=True),
    Column("ready", "Finished", "n_ready", figures=True),
    Column("time", "Time", "seconds", figures=True),
    Column("state", "State"),
)


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
    if request.method == "POST" and "document" in request.POST:
        return _run_from_document(request)
    form = RunForm(request.POST or None, user=request.user, initial=_run_initial(request))
    if request.method == "POST" and form.is_valid():
        return redirect(form.make())
    return _run_form(request, form)


def _run_form(request: HttpRequest, form: RunForm, **more: Any) -> HttpResponse:
    sae = SAE.objects.filter(pk=given(request, "sae").get("sae", 0)).first()
    context = {
        "section": "training",
        "form": form,
        "estimate": form.estimate(),
        "presets": PRESETS.values(),
        "preset": PRESETS.get(request.GET.get("preset", "")),
        "like_sae": sae,
        "context_size": context_size(sae) if sae else None,
        "nothing_like": sae is not None and not form.initial.get("source") and not form.is_bound,
    }
    bad = form.errors or more.get("document_error")
    return render(request, "training/run_create.html", context | more, status=422 if bad else 200)


def _run_from_document(request: HttpRequest) -> HttpResponse:
    """Start what a pasted document says; what is wrong with it is said beside it, and the form stands as it says."""
    text = request.POST["document"]
    try:
        form = form_of(from_yaml(text), request.user)
    except DocumentError as error:
        return _run_form(request, RunForm(user=request.user), document=text, document_error=str(error))
    if form.is_valid():
        return redirect(form.make())
    return _run_form(request, form, document=text, document_error=" ".join(said(form)))


def _run_initial(request: HttpRequest) -> dict[str, Any]:
    """`?like=<run>`: train the same again. `?sae=<pk>`: one like this SAE. `?preset=<key>`: with those settings.
    `?capture=<pk>`: its first hook point, or `&hook=<name>`."""
    chosen = given(request, "like", "capture", "sae")
    found: dict[str, Any] = {}
    if "like" in chosen:
        found = like(get_object_or_404(Run, pk=chosen["like"]))
    elif "sae" in chosen:
        found = like_sae(get_object_or_404(SAE.objects.select_related("model"), pk=chosen["sae"]))
    capture = Capture.objects.ready().filter(pk=chosen.get("capture", 0)).first()
    if capture is not None:
        hook = request.GET.get("hook")
        found["source"] = f"{capture.pk}:{hook if hook in capture.hook_names else capture.hook_names[0]}"
    preset = PRESETS.get(request.GET.get("preset", ""))
    return found | (preset.values if preset else {})


@needs("training.view_run")
def run_yaml(request: HttpRequest, pk: int) -> HttpResponse:
    """The document that trains this run again, here, by `manage.py train`, or through the API."""
    run = get_object_or_404(Run.objects.select_related("capture__corpus"), pk=pk)
    return _yaml(of_run(run), f"run-{run.pk}")


@needs("training.view_sweep")
def sweep_yaml(request: HttpRequest, pk: int) -> HttpResponse:
    """The document that trains this sweep again."""
    sweep = get_object_or_404(Sweep, pk=pk)
    if not sweep.runs.exists():
        raise Http404
    return _yaml(of_sweep(sweep), f"sweep-{sweep.pk}")


def _yaml(document: dict[str, Any], name: str) -> HttpResponse:
    return small_file(to_yaml(document), name=f"{name}.yaml", kind="application/yaml")


@needs("training.view_run")
def run_detail(request: HttpRequest, pk: int) -> HttpResponse:
    run = get_object_or_404(
        Run.objects.select_related("job", "owner", "capture__model", "capture__corpus", "sae", "sweep"), pk=pk
    )
    points = list(run.points.all())
    history = [point.values | {"step": point.step, "tokens": point.tokens} for point in points]
    shape = {"architecture": run.architecture, "d_sae": run.config.get("d_sae"), "k": run.config.get("k")}
    context = {
        "section": "training",
        "run": run,
        "hints": hints(history, run.config, shape),
        "points": points,
        "charts": curves(run, points),
        "now": now(run, points),
        "unmeasured": max((run.tokens or 0) - points[-1].tokens, 0) if run.ready and points else 0,
        "job": run.job if run.sweep_id is None else None,
        "snippet": snippet(run),
        "config": config_rows(run),
    }
    return render(request, "training/run_detail.html" + part(request, "live"), context)


def _own_run(request: HttpRequest, pk: int) -> Run:
    """The run, for who may change it."""
    run: Run = get_object_or_404(Run.objects.select_related("job", "sweep"), pk=pk)
    check(request.user, "training.add_run", run)
    return run


@require_POST
@needs("training.view_run", post="training.add_run")
def run_stop(request: HttpRequest, pk: int) -> HttpResponse:
    """Stop and keep: the run ends at its next step, or where it rests, and what it has trained becomes an SAE."""
    run = _own_run(request, pk)
    if run.ready:
        messages.warning(request, "This run is finished already.")
    elif run.stop(request.user):
        messages.success(request, "The run stops at its next step and keeps what it has trained.")
    else:
        messages.warning(request, "This run has no checkpoint yet, so there is nothing to keep.")
    return redirect(run)


@require_POST
@needs("training.view_run", post="training.add_run")
def run_pause(request: HttpRequest, pk: int) -> HttpResponse:
    """The run ends at its next step with a checkpoint, and its worker is free; one that waits leaves the queue."""
    run = _own_run(request, pk)
    if run.pause():
        waits = "The run rests; Resume puts it back into the queue."
        goes = "The run pauses at its next step; its checkpoint is kept."
        messages.success(request, goes if run.busy else waits)
    else:
        messages.warning(request, "This run is not going on, so there is nothing to pause.")
    return redirect(run)


@require_POST
@needs("training.view_run", post="training.add_run")
def run_resume(request: HttpRequest, pk: int) -> HttpResponse:
    """A paused run goes on from its checkpoint."""
    run = _own_run(request, pk)
    if run.ready:
        messages.warning(request, "This run is finished already.")
    else:
        run.resume(request.user)
        messages.success(request, "The run goes on from its checkpoint.")
    return redirect(run)


# ---------------------------------------------------------------------------------------------------- sweeps


@needs("training.view_sweep")
def sweep_list(request: HttpRequest) -> HttpResponse:
    context = {"section": "training"} | listing(
        request,
        Sweep.objects.select_related("job", "capture__model").annotate(
            n_runs=Count("runs"), n_ready=Count("runs", filter=Q(runs__ready_at__isnull=False))
        ),
        SWEEP_COLUMNS,
        search=("name", "capture__name", "capture__model__name"),
        facets={"model": ("Model", "capture__model__name")},
    )
    return render(request, "training/sweep_list.html" + part(request, "rows"), context)


@needs("training.view_sweep")
def sweep_detail(request: HttpRequest, pk: int) -> HttpResponse:
    sweep = get_object_or_404(Sweep.objects.select_related("job", "owner", "capture__model", "capture__corpus"), pk=pk)
    rows = sweep_rows(sweep)
    context = {
        "section": "training",
        "sweep": sweep,
        "rows": rows,
        "axes": [name for name in AXES if name in sweep.grid],
        "chart": pareto(sweep, rows),
        "busy": any(row.run.busy for row in rows),
        "stoppable": any(row.run.stoppable for row in rows),
        "paused": any(row.run.state == "paused" for row in rows),
    }
    return render(request, "training/sweep_detail.html" + part(request, "live"), context)


def _own_sweep(request: HttpRequest, pk: int) -> Sweep:
    """The sweep, for who may change it."""
    sweep: Sweep = get_object_or_404(Sweep.objects.select_related("job"), pk=pk)
    check(request.user, "training.add_sweep", sweep)
    return sweep


def _runs(n: int, one: str, several: str) -> str:
    return f"{n} run {one}" if n == 1 else f"{n} runs {several}"


@require_POST
@needs("training.view_sweep", post="training.add_sweep")
def sweep_stop(request: HttpRequest, pk: int) -> HttpResponse:
    """Every run that goes on ends at its next step, and what it has trained becomes an SAE."""
    sweep = _own_sweep(request, pk)
    if stopped := sweep.stop(request.user):
        one, several = "stops at its next step and keeps what it has", "stop at their next step and keep what they have"
        messages.success(request, f"{_runs(stopped, one, several)} trained.")
    else:
        messages.warning(request, "None of its runs has trained anything yet, so there is nothing to keep.")
    return redirect(sweep)


@require_POST
@needs("training.view_sweep", post="training.add_sweep")
def sweep_pause(request: HttpRequest, pk: int) -> HttpResponse:
    """Every run that goes on ends at its next step with a checkpoint; those that wait leave the queue."""
    sweep = _own_sweep(request, pk)
    if not (paused := sweep.pause()):
        messages.warning(request, "None of its runs goes on, so there is nothing to pause.")
    elif sweep.busy:
        going = "pauses at its next step; its checkpoint is", "pause at their next step; their checkpoints are"
        messages.success(request, f"{_runs(paused, *going)} kept.")
    else:
        messages.success(request, f"{_runs(paused, 'rests', 'rest')}.")
    return redirect(sweep)


@require_POST
@needs("training.view_sweep", post="training.add_sweep")
def sweep_resume(request: HttpRequest, pk: int) -> HttpResponse:
    """Its paused runs go on from their checkpoints, side by side again."""
    sweep = _own_sweep(request, pk)
    if resumed := sweep.resume(request.user):
        going = _runs(resumed, "goes on from its checkpoint", "go on from their checkpoints")
        messages.success(request, f"{going}.")
    else:
        messages.warning(request, "None of its runs is paused.")
    return redirect(sweep)


@needs("training.view_run")
def run_points(request: HttpRequest, pk: int) -> HttpResponse:
    """The run's curve as CSV."""
    run = get_object_or_404(Run, pk=pk)
    points = list(run.points.all())
    names = sorted({name for point in points for name in point.values if not isinstance(point.values[name], dict)})
    rows = ([point.step, point.tokens, *(point.values.get(name) for name in names)] for point in points)
    return small_file("".join(csv_lines(["step", "tokens", *names], rows)), name=f"run-{run.pk}.csv", kind="text/csv")
