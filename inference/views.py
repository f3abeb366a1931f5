"""Pages of steering: choose edits, watch two texts being written, come back to them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.http import require_POST

from concepts.models import Concept, ConceptConfig, Known, Label, known_features
from inference.choices import Able
from inference.edit_forms import MAX_EDITS, EditFormSet, EditRows, prefilled
from inference.forms import GenerationForm, SweepForm, can_sweep, start_generation
from inference.infer_views import reload_page
from inference.models import Generation, Mode, Sweep
from inference.records import as_python, record
from inference.residency import residency
from inference.sides import sides
from inference.sweeps import charts_of, shown_points, sweep_record
from saehub.accounts.access import needs
from saehub.fragments import part
from saehub.streaming import json_file
from saehub.typed import row_number, whole_number
from saes.listing import Column, listing
from saes.models import SAE

SHOWN_EDITS = 50  # of a generation; the JSON has all
GIVEN = 400  # characters of the prompt shown in front of each text
COLUMNS = (
    Column("prompt", "Prompt", "name"),
    Column("edits", "Edits"),
    Column("sae", "SAE, model", "sae__name"),
    Column("tokens", "Tokens, at most", "max_new_tokens", figures=True),
    Column("owner", "By", "owner__username"),
    Column("created", "Made", "created_at", figures=True),
    Column("state", "State"),
)


@needs("inference.view_generation")
def generation_list(request: HttpRequest) -> HttpResponse:
    rows = Generation.objects.select_related("model", "sae", "owner", "job")
    context = {"section": "steering"} | listing(
        request,
        rows,
        COLUMNS,
        search=("prompt", "sae__name", "model__name"),
        facets={"sae": ("SAE", "sae__name"), "model": ("Model", "model__name"), "by": ("By", "owner__username")},
    )
    return render(request, "inference/generation_list.html" + part(request, "rows"), context)


@needs("inference.add_generation")
def generation_create(request: HttpRequest) -> HttpResponse:
    fork = None
    if request.method == "POST":
        form = GenerationForm(request.POST)
        rows = _rows(form, data=request.POST)
        if _valid(form, rows):
            return redirect(start_generation(form, rows.edits(), request.user))
    else:
        fork = _fork(request)
        able = Able("steer")
        initial, edits = _of(fork) if fork else _prefill(request, able)
        form = GenerationForm(initial=initial)
        rows = _rows(form, initial=edits)
    n, places = rows.n_shown, [_feature_of(form, row) for row in rows]
    saes = {sae.pk: sae for sae in form.able.rows}
    known, labels = known_places(saes, places), labels_of(saes, places)
    numbered = [(row, known.get(place), labels.get(place, "")) for row, place in zip(rows, places, strict=True)]
    advanced = [form[name] for name in form.advanced]
    context = {
        "section": "steering",
        "form": form,
        "fork": fork,
        "rows": rows,
        "shown": numbered[:n],
        "folded": numbered[n:],
        "several": len(form.able.rows) > 1,
        "advanced": advanced,
        "advanced_errors": any(field.errors for field in advanced),
        "residency": residency(),
        "why_not": _why_not(form),
        "left_out": max(0, len(request.GET.getlist("feature")) - MAX_EDITS),
        "max_edits": MAX_EDITS,
    }
    status = 422 if request.method == "POST" else 200
    return render(request, "inference/generation_create.html", context, status=status)


def _rows(form: GenerationForm, **given: Any) -> EditRows:
    rows: Any = EditFormSet(prefix="edits", form_kwargs={"able": form.able}, **given)
    rows.able = form.able
    return rows


def _valid(form: GenerationForm, rows: EditRows) -> bool:
    """Both are checked whatever the other says, so that one answer names everything that is wrong."""
    both = [form.is_valid(), rows.is_valid()]
    rows.check_against(form.cleaned_data.get("sae"), form.cleaned_data.get("config"))
    return all(both) and rows.is_valid()


def _why_not(form: GenerationForm) -> str:
    """Why the SAE that the URL asks for cannot steer: the list shows it, but a browser chooses another."""
    chosen = next((sae for sae in form.able.rows if sae.pk == row_number(form["sae"].value())), None)
    reason = form.able.reasons.get(chosen.pk, "") if chosen and not form.is_bound else ""
    return f"{chosen.name} cannot steer. {reason}" if chosen and reason else ""


def _fork(request: HttpRequest) -> Generation | None:
    fork = request.GET.get("fork", "")
    return get_object_or_404(Generation, pk=row_number(fork)) if fork else None


def _of(row: Generation) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    return {name: getattr(row, name) for name in GenerationForm.Meta.fields}, prefilled(row.edits)


def _prefill(request: HttpRequest, able: Able) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """From `?config=`, `?concept=` with `&strength=`, `?sae=&prompt=` and `?feature=&mode=&value=`, the last three once for
    each edit; `feature` may be a label or the name of a concept."""
    config, concept = _config(request), _concept(request)
    whose = config.sae_id if config else concept.dictionary.sae_id if concept else None
    chosen = request.GET.get("sae") or whose or (able.first.pk if able.first else None)
    initial: dict[str, Any] = {"sae": chosen, "config": config}
    if request.GET.get("prompt"):
        initial["prompt"] = request.GET["prompt"]
    names = ("feature", "mode", "value")
    columns = [request.GET.getlist(name) for name in names]
    edits = [
        {name: column[i] if i < len(column) else "" for name, column in zip(names, columns, strict=True)}
        for i in range(len(columns[0]))
    ]
    if concept is not None:
        edits.insert(0, _edit_of(concept, chosen, request.GET.get("strength", "")))
    return initial, prefilled(edits)


def _concept(request: HttpRequest) -> Concept | None:
    text = request.GET.get("concept", "")
    return get_object_or_404(Concept.objects.select_related("dictionary"), pk=row_number(text)) if text else None


def _edit_of(concept: Concept, main: Any, strength: str) -> dict[str, Any]:
    """A row that adds a concept; without a strength, so much that its members together move the usual share of the norm."""
    dictionary = concept.dictionary
    edit = {"feature": f"{dictionary.name}/{concept.name}", "mode": Mode.ADD, "value": strength}
    members = list(concept.members.order_by("-weight", "feature"))
    if not strength and members:
        first = members[0].feature
        known = known_features(dictionary.sae, [first]).get(first)
        length = math.hypot(*(member.weight for member in members))  # directions of features are nearly orthogonal
        edit["value"] = f"{known.usual / length:.4g}" if known and known.usual and length else ""
    return edit | ({} if str(main) == str(dictionary.sae_id) else {"sae": dictionary.sae_id})


def _config(request: HttpRequest) -> ConceptConfig | None:
    text = request.GET.get("config", "")
    return get_object_or_404(ConceptConfig.objects.select_related("sae__model"), pk=row_number(text)) if text else None


Place = tuple[int, int | None]  # an SAE and one of its features, if that is known


def _feature_of(form: GenerationForm, row: Any) -> Place:
    """What a row names as it stands, right or wrong."""
    main = form["sae"].value()
    return row_number(row["sae"].value() or getattr(main, "pk", main)), whole_number(row["feature"].value())


def _features_of(saes: Mapping[int, SAE], places: Iterable[Place]) -> dict[int, set[int]]:
    """The features that are named, by SAE, so that each SAE is asked once."""
    found: dict[int, set[int]] = {}
    for pk, feature in places:
        if pk in saes and feature is not None and feature >= 0:
            found.setdefault(pk, set()).add(feature)
    return found


def known_places(saes: Mapping[int, SAE], places: Iterable[Place]) -> dict[Place, Known]:
    return {
        (pk, feature): known
        for pk, features in _features_of(saes, places).items()
        for feature, known in known_features(saes[pk], features).items()
    }


def labels_of(saes: Mapping[int, SAE], places: Iterable[Place]) -> dict[Place, str]:
    """The accepted labels of these features."""
    return {
        (pk, feature): text
        for pk, features in _features_of(saes, places).items()
        for feature, text in Label.objects.accepted_of(saes[pk], features).items()
    }


SUGGESTED = 12


@needs("inference.add_generation")
def edit_suggest(request: HttpRequest) -> JsonResponse:
    """What can be edited of an SAE whose label or name holds `?q=`: [{value, text}], value being what the row takes."""
    words = request.GET.get("q", "").strip()[:100]
    sae = SAE.objects.ready().filter(pk=row_number(request.GET.get("sae", ""))).first()
    if sae is None or not words:
        return JsonResponse({"found": []})
    labels = Label.objects.filter(sae=sae, accepted=True, text__icontains=words).order_by("text", "feature")[:SUGGESTED]
    concepts = Concept.objects.filter(dictionary__sae=sae, name__icontains=words).select_related("dictionary")
    found = [{"value": str(label.feature), "text": f"{label.text} (feature {label.feature})"} for label in labels]
    found += [
        {"value": f"{concept.dictionary.name}/{concept.name}", "text": f"{concept.name} (concept)"}
        for concept in concepts.order_by("name", "-pk")[:SUGGESTED]
    ]
    return JsonResponse({"found": found})


@needs("inference.view_generation")
def generation_detail(request: HttpRequest, pk: int) -> HttpResponse:
    rows = Generation.objects.select_related("model", "sae__model", "config", "owner", "job__owner")
    row = get_object_or_404(rows, pk=pk)
    if request.GET.get("format") == "json":
        return json_file(record(row), name=f"generation-{row.pk}.json")
    context = _page(row) | {"sweep_form": SweepForm(auto_id="sweep_%s")}
    return render(request, "inference/generation_detail.html" + part(request, "live"), context)


def _page(row: Generation) -> dict[str, Any]:
    saes, edits = row.edited_saes(), row.edit_rows()
    places = [(edit["sae"], edit["feature"]) for edit in edits[:SHOWN_EDITS]]
    known, labels = known_places(saes, places), labels_of(saes, places)
    return {
        "section": "steering",
        "row": row,
        "edits": [
            (saes.get(edit["sae"]), labels.get(place, ""), *_shown(edit, known.get(place)))
            for edit, place in zip(edits, places, strict=False)
        ],
        "n_edits": len(edits),
        "config": row.config,
        "saes": saes,
        "sides": sides(row),
        "given": row.prompt if len(row.prompt) <= GIVEN else f"…{row.prompt[-GIVEN:]}",
        "python": as_python(row),
        "sweeps": row.sweeps.select_related("job")[:5],
        "can_sweep": can_sweep(row.edits),
    }


def _shown(edit: dict[str, Any], known: Known | None) -> tuple[dict[str, Any], Known | None, Any, Any]:
    """An edit, its feature, and the value as a multiple of the maximum and a share of the layer's norm."""
    if known is None or edit["mode"] not in (Mode.ADD, Mode.CLAMP):
        return edit, known, None, None
    times = edit["value"] / known.maximum if known.maximum else None
    return edit, known, times, None if known.per_norm is None else abs(edit["value"]) * known.per_norm


