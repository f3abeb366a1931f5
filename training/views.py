"""Pages of corpora, captures and training runs."""

from __future__ import annotations

from typing import Any

from django.contrib import messages
from django.db.models import Count
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.http import require_POST

from saehub.accounts.access import check, needs
from saehub.disk import free_bytes
from saehub.fragments import part
from saehub.jobs.kinds import KINDS
from saehub.jobs.models import Job, enqueue
from saehub.streaming import small_file
from saes.listing import Column, listing
from training.capture_document import DocumentError, form_of, from_yaml, of_capture, said
from training.capture_form import CaptureForm
from training.forms import CorpusForm
from training.links import given
from training.models import Capture, Corpus
from training.preview import Policy, preview
from training.yaml_document import to_yaml

CAPTURE_ACTIONS = ("verify_capture", "export_capture")
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
    if request.method == "POST" and "document" in request.POST:
        return _capture_from_document(request)
    asked = request.POST or (request.GET if "look" in request.GET else None)  # "look": before the start, without htmx
    form = CaptureForm(asked, user=request.user, initial=given(request, "model", "corpus"))
    if request.method == "POST" and form.is_valid():
        return redirect(form.make())
    return _capture_form(request, form)


def _capture_form(request: HttpRequest, form: CaptureForm, **more: Any) -> HttpResponse:
    context = {"section": "captures", "form": form, "estimate": form.estimate()} | more
    bad = request.method == "POST" and (form.errors or more.get("document_error"))
    return render(request, "training/capture_create.html", context, status=422 if bad else 200)


def _capture_from_document(request: HttpRequest) -> HttpResponse:
    """Start what a pasted document says; what is wrong with it is said beside it, and the form stands as it says."""
    text = request.POST["document"]
    try:
        form = form_of(from_yaml(text), request.user)
    except DocumentError as error:
        return _capture_form(request, CaptureForm(user=request.user), document=text, document_error=str(error))
    if form.is_valid():
        return redirect(form.make())
    return _capture_form(request, form, document=text, document_error=" ".join(said(form)))


def _capture_part(request: HttpRequest) -> HttpResponse:
    if part(request, "") and request.htmx.target == "hooks":  # type: ignore[attr-defined]
        form = CaptureForm(user=request.user, initial=given(request, "model"))
        return HttpResponse(form["hook_names"].as_widget())
    form = CaptureForm(request.GET, user=request.user)
    return render(request, "training/capture_create.html#estimate", {"estimate": form.estimate()})


@needs("training.view_capture")
def capture_detail(request: HttpRequest, pk: int) -> HttpResponse:
    capture = get_object_or_404(Capture.objects.select_related("job", "owner", "model", "corpus"), pk=pk)
    norms, jobs = capture.manifest.get("norms", {}), _jobs_of(capture)
    hooks = [(name, capture.model.hook(name), norms.get(name)) for name in capture.hook_names]
    context = {
        "section": "captures",
        "capture": capture,
        "hooks": hooks,
        "runs": capture.runs.select_related("job", "sae")[:25],
        "preview": None if capture.location else preview(capture.model, capture.corpus.sampled, Policy.of(capture)),
        "jobs": jobs,
        "filing": any(job.is_live for job in jobs),
        "free": free_bytes(),
    }
    return render(request, "training/capture_detail.html" + part(request, "live"), context)


@needs("training.view_capture")
def capture_yaml(request: HttpRequest, pk: int) -> HttpResponse:
    """The document that makes this capture again, here, by `manage.py capture`, or through the API."""
    row = get_object_or_404(Capture.objects.select_related("model", "corpus"), pk=pk)
    return small_file(to_yaml(of_capture(row)), name=f"capture-{row.pk}.yaml", kind="application/yaml")


def _jobs_of(capture: Capture) -> list[Job]:
    """Its parts while they are made, and the last check and export of its files."""
    rows = Job.objects.filter(kind__in=(Capture.KIND, *CAPTURE_ACTIONS), subject_id=capture.pk).order_by("pk")
    last = {job.kind: job for job in rows if job.kind != Capture.KIND}
    parts = [job for job in rows if job.kind == Capture.KIND] if capture.parts > 1 and not capture.ready else []
    return [*parts, *last.values()]


@require_POST
@needs("training.view_capture", post="training.add_capture")
def capture_action(request: HttpRequest, pk: int, kind: str) -> HttpResponse:
    """Queue a check of a capture's files, or an export of them."""
    capture = get_object_or_404(Capture, pk=pk)
    check(request.user, "training.add_capture", capture)
    if kind not in CAPTURE_ACTIONS:
        raise Http404
    if fault := capture_fault(capture, kind):
        messages.warning(request, fault)
    else:
        enqueue(kind, request.user, title=f"{KINDS[kind].title}: {capture.name}", capture=pk)
    return redirect(capture)


def capture_fault(capture: Capture, kind: str) -> str:
    """Why a check or an export of its files cannot be queued; "" when it can."""
    if not capture.ready:
        return "This capture is not finished yet."
    if kind == "export_capture" and not capture.stored:
        return "This capture is streamed, so there are no activations to export."
    if Job.objects.live().filter(kind=kind, subject_id=capture.pk).exists():
        return "That is under way already."
    return ""
