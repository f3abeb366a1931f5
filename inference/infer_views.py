"""Pages of the playground: which features fire on a text, and on every text of a corpus."""

from __future__ import annotations

from typing import Any

from django.http import FileResponse, Http404, HttpRequest, HttpResponse, HttpResponseBase
from django.shortcuts import get_object_or_404, redirect, render

from inference.codes import CodesError
from inference.infer_forms import InferenceForm, PromptBatchForm
from inference.models import Inference, PromptBatch
from inference.readings import Reading, as_csv, as_python, record
from inference.residency import residency
from saehub.accounts.access import check, needs
from saehub.fragments import part
from saehub.jobs.made import Made
from saehub.streaming import attachment, json_file
from saehub.typed import row_number, whole_number
from saes.listing import Column, listing
from training.links import given

COLUMNS = (
    Column("text", "Text", "name"),
    Column("saes", "SAEs, model"),
    Column("tokens", "Tokens", "n_tokens", figures=True),
    Column("owner", "By", "owner__username"),
    Column("created", "Made", "created_at", figures=True),
    Column("state", "State"),
)
BATCH_COLUMNS = (
    Column("corpus", "Corpus", "corpus__name"),
    Column("saes", "SAEs, model"),
    Column("prompts", "Prompts", "n_prompts", figures=True),
    Column("rows", "Rows", "n_rows", figures=True),
    Column("size", "Size", "size_bytes", figures=True),
    Column("owner", "By", "owner__username"),
    Column("created", "Made", "created_at", figures=True),
    Column("state", "State"),
)


@needs("inference.view_inference")
def inference_list(request: HttpRequest) -> HttpResponse:
    rows = Inference.objects.select_related("model", "owner", "job").prefetch_related("saes")
    facets = {"sae": ("SAE", "saes__name"), "model": ("Model", "model__name"), "by": ("By", "owner__username")}
    context = listing(request, rows, COLUMNS, search=("prompt", "model__name"), facets=facets)
    return render(request, "inference/inference_list.html" + part(request, "rows"), {"section": "playground"} | context)


@needs("inference.add_inference")
def inference_create(request: HttpRequest) -> HttpResponse:
    fork = None
    if request.method == "POST":
        form = InferenceForm(request.POST)
        if form.is_valid():
            return redirect(form.begin(request.user))
    else:
        fork = _fork(request)
        form = InferenceForm(initial=_of(fork) if fork else _prefill(request))
    recent = Inference.objects.select_related("model", "job").filter(owner_id=request.user.pk)[:6]
    context = {"section": "playground", "form": form, "fork": fork, "recent": recent, "residency": residency()}
    return render(request, "inference/inference_create.html", context, status=422 if form.errors else 200)


def _fork(request: HttpRequest) -> Inference | None:
    pk = request.GET.get("fork", "")
    if not pk:
        return None
    return get_object_or_404(Inference, pk=row_number(pk))


def _of(row: Inference) -> dict[str, Any]:
    fields = [name for name in InferenceForm.Meta.fields if name != "saes"]
    return {name: getattr(row, name) for name in fields} | {"saes": [sae.pk for sae in row.saes.all()]}


def _prefill(request: HttpRequest) -> dict[str, Any]:
    """From `?prompt=&sae=&sae=`; without an SAE, the newest that can read."""
    saes = [pk for text in request.GET.getlist("sae") if (pk := whole_number(text)) is not None]
    if not saes:
        newest = InferenceForm().able.first
        saes = [newest.pk] if newest else []
    return {"prompt": request.GET.get("prompt", ""), "saes": saes}


