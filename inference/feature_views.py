"""A feature on a text of one's own: the panel of its page, and a page by itself where scripts are off."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import numpy as np
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.urls import reverse

from concepts import featurefile
from concepts.models import FeatureView
from inference.codes import CodesError, CodesFile
from inference.models import Inference
from inference.own_text import asked_reading, asked_text, link_to, policy_of, reading_of, text_form
from saehub.accounts.access import needs
from saehub.fragments import part
from saehub.typed import whole_number
from saes.models import SAE


@needs("inference.view_inference", post="inference.add_inference")
def feature_text(request: HttpRequest, pk: int, index: int) -> HttpResponse:
    """GET shows what a reading found and starts nothing; POST reads the text, unless somebody has done so."""
    sae = get_object_or_404(SAE.objects.select_related("model"), pk=pk)
    if index >= sae.n_features:
        raise Http404(f"There is no feature {index}; {sae.name} has features 0 to {sae.n_features - 1:,}.")
    view, text = _view(request, sae), asked_text(request)
    row = asked_reading(request, [sae]) or reading_of(text, [sae], policy_of(view))
    context: dict[str, Any] = {"section": "saes", "sae": sae, "index": index, "view": view, "text": text}
    if request.method == "POST" and (row is None or not (row.ready or row.busy)):
        form = text_form(text, [sae], policy_of(view))
        if not form.is_valid():
            context["errors"] = [str(error) for errors in form.errors.values() for error in errors]
            return render(request, "inference/feature_text.html" + part(request, "reading"), context, status=422)
        row = form.begin(request.user)
    if request.method == "POST" and row is not None and not part(request, "reading"):
        return redirect(f"{request.path}?{urlencode(_view_in(view) | link_to(row))}")
    if row is not None:
        context |= {"row": row, "text": row.prompt, "link": urlencode(_view_in(view) | link_to(row))}
        context |= _on_text(row, sae, index, view)
    if request.method == "POST" and row is not None and not _carried(request, row):
        # the whole page: its links to other features carry the text from now on
        return HttpResponse(status=204, headers={"HX-Redirect": _address(request, sae, index, row)})
    return render(request, "inference/feature_text.html" + part(request, "reading"), context)


def _carried(request: HttpRequest, row: Inference) -> bool:
    """Whether the page that asks has this text in its link already."""
    current = getattr(getattr(request, "htmx", None), "current_url_abs_path", None) or ""
    had = dict(parse_qsl(urlsplit(current).query))
    return all(had.get(name) == str(value) for name, value in link_to(row).items())


def _view(request: HttpRequest, sae: SAE) -> FeatureView | None:
    """The view the page looks at: its maximum is the scale, and its policy that of the text."""
    views = FeatureView.objects.ready().filter(sae=sae).largest_first().select_related("capture__model", "sae__model")
    wanted = whole_number(request.GET.get("view", ""))
    return views.first() if wanted is None else views.filter(pk=wanted).first()


def _view_in(view: FeatureView | None) -> dict[str, Any]:
    return {"view": view.pk} if view else {}


def _address(request: HttpRequest, sae: SAE, index: int, row: Inference) -> str:
    """The address bar after a text was tried: the page it was tried on, with the text in its link."""
    current = getattr(getattr(request, "htmx", None), "current_url_abs_path", None)
    parts = urlsplit(current or reverse("concepts:feature_detail", args=[sae.pk, index]))
    kept = {name: value for name, value in parse_qsl(parts.query) if name not in ("text", "reading")}
    return f"{parts.path}?{urlencode(kept | link_to(row))}"


def _on_text(row: Inference, sae: SAE, index: int, view: FeatureView | None) -> dict[str, Any]:
    """The tokens of a finished reading with the activations of one feature."""
    if not row.ready:
        return {}
    try:
        file = CodesFile(row.folder)
        number = next(i for i, fact in enumerate(row.facts) if fact["sae"] == sae.pk)
        values = file.sae(number).along(index)
    except CodesError as error:
        return {"errors": [str(error)]}
    counted = np.ones(len(file), dtype=bool) if view is not None and view.capture.store_special else ~file.special
    strength = np.where(counted, np.abs(values), 0)
    peak = int(strength.argmax()) if len(strength) and strength.any() else None
    maximum = float(strength.max(initial=0))
    known = _maximum(view, index)
    return {
        "tokens": file.tokens,
        "values": np.where(counted, values, 0),
        "special": file.special.tolist(),
        "peak": peak,
        "maximum": maximum,
        "scale": max(known or 0.0, maximum),
        "share": maximum / known if known else None,
        "n_fires": int((strength > 0).sum()),
        "n_counted": int(counted.sum()),
    }


def _maximum(view: FeatureView | None, index: int) -> float | None:
    try:
        return float(view.opened().column("maximum")[index]) or None if view is not None else None
    except (featurefile.ViewError, IndexError):
        return None
