"""Pages of what may be had and given: access to a repository of the Hub, archives to download, uploads."""

from __future__ import annotations

from typing import Any

from django.contrib import messages
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseBase
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.http import require_POST

from saehub.accounts.access import check, needs
from saehub.streaming import stored
from saes.hub_access import access_of
from saes.models import SAE
from saes.one_sae import detail_page
from saes.sharing import ExportForm, UploadForm, archive


@needs("saes.view_sae")
def sae_access(request: HttpRequest, pk: int) -> HttpResponse:
    """Whether the Hub gives this SAE's files to who asks, asked now; and step by step what to do where it does not."""
    sae = _row(pk)
    if not sae.repo_id:
        raise Http404(f"{sae.name} has no repository on the Hub.")
    context = {"section": "saes", "sae": sae, "access": access_of(request.user, sae.repo_id)}
    return render(request, "saes/sae_access.html", context)


@require_POST
@needs("saes.view_sae", post="saes.add_sae")
def sae_export(request: HttpRequest, pk: int) -> HttpResponse:
    """Queue an archive of the SAE in a format."""
    sae = _row(pk)
    return _started(request, sae, "export_form", ExportForm(request.POST, sae=sae, auto_id="export_%s"))


@require_POST
@needs("saes.view_sae", post="saes.add_sae")
def sae_upload(request: HttpRequest, pk: int) -> HttpResponse:
    """Queue an upload of the SAE to the Hub, with the token of who asks."""
    sae = _row(pk)
    return _started(request, sae, "upload_form", UploadForm(request.POST, sae=sae, auto_id="upload_%s"))


def _row(pk: int) -> SAE:
    return get_object_or_404(SAE.objects.select_related("model", "owner", "release", "job"), pk=pk)


def _started(request: HttpRequest, sae: SAE, name: str, form: Any) -> HttpResponse:
    if not form.is_valid():
        return detail_page(request, sae, "share", **{name: form})
    try:
        form.make(request.user)
    except ValueError as error:
        messages.error(request, str(error))
    return redirect(f"{sae.get_absolute_url()}?tab=share")


@needs("saes.view_sae", post="saes.add_sae")
def sae_archive(request: HttpRequest, pk: int, format: str) -> HttpResponseBase:
    """An archive that was made; a POST removes it."""
    sae = get_object_or_404(SAE, pk=pk)
    found = archive(sae, format)
    if found is None:
        raise Http404(f"No archive of {sae.name} in the format {format[:40]} was made yet.")
    if request.method == "POST":
        check(request.user, "saes.add_sae", sae)
        found.path.unlink(missing_ok=True)
        messages.success(request, f"The archive {found.name} was removed.")
        return redirect(f"{sae.get_absolute_url()}?tab=share")
    return stored(request, found.pieces(), name=found.name, kind="application/zip", size=found.size)
