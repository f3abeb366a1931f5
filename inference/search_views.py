"""Pages that look for features by what fires on texts, over all SAEs of a model at once: on one, or on some and not on others."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render

from inference import contrast
from inference.choices import Able
from inference.codes import CodesError, CodesFile
from inference.infer_forms import MOST_SEARCHED, ContrastForm
from inference.models import Inference
from inference.own_text import asked_reading, asked_text, link_to, reading_of, text_form
from inference.text_search import ORDERS, rankings
from saehub.accounts.access import needs
from saehub.fragments import part
from saehub.typed import whole_number
from saes.models import SAE

PREPEND_BOS = True  # as captures do by default


@needs("inference.view_inference", post="inference.add_inference")
def text_search(request: HttpRequest) -> HttpResponse:
    """GET shows what a reading found and starts nothing; POST reads the text, unless somebody has done so."""
    models, chosen, saes = _readers(request)
    text = asked_text(request)
    row = asked_reading(request, []) or reading_of(text, saes, PREPEND_BOS)
    context: dict[str, Any] = {
        "section": "features", "way": "text", "models": models, "model": chosen, "saes": saes, "text": text,
        "orders": ORDERS, "order": request.GET.get("order") if request.GET.get("order") in ORDERS else "score",
        "density": request.GET.get("density", "")[:20],
    }  # fmt: skip
    if request.method == "POST" and saes and (row is None or not (row.ready or row.busy)):
        form = text_form(text, saes, PREPEND_BOS, most=MOST_SEARCHED)
        if not form.is_valid():
            context["errors"] = [str(error) for errors in form.errors.values() for error in errors]
            return render(request, "inference/text_search.html" + part(request, "found"), context, status=422)
        row = form.begin(request.user)
    if request.method == "POST" and row is not None:
        kept = {name: value for name in ("order", "density") if (value := request.GET.get(name))}
        return redirect(f"{request.path}?{urlencode({'model': row.model_id} | link_to(row) | kept)}")
    if row is not None:
        context |= {"row": row, "text": row.prompt, "carried": link_to(row), "link": urlencode(link_to(row))} | _found(
            request, row, context
        )
    return render(request, "inference/text_search.html" + part(request, "found"), context)


@needs("inference.view_inference", post="inference.add_inference")
def text_contrast(request: HttpRequest) -> HttpResponse:
    """Two sets of texts, one reading: the address says which, and how many of its texts are the first set."""
    models, chosen, saes = _readers(request)
    row, n_first = asked_reading(request, []), whole_number(request.GET.get("first", "")) or 0
    context: dict[str, Any] = {
        "section": "features", "way": "contrast", "models": models, "model": chosen, "saes": saes,
        "orders": contrast.ORDERS, "density": request.GET.get("density", "")[:20],
        "order": request.GET.get("order") if request.GET.get("order") in contrast.ORDERS else "score",
    }  # fmt: skip
    if request.method == "POST":
        form = ContrastForm(request.POST)
        if form.is_valid() and saes:
            row = _read(form, saes, request.user)
        if row is None or form.errors:
            return render(request, "inference/text_contrast.html", context | {"form": form}, status=422)
        return redirect(f"{request.path}?{urlencode({'reading': row.pk, 'first': len(form.cleaned_data['first'])})}")
    texts = row.prompts if row is not None else []
    if row is not None and not 0 < n_first < len(texts):
        context["errors"] = ["The address does not say which of the texts are the first set; write them again."]
    elif row is not None:
        context |= {"row": row, "n_first": n_first, "n_second": len(texts) - n_first} | _contrasted(
            row, n_first, context
        )
    context["form"] = ContrastForm(initial={"first": texts[:n_first], "second": texts[n_first:]})
    return render(request, "inference/text_contrast.html" + part(request, "found"), context)


def _read(form: ContrastForm, saes: list[SAE], user: Any) -> Inference | None:
    """The reading of these texts: one that is there or under way, else a new one; None where the form is refused now."""
    text, *more = form.texts
    row = reading_of(text, saes, PREPEND_BOS, more)
    if row is not None and (row.ready or row.busy):
        return row
    asked = text_form(text, saes, PREPEND_BOS, most=MOST_SEARCHED, more=more)
    if asked.is_valid():
        return asked.begin(user)
    for errors in asked.errors.values():
        form.add_error(None, list(errors))
    return None


def _contrasted(row: Inference, n_first: int, context: dict[str, Any]) -> dict[str, Any]:
    if not row.ready:
        return {}
    try:
        found = contrast.contrasts(row, n_first, order=context["order"], density_max=_share(context["density"]))
    except CodesError as error:
        return {"errors": [str(error)]}
    return {"contrasts": found}


def _readers(request: HttpRequest) -> tuple[dict[int, str], int | None, list[SAE]]:
    """Models with SAEs that can read, the one asked for (else that of the newest SAE), and its SAEs by layer."""
    able = Able("harvest")
    rows = [sae for sae in able.rows if not able.reasons[sae.pk] and sae.model]
    models = {sae.model_id: sae.model.name for sae in rows if sae.model_id and sae.model}
    wanted = whole_number(request.POST.get("model") or request.GET.get("model", ""))
    chosen = wanted if wanted in models else next(iter(models), None)
    mine = [sae for sae in rows if sae.model_id == chosen][:MOST_SEARCHED]
    return models, chosen, sorted(mine, key=lambda sae: (-1 if sae.layer is None else sae.layer, sae.pk))


def _found(request: HttpRequest, row: Inference, context: dict[str, Any]) -> dict[str, Any]:
    if not row.ready:
        return {}
    try:
        file = CodesFile(row.folder)
        token = whole_number(request.GET.get("token", ""))
        token = token if token is not None and token < len(file) else None
        found = rankings(row, order=context["order"], token=token, density_max=_share(context["density"]))
    except CodesError as error:
        return {"errors": [str(error)]}
    marked = list(zip(range(len(file)), file.tokens, file.special.tolist(), strict=True))
    return {"rankings": found, "marked": marked, "token": token}


def _share(percent: str) -> float | None:
    """A limit in percent as a share; None for what is no number from 0 to 100."""
    try:
        value = float(percent) / 100
    except ValueError:
        return None
    return value if 0 <= value <= 1 else None
