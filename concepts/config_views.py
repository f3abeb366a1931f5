"""Pages of concept configs: made as rows or from JSON, previewed, kept as versions that never change."""

from __future__ import annotations

from typing import Any

from django.contrib import messages
from django.db.models import OuterRef, Subquery
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render

from concepts import compile as compiler
from concepts.concept_forms import usable_saes
from concepts.config_forms import MAX_ROWS, ConfigForm, ConfigFormSet, ConfigJSONForm, ConfigRows, as_json, target_of
from concepts.dictionary_views import moved
from concepts.models import Concept, ConceptConfig
from saehub.accounts.access import check, needs
from saehub.fragments import part
from saehub.streaming import json_file
from saehub.typed import row_number
from saes.listing import Column, listing
from saes.models import SAE

OFFERED = 200  # names of concepts that a field of the form suggests
COLUMNS = (
    Column("name", "Config", "name"),
    Column("version", "Version", "number", figures=True),
    Column("edits", "Edits"),
    Column("sae", "SAE", "sae__name"),
    Column("owner", "By", "owner__username"),
    Column("made", "Made", "created_at", figures=True),
)


@needs("concepts.view_conceptconfig")
def config_list(request: HttpRequest) -> HttpResponse:
    """The newest version of each config."""
    newest = (
        ConceptConfig.objects.filter(sae=OuterRef("sae"), name=OuterRef("name")).order_by("-number").values("pk")[:1]
    )
    rows = ConceptConfig.objects.filter(pk=Subquery(newest)).select_related("sae", "owner")
    context = {"section": "concepts"} | listing(
        request,
        rows,
        COLUMNS,
        search=("name", "note", "sae__name"),
        facets={"sae": ("SAE", "sae__name"), "by": ("By", "owner__username")},
    )
    return render(request, "concepts/config_list.html" + part(request, "rows"), context)


@needs("concepts.view_conceptconfig")
def config_detail(request: HttpRequest, pk: int) -> HttpResponse:
    config = get_object_or_404(ConceptConfig.objects.select_related("sae__model", "owner"), pk=pk)
    form = request.GET.get("format", "")
    if form in ("json", "mi_crow"):
        try:
            return _file(config, form)
        except compiler.ConfigError as refusal:
            messages.error(request, str(refusal))
            return redirect(config)
    versions = (
        ConceptConfig.objects.filter(sae=config.sae, name=config.name).select_related("owner").order_by("-number")
    )
    context = {"section": "concepts", "config": config, "versions": versions[:50], "sae": config.sae}
    context |= moved(config.sae, config.edits)
    return render(request, "concepts/config_detail.html", context)


def _file(config: ConceptConfig, form: str) -> HttpResponse:
    if form == "json":
        return json_file(as_json(config), name=f"config-{config.pk}.json")
    return json_file(compiler.to_mi_crow(config.edits), name=f"config-{config.pk}-mi-crow.json")


@needs("concepts.add_conceptconfig")
def config_create(request: HttpRequest) -> HttpResponse:
    """A config for the SAE in the URL, or the next version of the one in `from`."""
    old = _from(request)
    sae = old.sae if old else _sae(request)
    if sae is None:
        saes = usable_saes()[:100]
        return render(request, "concepts/config_create.html", {"section": "concepts", "saes": saes})
    initial = {"name": old.name} if old else {}
    form = ConfigForm(request.POST or None, initial=initial)
    rows: Any = ConfigFormSet(request.POST or None, prefix="edits", initial=_initial(request, old))
    context = {"section": "concepts", "sae": sae, "old": old, "form": form, "rows": rows}
    context["concepts"] = (
        Concept.objects.filter(dictionary__sae=sae).values_list("name", flat=True).distinct()[:OFFERED]
    )
    context["numbered"], context["folded"] = list(rows)[: rows.n_shown], list(rows)[rows.n_shown :]
    if request.method == "POST":
        answer = _save(request, sae, form, rows, context)
        if answer is not None:
            return answer
        context["numbered"], context["folded"] = list(rows)[: rows.n_shown], list(rows)[rows.n_shown :]
    wrong = request.method == "POST" and "preview" not in request.POST
    return render(request, "concepts/config_create.html", context, status=422 if wrong else 200)


def _from(request: HttpRequest) -> ConceptConfig | None:
    text = request.GET.get("from", "")
    if not text:
        return None
    return get_object_or_404(ConceptConfig.objects.select_related("sae__model"), pk=row_number(text))


def _sae(request: HttpRequest) -> SAE | None:
    text = request.GET.get("sae", "")
    if not text:
        return None
    sae = get_object_or_404(SAE.objects.select_related("model"), pk=row_number(text))
    if not sae.n_features:
        raise Http404(f"How many features {sae.name} has is not known yet.")
    return sae


def _initial(request: HttpRequest, old: ConceptConfig | None) -> list[dict[str, Any]]:
    if old is not None:
        return [{"target": target_of(e), "mode": e["mode"], "value": e["value"]} for e in old.edits[:MAX_ROWS]]
    concept = request.GET.get("concept", "")
    found = Concept.objects.select_related("dictionary").filter(pk=row_number(concept)).first() if concept else None
    named = [f"{found.dictionary.name}/{found.name}"] if found else []
    targets = named + [text[:12] for text in request.GET.getlist("feature")]
    mode, value = request.GET.get("mode", "add"), request.GET.get("value", "")[:30]
    return [{"target": target, "mode": mode, "value": value} for target in targets[:MAX_ROWS]]


def _save(
    request: HttpRequest, sae: SAE, form: ConfigForm, rows: ConfigRows, context: dict[str, Any]
) -> HttpResponse | None:
    """The answer to a form that is right; else None, with the preview or the fault in the context."""
    clean = [form.is_valid(), rows.is_valid()]
    if "preview" in request.POST:
        form.errors.clear()  # it needs no name yet
    edits = rows.edits(sae)
    if not rows.is_valid() or any(row.errors for row in rows.forms):
        return None
    try:
        context |= moved(sae, edits)
    except compiler.ConfigError as fault:
        context["fault"] = str(fault)
        return None
    if "preview" in request.POST or not all(clean):
        return None
    return redirect(_version(request, sae, form.cleaned_data["name"], edits, form.cleaned_data["note"]))


def _version(request: HttpRequest, sae: SAE, name: str, edits: list[dict[str, Any]], note: str) -> ConceptConfig:
    """The next version, if the newest is one's own, or there is none."""
    newest = ConceptConfig.objects.filter(sae=sae, name=name).order_by("-number").first()
    check(request.user, "concepts.add_conceptconfig", newest)
    return ConceptConfig.next_version(sae, name, edits, request.user, note)


@needs("concepts.add_conceptconfig")
def config_read(request: HttpRequest) -> HttpResponse:
    """A config from JSON: looked at first, then saved."""
    sae = _sae(request)
    if sae is None:
        return redirect("concepts:config_create")
    context: dict[str, Any] = {"section": "concepts", "sae": sae}
    preview = "preview" in request.POST
    form, name = ConfigJSONForm(sae, request.POST or None), ConfigForm(None if preview else request.POST or None)
    if request.method == "POST" and form.is_valid():
        if not preview and name.is_valid():
            return redirect(_version(request, sae, name.cleaned_data["name"], form.edits, name.cleaned_data["note"]))
        context |= moved(sae, form.edits)
    if preview:
        name.initial = {"name": request.POST.get("name") or form.named, "note": request.POST.get("note", "")}
    context |= {"form": form, "name": name}
    wrong = request.method == "POST" and (form.errors or not preview)
    return render(request, "concepts/config_read.html", context, status=422 if wrong else 200)
