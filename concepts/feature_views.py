"""The page of one feature: what is known of it, its labels, and a field for a text of one's own."""

from __future__ import annotations

import random
from collections.abc import Collection
from typing import Any

import numpy as np
from django.http import Http404, HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import get_object_or_404, render

from concepts import exports, featurefile
from concepts.chosen import chosen_view, columns_of, feature_url, kept, no_feature, views_of
from concepts.concept_forms import LabelForm, MemberForm
from concepts.models import Concept, FeatureView, Label, name_of, usual_strength
from concepts.snippets import CONTEXTS, LINES, SCALES, as_python, fires_chart, groups
from saehub.accounts.access import needs
from saehub.charts import Chart, histogram
from saes.abilities import why_not
from saes.models import SAE

SHOWN_LABELS = 6
SHOWN_CONCEPTS = 20
SHOWN_CHANGES = 10
OFFERED_CONCEPTS = 100


@needs("concepts.view_featureview")
def feature_detail(request: HttpRequest, pk: int, index: int) -> HttpResponse:
    """Also before a harvest: a feature can be named, tried on a text and steered by its number alone."""
    sae = get_object_or_404(SAE.objects.select_related("model", "run__capture"), pk=pk)
    if index >= sae.n_features:
        raise Http404(no_feature(sae, index))
    views = views_of(sae)
    view = chosen_view(request, sae, views)
    columns, fault = columns_of(view)
    labels = list(Label.objects.filter(sae=sae, feature=index).select_related("owner"))
    record = columns.feature(index) if columns is not None else None
    if request.GET.get("format") == "json":
        numbers = _as_json(view, columns, record) if view and columns and record else {}
        own = {"sae": sae.pk, "feature": index, "labels": [_label(label) for label in labels]}
        return JsonResponse(own | numbers)
    labels.sort(key=lambda label: not label.accepted)
    fires = fires_chart(record) if record is not None else None  # drawn meanwhile
    in_concepts = Concept.objects.filter(dictionary__sae=sae, members__feature=index).select_related("dictionary")
    context = {
        "section": "saes",
        "sae": sae,
        "index": index,
        "views": views,
        "view": view,
        "fault": fault,
        "labels": labels[:SHOWN_LABELS],
        "more_labels": labels[SHOWN_LABELS:],
        "accepted": next((label for label in labels if label.accepted), None),
        "label_form": LabelForm(auto_id="label_%s"),
        "changes": sae.label_changes.filter(feature=index)
        .select_related("owner")
        .defer("before", "after")[:SHOWN_CHANGES],
        "in_concepts": in_concepts[:SHOWN_CONCEPTS],
        "member_form": MemberForm(sae),
        "concept_names": Concept.objects.filter(dictionary__sae=sae).values_list("name", flat=True)[:OFFERED_CONCEPTS],
        "kept": kept(request),
        "fires": fires,
        "cannot_read": why_not(sae, "harvest"),
        "text": request.GET.get("text", ""),
        "step": _steps(sae, columns, index, kept(request)),
    }
    if view is not None and columns is not None and record is not None:
        context |= _harvested(request, sae, view, columns, record)
    return render(request, "concepts/feature_detail.html", context)


