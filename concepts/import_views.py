"""Labels on a feature, and files: sent, looked at, applied; and written."""

from __future__ import annotations

from typing import Any

from django.contrib import messages
from django.http import Http404, HttpRequest, HttpResponse, StreamingHttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.utils.dateparse import parse_datetime
from django.views.decorators.http import require_POST

from concepts import imports, interchange
from concepts.concept_forms import ImportForm, LabelForm, LabelWordsForm
from concepts.dictionary_views import exported
from concepts.models import ConceptDictionary, ConceptImport, Label, LabelChange
from saehub.accounts.access import check, needs
from saehub.fragments import part
from saes.models import SAE

# -------------------------------------------------------------------------------------------------------------- labels


@require_POST
@needs("concepts.add_label")
def label_create(request: HttpRequest, pk: int, index: int) -> HttpResponse:
    """Name a feature. A label that cannot be kept is said in a message: the feature's page is what one comes back to."""
    sae = get_object_or_404(SAE, pk=pk)
    if index >= sae.n_features:
        raise Http404(f"There is no feature {index}; {sae.name} has features 0 to {sae.n_features - 1:,}.")
    form = LabelForm(request.POST)
    if form.is_valid():
        told = {name: form.cleaned_data[name] for name in ("confidence", "notes")}
        label = Label.objects.name_feature(sae, index, form.cleaned_data["text"], request.user, **told)
        if not label.accepted:
            messages.info(
                request, "Your label is proposed. The accepted one is another person's and stays until it is put aside."
            )
    else:
        _said(request, form)
    return _back(request, sae, index)


def _said(request: HttpRequest, form: Any) -> None:
    """Why nothing was kept, on the page that one comes back to."""
    messages.error(request, " ".join(str(error) for errors in form.errors.values() for error in errors))


@require_POST
@needs("concepts.change_label")
def label_describe(request: HttpRequest, pk: int) -> HttpResponse:
    """Confidence and notes of a label."""
    label = get_object_or_404(Label.objects.select_related("sae"), pk=pk)
    check(request.user, "concepts.change_label", label)
    form = LabelWordsForm(request.POST)
    if form.is_valid():
        label.describe(request.user, **form.cleaned_data)
    else:
        _said(request, form)
    return _back(request, label.sae, label.feature)


@require_POST
@needs("concepts.change_label")
def label_undo(request: HttpRequest, pk: int) -> HttpResponse:
    """Undo one change of a feature's labels."""
    change = get_object_or_404(LabelChange.objects.select_related("sae"), pk=pk)
    check(request.user, "concepts.change_label", change)
    check(request.user, "concepts.change_label", change.rival)
    change.undo(request.user)
    return _back(request, change.sae, change.feature)


@require_POST
@needs("concepts.change_label")
def label_accept(request: HttpRequest, pk: int) -> HttpResponse:
    label = get_object_or_404(Label.objects.select_related("sae"), pk=pk)
    check(request.user, "concepts.change_label", label.rival)
    label.accept(request.user)
    return _back(request, label.sae, label.feature)


@require_POST
@needs("concepts.delete_label")
def label_delete(request: HttpRequest, pk: int) -> HttpResponse:
    label = get_object_or_404(Label.objects.select_related("sae"), pk=pk)
    check(request.user, "concepts.delete_label", label)
    label.remove(request.user)
    return _back(request, label.sae, label.feature)


def _back(request: HttpRequest, sae: SAE, index: int) -> HttpResponse:
    """The feature's page as it was looked at: the same view, window and scale."""
    response = redirect("concepts:feature_detail", sae.pk, index)
    kept = request.GET.urlencode()
    response["Location"] += f"?{kept}" if kept else ""
    return response


@needs("concepts.view_label")
def label_files(request: HttpRequest, pk: int) -> HttpResponse:
    """What leaves and enters the labels of an SAE as files."""
    sae = get_object_or_404(SAE.objects.select_related("model"), pk=pk)
    done = ConceptImport.objects.ready().filter(sae=sae, dictionary=None).select_related("owner")[:10]
    context = {
        "section": "saes",
        "sae": sae,
        "formats": imports.losses(sae),
        "n_labels": sae.labels.count(),
        "n_named": sae.labels.filter(accepted=True).count(),
        "done": done,
    }
    return render(request, "concepts/label_files.html", context)