@needs("inference.view_inference")
def inference_detail(request: HttpRequest, pk: int) -> HttpResponseBase:
    rows = Inference.objects.select_related("model", "config", "owner", "job__owner").prefetch_related("saes")
    row = get_object_or_404(rows, pk=pk)
    if _over(request, row):
        return reload_page()
    by_id = {sae.pk: sae for sae in row.saes.all()}
    saes = [by_id[fact["sae"]] for fact in row.facts if fact["sae"] in by_id] or list(by_id.values())
    context: dict[str, Any] = {"section": "playground", "row": row, "saes": saes}
    if row.ready:
        try:
            if (kind := request.GET.get("format", "")) in ("csv", "json"):
                return _attachment(request, row, kind)
            if kind == "top_texts":
                return _top_texts(row, request.GET.get("sae", ""))
            context |= {"reading": Reading(row, request.GET), "python": as_python(row, context["saes"])}
        except CodesError as error:
            context["fault"] = str(error)
    return render(request, "inference/inference_detail.html" + part(request, "live"), context)


def reload_page() -> HttpResponse:
    """The answer to a poll when the work is over: not only the fragment has changed, but the title line too."""
    return HttpResponse(headers={"HX-Refresh": "true"})


def _over(request: HttpRequest, row: Made) -> bool:
    """A page that polls, of a row whose job is over."""
    return bool(part(request, "live")) and not row.busy


def _attachment(request: HttpRequest, row: Inference, kind: str) -> HttpResponseBase:
    name = f"inference-{row.pk}.{kind}"
    if kind == "csv":
        return attachment(request, as_csv(row), name=name, kind="text/csv")
    return json_file(record(row), name=name)


def _top_texts(row: Inference, asked: str) -> HttpResponseBase:
    """top_texts.json of one SAE, of the first when none is named."""
    found = [fact["sae"] for fact in row.facts if not asked or str(fact["sae"]) == asked]
    if not found or not (file := row.top_texts_file(found[0])).is_file():
        raise Http404("No top texts were saved of this SAE; read the text again with “Save top_texts.json”.")
    return FileResponse(
        file.open("rb"), as_attachment=True, filename=f"top_texts-{row.pk}-{found[0]}.json", content_type="application/json"
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- batches


@needs("inference.view_promptbatch")
def promptbatch_list(request: HttpRequest) -> HttpResponse:
    rows = PromptBatch.objects.select_related("model", "corpus", "owner", "job").prefetch_related("saes")
    facets = {"corpus": ("Corpus", "corpus__name"), "sae": ("SAE", "saes__name"), "model": ("Model", "model__name")}
    context = listing(request, rows, BATCH_COLUMNS, search=("corpus__name", "model__name"), facets=facets)
    return render(
        request, "inference/promptbatch_list.html" + part(request, "rows"), {"section": "playground"} | context
    )


@needs("inference.add_promptbatch")
def promptbatch_create(request: HttpRequest) -> HttpResponse:
    if request.method == "POST":
        form = PromptBatchForm(request.POST, request.FILES, user=request.user)
    else:
        form = PromptBatchForm(initial=_prefill(request) | given(request, "corpus"), user=request.user)
    if request.method == "POST" and form.is_valid():
        return redirect(form.begin(request.user))
    context = {"section": "playground", "form": form}
    return render(request, "inference/promptbatch_create.html", context, status=422 if form.errors else 200)


@needs("inference.view_promptbatch")
def promptbatch_detail(request: HttpRequest, pk: int) -> HttpResponse:
    rows = PromptBatch.objects.select_related("model", "corpus", "owner", "job__owner").prefetch_related("saes")
    row = get_object_or_404(rows, pk=pk)
    if _over(request, row):
        return reload_page()
    context = {"section": "playground", "row": row, "saes": list(row.saes.all())}
    return render(request, "inference/promptbatch_detail.html" + part(request, "live"), context)


@needs("inference.view_promptbatch")
def promptbatch_file(request: HttpRequest, pk: int) -> HttpResponseBase:
    """The table itself."""
    row = get_object_or_404(PromptBatch.objects.ready(), pk=pk)
    check(request.user, "inference.view_promptbatch", row)
    if not row.file.is_file():
        raise Http404("The table of this batch is gone; run it again.")
    return FileResponse(row.file.open("rb"), as_attachment=True, filename=f"prompts-{row.pk}.parquet")
