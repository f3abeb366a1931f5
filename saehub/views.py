"""Home: where a person stands on the way from a model to a steered generation."""

from __future__ import annotations

from typing import Any

from django.db import connection
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.views.generic import TemplateView

from concepts.models import FeatureView
from inference.models import Generation
from saehub.accounts.access import LOGIN, PUBLIC, allowed, needs
from saehub.jobs.models import Job
from saes.models import SAE, LanguageModel
from training.models import Capture, Corpus, Run

STEPS: tuple[tuple[str, str, Any, str], ...] = (
    ("Add a language model", "saes:model_create", LanguageModel, "saes.add_languagemodel"),
    ("Add a corpus", "training:corpus_create", Corpus, "training.add_corpus"),
    ("Capture activations", "training:capture_create", Capture, "training.add_capture"),
    ("Train an SAE", "training:run_create", Run, "training.add_run"),
    ("Look at its features", "saes:sae_list", FeatureView, "saes.view_sae"),
    ("Steer a generation", "inference:generation_create", Generation, "inference.add_generation"),
)


@needs(LOGIN)
def home(request: HttpRequest) -> HttpResponse:
    jobs = list(Job.objects.all()[:6])
    live = {"jobs": jobs, "live": any(job.is_live for job in jobs)}
    if request.htmx:
        return render(request, "home.html#jobs", live)
    steps = [
        (text, page, rows.objects.ready().exists(), allowed(request.user, permission))
        for text, page, rows, permission in STEPS
    ]
    context = live | {
        "section": "home",
        "steps": steps,
        "done": sum(done for _, _, done, _ in steps),
        "first_open": next((i for i, (_, _, done, _) in enumerate(steps) if not done), None),
        "saes": SAE.objects.ready().select_related("model")[:6],
        "generations": Generation.objects.ready().select_related("sae")[:4],
    }
    return render(request, "home.html", context)


@needs(PUBLIC)
def health(request: HttpRequest) -> HttpResponse:
    """For probes: the site answers and its database too."""
    connection.ensure_connection()
    return HttpResponse("ok\n", content_type="text/plain")


style = needs(LOGIN)(TemplateView.as_view(template_name="styleguide.html"))
