"""Home: where a person stands on the way from a model to a steered generation."""

from __future__ import annotations

import shutil
from typing import Any, NamedTuple

from django.conf import settings
from django.contrib import messages
from django.db import connection
from django.db.models import Q
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.templatetags.static import static
from django.urls import reverse
from django.views.generic import TemplateView

from concepts.models import Concept, FeatureView, Label
from inference.models import Generation
from saehub.accounts.access import LOGIN, PUBLIC, allowed, needs
from saehub.fragments import part
from saehub.jobs.models import Job
from saehub.jobs.workers import troubles
from saehub.styleguide import samples
from saehub.typed import row_number, whole_number
from saes.filters import search_query
from saes.models import SAE, LanguageModel
from saes.resolve import Resolution, resolve
from training.models import Capture, Corpus, Run

SEARCH_ROWS = 25


class Step(NamedTuple):
    """A step of the checklist: done when a row of `rows` is ready."""

    text: str
    why: str
    page: str
    rows: Any
    permission: str


STEPS = (
    Step("Add a language model", "from the Hub, a folder or a GGUF file", "saes:model_create", LanguageModel, "saes.add_languagemodel"),
    Step("Add a corpus", "text for the model to read: a file, pasted text, a dataset", "training:corpus_create", Corpus, "training.add_corpus"),
    Step("Capture activations", "the model reads the corpus once", "training:capture_create", Capture, "training.add_capture"),
    Step("Train an SAE", "on a capture; evaluation and features follow by themselves", "training:run_create", Run, "training.add_run"),
    Step("Look at its features", "top texts, logits, neighbours; give them names", "saes:sae_list", FeatureView, "saes.view_sae"),
    Step("Steer a generation", "turn a feature up and see what is written", "inference:generation_create", Generation, "inference.add_generation"),
)  # fmt: skip
HELD = (
    ("models", LanguageModel, "saes:model_list", "saes.view_languagemodel"),
    ("corpora", Corpus, "training:corpus_list", "training.view_corpus"),
    ("captures", Capture, "training:capture_list", "training.view_capture"),
    ("SAEs", SAE, "saes:sae_list", "saes.view_sae"),
)


@needs(LOGIN)
def home(request: HttpRequest) -> HttpResponse:
    jobs = list(Job.objects.all()[:6]) if allowed(request.user, "jobs.view_job") else []
    live = {"jobs": jobs, "live": any(job.is_live for job in jobs)}
    if part(request, "jobs"):
        return render(request, "home.html#jobs", live)
    steps = [
        step._asdict() | {"done": step.rows.objects.ready().exists(), "may": allowed(request.user, step.permission)}
        for step in STEPS
    ]
    context = live | {
        "section": "home",
        "steps": steps,
        "done": sum(step["done"] for step in steps),
        "first_open": next((i for i, step in enumerate(steps) if not step["done"]), None),
        "saes": SAE.objects.ready().select_related("model")[:6],
        "runs": Run.objects.select_related("job")[:4],
        "generations": Generation.objects.ready().select_related("sae")[:4],
        "held": [
            (name, rows.objects.ready().count(), page)
            for name, rows, page, permission in HELD
            if allowed(request.user, permission)
        ],
        "known": SAE.objects.filter(ready_at=None).count(),
        "free": shutil.disk_usage(settings.DATA_DIR).free,
    }
    return render(request, "home.html", context)