def _harvested(
    request: HttpRequest,
    sae: SAE,
    view: FeatureView,
    columns: featurefile.FeatureView,
    record: featurefile.FeatureRecord,
) -> dict[str, Any]:
    """What the page shows of a feature in a view."""
    companions = columns.companions(record.feature)
    shown = [other.feature for other in record.neighbours] + [other.feature for other in companions]
    others = Label.objects.accepted_of(sae, shown)
    around, scale = _choice(request, "around", CONTEXTS), _choice(request, "scale", SCALES)
    return {
        "lens": columns.logit_lens,
        "partial": columns.facts.get("partial", False),
        "feature": record,
        "name": name_of(columns, record.feature),
        "around": around,
        "contexts": CONTEXTS,
        "scale": scale,
        "scales": SCALES,
        "lines": _choice(request, "lines", LINES),
        "line_choices": LINES,
        "line_css": "lines" if _choice(request, "lines", LINES) == "broken" else "",
        "steer_value": f"{_usual(view, record):.4g}" if record.n_fires else "",
        "groups": groups(record, around, scale),
        "logit_effects": _logit_effects(columns, record.feature) if request.GET.get("logits") == "all" else None,
        "has_effects": columns.logits_histogram(record.feature) is not None,
        "neighbours": [
            (other, others.get(other.feature), name_of(columns, other.feature)) for other in record.neighbours
        ],
        "companions": [(other, others.get(other.feature), name_of(columns, other.feature)) for other in companions],
        "n_together": columns.n_together,
        "formats": exports.FORMATS,
        "python": as_python(sae, view, record),
    }


def _usual(view: FeatureView, record: featurefile.FeatureRecord) -> float:
    per_norm = record.decoder_norm / view.layer_norm if record.decoder_norm and view.layer_norm else None
    return usual_strength(record.maximum, per_norm)


def _logit_effects(columns: featurefile.FeatureView, feature: int) -> Chart | None:
    """Drawn where it is asked for: a chart costs more than the rest of the page."""
    found = columns.logits_histogram(feature)
    if found is None:
        return None
    n, x_title = f"{int(found.counts.sum()):,} tokens", "added to the logit"
    return histogram(
        found.counts, found.edges, title="Logit effects", x_title=x_title, n=n, log_y=True, size=(340, 190)
    )


def _choice(request: HttpRequest, name: str, choices: Collection[str]) -> str:
    """A parameter of the URL that is one of `choices`, else the default: the first."""
    value = request.GET.get(name, "")
    return value if value in choices else next(iter(choices))


def _steps(sae: SAE, columns: featurefile.FeatureView | None, index: int, keep: dict[str, str]) -> dict[str, str]:
    """Where previous, next and random lead. Random is a feature that fires, so that there is something to see."""
    where = {"previous": index - 1, "next": index + 1}
    alive = np.flatnonzero(columns.summary["n_fires"]) if columns is not None else range(sae.n_features)
    if len(alive):
        where["random"] = int(alive[random.randrange(len(alive))])
    return {name: feature_url(sae, i, keep) for name, i in where.items() if 0 <= i < sae.n_features}


def _label(label: Label) -> dict[str, Any]:
    return {
        "text": label.text, "accepted": label.accepted, "source": label.source, "by": label.by, "method": label.method,
        "owner": label.owner.username if label.owner else None, "score": label.score, "confidence": label.confidence,
        "notes": label.notes,
    }  # fmt: skip


def _as_json(view: FeatureView, columns: featurefile.FeatureView, record: featurefile.FeatureRecord) -> dict[str, Any]:
    alive = record.n_fires > 0
    return {
        "view": view.pk,
        "label": Label.objects.accepted_of(view.sae, [record.feature]).get(record.feature, ""),
        "name": name_of(columns, record.feature),
        "n_tokens": record.n_tokens,
        "n_fires": record.n_fires,
        "density": record.density,
        "maximum": record.maximum if alive else None,
        "mean": record.mean if alive else None,
        "decoder_norm": record.decoder_norm,
        "layer_norm": view.layer_norm,
        "top_tokens": [{"id": t.id, "text": t.text, "count": t.count, "sum": t.total} for t in record.top_tokens],
        "raised": [{"id": t.id, "text": t.text, "value": t.value} for t in record.raised],
        "lowered": [{"id": t.id, "text": t.text, "value": t.value} for t in record.lowered],
        "neighbours": [{"feature": n.feature, "cosine": n.cosine} for n in record.neighbours],
        "together": [vars(one) for one in columns.companions(record.feature)],
        "n_together": columns.n_together,
    }
