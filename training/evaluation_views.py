"""Pages of evaluations: asking for one, its figures as SAEBench's file, and those of several SAEs side by side."""

from __future__ import annotations

from django.http import FileResponse, Http404, HttpRequest, HttpResponse
from django.http.response import HttpResponseBase
from django.shortcuts import get_object_or_404, redirect, render
from django.urls import reverse
from django.utils.text import slugify

from saehub.accounts.access import needs
from saehub.spreadsheets import csv_lines
from saehub.streaming import small_file
from saes.abilities import why_not
from saes.models import SAE
from training.compare import MOST, csv_rows, differing, neighbours, plots, sides_of, table, wanted_ids
from training.evaluation_form import EvaluationForm
from training.models import Evaluation


@needs("training.add_evaluation")
def evaluation_create(request: HttpRequest, pk: int) -> HttpResponse:
    sae = get_object_or_404(SAE.objects.select_related("model", "run__capture"), pk=pk)
    form = EvaluationForm(sae, request.POST if request.method == "POST" else None)
    if request.method == "POST" and form.is_valid():
        form.make(request.user)
        return redirect(sae)
    context = {"section": "saes", "sae": sae, "form": form, "why_not": why_not(sae, "evaluate")}
    return render(request, "training/evaluation_create.html", context, status=422 if form.errors else 200)


@needs("training.view_evaluation")
def evaluation_saebench(request: HttpRequest, pk: int) -> HttpResponseBase:
    """The evaluation as SAEBench's core results."""
    row = get_object_or_404(Evaluation.objects.select_related("sae", "capture", "corpus"), pk=pk)
    if not row.ready or not row.saebench.is_file():
        raise Http404("This evaluation has no SAEBench file: it is not finished, or of a transcoder.")
    name = slugify(f"{row.sae.name} {row.source.name if row.source else row.pk}")
    return FileResponse(row.saebench.open("rb"), as_attachment=True, filename=f"{name}_core_eval_results.json")


@needs("training.view_evaluation")
def sae_compare(request: HttpRequest) -> HttpResponse:
    """`?ids=3,5,8`: their figures side by side; `&data=` chooses on which data, `&format=csv` gives the table as a file.
    POST, from a list's checkboxes, only leads to that address."""
    if request.method == "POST":
        chosen = wanted_ids(",".join(request.POST.getlist("sae")))
        return redirect(f"{reverse('training:sae_compare')}?ids={','.join(map(str, chosen))}")
    ids = wanted_ids(",".join([*request.GET.getlist("ids"), *request.GET.getlist("add")]))
    found = SAE.objects.select_related("model", "release").in_bulk(ids[:MOST])
    saes = [found[pk] for pk in ids[:MOST] if pk in found]
    sides, options, data = sides_of(saes, request.GET.get("data", ""))
    if request.GET.get("format") == "csv":
        return small_file("".join(csv_lines(*csv_rows(sides))), name="compared-saes.csv", kind="text/csv")
    context = {
        "section": "saes",
        "sides": sides,
        "ids": ",".join(str(sae.pk) for sae in saes),
        "others": [(side, ",".join(str(sae.pk) for sae in saes if sae != side.sae)) for side in sides],
        "options": options,
        "data": data,
        "differing": differing(sides),
        "groups": table(sides),
        "plots": plots(sides),
        "neighbours": neighbours(saes),
        "missing": [pk for pk in ids[:MOST] if pk not in found],
        "left_out": len(ids) - MOST,
        "most": MOST,
    }
    return render(request, "training/sae_compare.html", context)
