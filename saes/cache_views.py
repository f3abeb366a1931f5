"""The page of the Hub's cache: what lies on this machine, who needs it, and clearing what nobody does."""

from __future__ import annotations

import os
from typing import Any

from django.contrib import messages
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from huggingface_hub import constants

from saehub.accounts.access import needs
from saehub.figures import bytes_text
from saes.cache import look, prune

MOST = 2000


@needs("saes.view_sae", post="saes.change_sae")
def hub_cache(request: HttpRequest) -> HttpResponse:
    """What is in the cache. A POST says what would go; one with `sure` does it."""
    plan = None
    if request.method == "POST":
        keys = [key[:400] for key in request.POST.getlist("revision")][:MOST]
        sure, rests = "sure" in request.POST, "unfinished" in request.POST
        try:
            plan = prune(keys, unfinished=rests, dry_run=not sure)
        except (OSError, ValueError) as error:
            messages.error(request, f"Not all could be cleared. {error}")
            return redirect("saes:hub_cache")
        if sure:
            messages.success(request, f"{bytes_text(plan.size)} of the Hub's cache were freed.")
            return redirect("saes:hub_cache")
    context: dict[str, Any] = {"section": "saes", "cache": look(), "plan": plan, "surroundings": surroundings()}
    context["hub_offline"] = constants.is_offline_mode()
    return render(request, "saes/hub_cache.html", context)


def surroundings() -> dict[str, str]:
    """How this instance reaches the Hub: the variables that say so, as they count now."""
    return {
        "HF_ENDPOINT": f"{constants.ENDPOINT}{'' if os.environ.get('HF_ENDPOINT') else ' (not set)'}",
        "HF_HOME": f"{constants.HF_HOME}{'' if os.environ.get('HF_HOME') else ' (not set)'}",
        "HF_HUB_CACHE": str(constants.HF_HUB_CACHE),
        "HF_HUB_OFFLINE": "set: the Hub is never asked" if constants.is_offline_mode() else "not set",
        "HTTPS_PROXY": "set" if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy") else "not set",
    }
