"""Home: where a person stands on the way from a model to a steered generation."""

from __future__ import annotations

from django.db import connection
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.views.generic import TemplateView

from concepts.models import FeatureView
from inference.models import Generation
from saehub.accounts.access import LOGIN, PUBLIC, needs
from saehub.jobs.models import Job
from saes.models import SAE, LanguageModel
from training.models import Capture, Corpus, Run


@needs(LOGIN)
def home(request: HttpRequest) -> HttpResponse:
    steps = [
        ("Add a language model", "saes:model_create", LanguageModel.objects.ready().exists()),
        ("Add a corpus", "training:corpus_create", Corpus.objects.ready().exists()),
        ("Capture activations", "training:capture_create", Capture.objects.ready().exists()),
        ("Train an SAE", "training:run_create", Run.objects.ready().exists()),
        ("Look at its features", "saes:sae_list", FeatureView.objects.ready().exists()),
        ("Steer a generation", "inference:generation_create", Generation.objects.ready().exists()),
    ]
    context = {
        "section": "home",
        "steps": steps,
        "done": sum(done for *_, done in steps),
        "jobs": Job.objects.select_related("owner")[:6],
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