# -------------------------------------------------------------------------------------------------------------- sweeps


@require_POST
@needs("inference.view_generation", post="inference.add_sweep")
def sweep_create(request: HttpRequest, pk: int) -> HttpResponse:
    """From the page of a generation, which is shown again when the strengths make no sense."""
    row = get_object_or_404(
        Generation.objects.select_related("model", "sae__model", "config", "owner", "job__owner"), pk=pk
    )
    form = SweepForm(request.POST, auto_id="sweep_%s")
    if form.is_valid() and not can_sweep(row.edits):
        form.add_error("factors", "None of its edits has a strength; only add, scale, clamp and cap have one.")
    if form.is_valid():
        return redirect(form.begin(row, request.user))
    return render(request, "inference/generation_detail.html", _page(row) | {"sweep_form": form}, status=422)


@needs("inference.view_sweep")
def sweep_detail(request: HttpRequest, pk: int) -> HttpResponse:
    rows = Sweep.objects.select_related("generation__model", "generation__sae", "owner", "job__owner")
    row = get_object_or_404(rows, pk=pk)
    if request.GET.get("format") == "json":
        return json_file(sweep_record(row), name=f"sweep-{row.pk}.json")
    if part(request, "live") and not row.busy:
        return reload_page()
    asked = row.generation
    saes = asked.edited_saes()
    context = {
        "section": "steering", "row": row, "asked": asked, "points": shown_points(row), "charts": charts_of(row),
        "edits": [(saes.get(edit["sae"]), edit) for edit in asked.edit_rows()],
    }  # fmt: skip
    return render(request, "inference/sweep_detail.html" + part(request, "live"), context)
