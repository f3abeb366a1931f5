"""Pages of steering: choose edits, watch two texts being written, come back to them."""

from __future__ import annotations

from typing import Any

from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import get_object_or_404, redirect, render

from concepts.models import Known, known_features
from inference.forms import EditFormSet, EditRows, GenerationForm, prefilled, start_generation, steerable
from inference.models import Generation
from inference.records import as_python, record
from inference.sides import sides
from saehub.accounts.access import needs
from saehub.fragments import part
from saes.listing import Column, listing

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
        form, rows = GenerationForm(request.POST), _rows(data=request.POST)
        if _valid(form, rows):
            return redirect(start_generation(form, rows.edits(), request.user))
    else:
        fork = _fork(request)
        initial, edits = _of(fork) if fork else _prefill(request)
        form, rows = GenerationForm(initial=initial), _rows(initial=edits)
    known, n = _known_of(form, rows), rows.n_shown
    numbered = [(row, known.get(_index(row["feature"].value()))) for row in rows]
    advanced = [form[name] for name in form.advanced]
    context = {
        "section": "steering",
        "form": form,
        "fork": fork,
        "rows": rows,
        "shown": numbered[:n],
        "folded": numbered[n:],
        "advanced": advanced,
        "advanced_errors": any(field.errors for field in advanced),
    }
    status = 422 if request.method == "POST" else 200
    return render(request, "inference/generation_create.html", context, status=status)


def _rows(**given: Any) -> EditRows:
    rows: Any = EditFormSet(prefix="edits", **given)
    return rows


def _valid(form: GenerationForm, rows: EditRows) -> bool:
    """Both are checked whatever the other says, so that one answer names everything that is wrong."""
    both = [form.is_valid(), rows.is_valid()]
    rows.check_against(form.cleaned_data.get("sae"))
    return all(both) and rows.is_valid()


def _fork(request: HttpRequest) -> Generation | None:
    fork = request.GET.get("fork", "")
    return get_object_or_404(Generation, pk=_index(fork)) if fork else None


def _of(row: Generation) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    return {name: getattr(row, name) for name in GenerationForm.Meta.fields}, prefilled(row.edits)


def _prefill(request: HttpRequest) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """From `?sae=&prompt=&feature=&mode=&value=`, the last three once for each edit."""
    newest = steerable().first()
    initial: dict[str, Any] = {"sae": request.GET.get("sae") or (newest.pk if newest else None)}
    if request.GET.get("prompt"):
        initial["prompt"] = request.GET["prompt"]
    names = ("feature", "mode", "value")
    columns = [request.GET.getlist(name) for name in names]
    edits = [
        {name: column[i] if i < len(column) else "" for name, column in zip(names, columns, strict=True)}
        for i in range(len(columns[0]))
    ]
    return initial, prefilled(edits)


def _known_of(form: GenerationForm, rows: Any) -> dict[int, Known]:
    """What is known of the features in the rows as they stand, right or wrong."""
    chosen = form["sae"].value()
    sae = steerable().filter(pk=_index(getattr(chosen, "pk", chosen))).first()
    return known_features(sae, {_index(row["feature"].value()) for row in rows}) if sae else {}


def _index(value: Any) -> int:
    """A row's number or feature as typed; -1 for what is none."""
    text = str(value).strip()
    return int(text) if text.isdecimal() and len(text) < 12 else -1


@needs("inference.view_generation")
def generation_detail(request: HttpRequest, pk: int) -> HttpResponse:
    rows = Generation.objects.select_related("model", "sae__model", "owner", "job__owner")
    row = get_object_or_404(rows, pk=pk)
    if request.GET.get("format") == "json":
        return _as_json(row)
    known = known_features(row.sae, (edit["feature"] for edit in row.edits)) if row.sae else {}
    context = {
        "section": "steering",
        "row": row,
        "edits": [_shown(edit, known.get(edit["feature"])) for edit in row.edit_rows()],
        "sides": sides(row),
        "given": row.prompt if len(row.prompt) <= GIVEN else f"…{row.prompt[-GIVEN:]}",
        "python": as_python(row),
    }
    return render(request, "inference/generation_detail.html" + part(request, "live"), context)


def _shown(edit: dict[str, Any], known: Known | None) -> tuple[dict[str, Any], Known | None, Any, Any]:
    """An edit, its feature, and the value as a multiple of the maximum and a share of the layer's norm."""
    if known is None or edit["mode"] not in (Generation.Mode.ADD, Generation.Mode.CLAMP):
        return edit, known, None, None
    times = edit["value"] / known.maximum if known.maximum else None
    return edit, known, times, None if known.per_norm is None else abs(edit["value"]) * known.per_norm


def _as_json(row: Generation) -> HttpResponse:
    response = JsonResponse(record(row), json_dumps_params={"indent": 1, "ensure_ascii": False})
    response["Content-Disposition"] = f'attachment; filename="generation-{row.pk}.json"'
    return response