@needs("concepts.view_label")
def label_export(request: HttpRequest, pk: int) -> StreamingHttpResponse:
    return exported(request, get_object_or_404(SAE, pk=pk), f"labels-of-sae-{pk}")


# ------------------------------------------------------------------------------------------------------------- imports


@needs("concepts.add_conceptimport")
def dictionary_import(request: HttpRequest, pk: int) -> HttpResponse:
    dictionary = get_object_or_404(ConceptDictionary.objects.select_related("sae"), pk=pk)
    check(request.user, "concepts.change_conceptdictionary", dictionary)
    return _send(request, dictionary.sae, dictionary)


@needs("concepts.add_conceptimport")
def label_import(request: HttpRequest, pk: int) -> HttpResponse:
    return _send(request, get_object_or_404(SAE, pk=pk), None)


def _send(request: HttpRequest, sae: SAE, dictionary: ConceptDictionary | None) -> HttpResponse:
    form = ImportForm(request.POST, request.FILES) if request.method == "POST" else ImportForm()
    if not sae.n_features:
        messages.error(
            request, f"How many features {sae.name} has is not known yet, so no file can be checked against it."
        )
        return redirect(sae)
    if dictionary is not None:
        del form.fields["accept"]
    if request.method == "POST" and form.is_valid():
        accept = form.cleaned_data.get("accept", True)
        row = imports.keep(form.cleaned_data["file"], request.user, sae, dictionary, accept)
        if imports.is_long(row):
            row.look_at(request.user)
        return redirect(row)
    context = {"section": "concepts", "sae": sae, "dictionary": dictionary, "form": form}
    context |= {"most_megabytes": interchange.MOST_BYTES // 2**20, "most_rows": interchange.MOST_ROWS}
    return render(request, "concepts/import_create.html", context, status=422 if form.errors else 200)


@needs("concepts.view_conceptimport", post="concepts.add_conceptimport")
def import_detail(request: HttpRequest, pk: int) -> HttpResponse:
    rows = ConceptImport.objects.select_related("sae", "dictionary", "owner", "job__owner")
    row = get_object_or_404(rows, pk=pk)
    if request.method == "POST":
        return _decide(request, row)
    context: dict[str, Any] = {"section": "concepts", "row": row, "target": row.dictionary or row.sae}
    context["shown_rows"] = imports.SHOWN
    if not row.ready and not row.busy:
        try:
            found = imports.preview(row)
            context |= {"plan": found, "format": interchange.FORMATS[found.form]}
            context["as_job"] = row.by_job or found.effective > imports.APPLY_AT_ONCE
            context["looked_at"] = parse_datetime(row.look["at"]) if row.look else None
        except interchange.FileRefused as refusal:
            context["fault"] = str(refusal)
        except FileNotFoundError:
            context["fault"] = "The file is not there any more; send it again."
    return render(request, "concepts/import_detail.html" + part(request, "live"), context)


def _decide(request: HttpRequest, row: ConceptImport) -> HttpResponse:
    """Apply it, throw it away, or take an applied import of labels back."""
    check(request.user, "concepts.add_conceptimport", row)
    if row.dictionary is not None:
        check(request.user, "concepts.change_conceptdictionary", row.dictionary)
    if "undo" in request.POST and row.ready and row.dictionary is None:
        gone = imports.undo_labels(row)
        messages.success(request, f"The import is taken back: {gone:,} labels are gone.")
        return redirect("concepts:label_files", row.sae_id)
    if row.ready or row.busy:
        doing = "looked at" if row.looking else "applied"
        messages.info(request, "This import is applied already." if row.ready else f"This file is being {doing}.")
        return redirect(row)
    if "discard" in request.POST:
        row.delete()
        return _to_target(row)
    return _apply(request, row)


def _apply(request: HttpRequest, row: ConceptImport) -> HttpResponse:
    try:
        counts = imports.begin(row, request.user)
    except (interchange.FileRefused, FileNotFoundError):
        return redirect(row)  # its page says why
    if counts is None:
        return redirect(row)
    messages.success(
        request, f"{counts['added']:,} added, {counts['changed']:,} changed, {counts['refused']:,} refused."
    )
    return _to_target(row)


def _to_target(row: ConceptImport) -> HttpResponse:
    return redirect(row.dictionary) if row.dictionary else redirect("concepts:label_files", row.sae_id)
