"""Pages of corpora, captures and training runs."""

from __future__ import annotations

from django.db.models import Count
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render

from saehub.accounts.access import needs
from saehub.fragments import part
from saes.listing import Column, listing
from training.estimates import free_bytes
from training.forms import CaptureForm, CorpusForm
from training.links import given
from training.models import Capture, Corpus
from training.preview import preview

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
    form = CaptureForm(request.POST or None, user=request.user, initial=given(request, "model", "corpus"))
    if request.method == "POST" and form.is_valid():
        return redirect(form.make())
    context = {"section": "captures", "form": form, "estimate": form.estimate()}
    return render(request, "training/capture_create.html", context, status=422 if form.errors else 200)


def _capture_part(request: HttpRequest) -> HttpResponse:
    if part(request, "") and request.htmx.target == "hooks":  # type: ignore[attr-defined]
        form = CaptureForm(user=request.user, initial=given(request, "model"))
        return HttpResponse(form["hook_names"].as_widget())
    form = CaptureForm(request.GET, user=request.user)
    return render(request, "training/capture_create.html#estimate", {"estimate": form.estimate()})


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