@needs("saes.view_sae")
def search(request: HttpRequest) -> HttpResponse:
    """The omnibox: `sae/123` or `name/123` opens that feature; an id or address of an SAE its page (saes/resolve.py says which
    are known); anything else is looked for in names."""
    text = request.GET.get("q", "").strip()[:500]
    feature = _feature_named(text)
    if feature:
        return redirect(feature)
    meant = resolve(text)
    if meant.sae is not None:
        return _opened(request, meant.sae, meant)
    words = search_query(text)
    found = [
        (title, list(rows.objects.filter(match).select_related("job")[:SEARCH_ROWS]))
        for title, rows, permission, match in (
            ("SAEs", SAE, "saes.view_sae", Q(words=words) if words else Q(pk__in=[])),
            (
                "Language models",
                LanguageModel,
                "saes.view_languagemodel",
                Q(name__icontains=text) | Q(location__icontains=text),
            ),
            ("Corpora", Corpus, "training.view_corpus", Q(name__icontains=text) | Q(location__icontains=text)),
            ("Captures", Capture, "training.view_capture", Q(name__icontains=text)),
            ("Training runs", Run, "training.view_run", Q(name__icontains=text) | Q(hook_name__icontains=text)),
            ("Generations", Generation, "inference.view_generation", Q(prompt__icontains=text)),
        )
        if text and allowed(request.user, permission)
    ]
    found += _meanings(request, text) if text else []
    same_words = any(rows and rows[0]._meta.model is SAE for _, rows in found)
    said = bool(meant.saes or meant.nearest)  # then the SAEs with the same words are one link
    found = [(title, rows) for title, rows in found if rows and not (rows[0]._meta.model is SAE and said)]
    rows: list[Any] = [row for _, group in found for row in group]
    if len(rows) == 1 and not said and not meant.place:
        return redirect(rows[0].get_absolute_url())
    more = len(found) > 0 and found[0][0] == "SAEs" and len(found[0][1]) == SEARCH_ROWS
    context = {"q": text, "found": found, "meant": meant, "more_saes": more, "same_words": same_words}
    return render(request, "search.html", context)


def _meanings(request: HttpRequest, text: str) -> list[tuple[str, list[Any]]]:
    """Features by their labels, and concepts by their names."""
    groups: list[tuple[str, list[Any]]] = []
    if allowed(request.user, "concepts.view_label"):
        rows = Label.objects.with_words(text).select_related("sae")
        groups.append(("Labels of features", list(rows[:SEARCH_ROWS])))
    if allowed(request.user, "concepts.view_conceptdictionary"):
        concepts = Concept.objects.filter(name__icontains=text).select_related("dictionary__sae")
        groups.append(("Concepts", list(concepts[:SEARCH_ROWS])))
    return groups


def _opened(request: HttpRequest, sae: SAE, meant: Resolution) -> HttpResponse:
    """The page of the SAE that was meant, or of its feature, which says how the text was read."""
    messages.info(request, meant.said)
    if meant.feature is not None and sae.ready and meant.feature < sae.n_features:
        return redirect("concepts:feature_detail", sae.pk, meant.feature)
    return redirect(sae.get_absolute_url())


def _feature_named(text: str) -> str:
    """Address of the feature that `<SAE id or name>/<index>` names, or ""."""
    name, slash, index = text.rpartition("/")
    feature = whole_number(index)
    if not slash or feature is None:
        return ""
    match = Q(name__iexact=name.strip()) | Q(pk=row_number(name))
    sae = SAE.objects.ready().filter(match).first() if name.strip() else None
    return reverse("concepts:feature_detail", args=[sae.pk, feature]) if sae else ""


@needs(PUBLIC)
def health(request: HttpRequest) -> HttpResponse:
    """For probes: the site answers and its database too."""
    connection.ensure_connection()
    return HttpResponse("ok\n", content_type="text/plain")


@needs(PUBLIC)
def ready(request: HttpRequest) -> HttpResponse:
    """For probes: 200 where all that people ask for can be done, else 503 with what is missing."""
    missing = troubles()
    return HttpResponse(
        "".join(f"{text}\n" for text in missing or ["ready"]), status=503 if missing else 200, content_type="text/plain"
    )


@needs(PUBLIC)
def favicon(request: HttpRequest) -> HttpResponse:
    """Browsers ask here for the icon of pages that name none, such as those of the admin."""
    return redirect(static("icon.svg"))


style = needs(LOGIN)(TemplateView.as_view(template_name="styleguide.html", extra_context={"samples": samples}))
api_docs = needs(LOGIN)(TemplateView.as_view(template_name="api_docs.html"))
