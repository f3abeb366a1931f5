"""Pages of one SAE: what it is, importing it, saying what its files lack, curating it, taking it away."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from django import forms
from django.conf import settings
from django.contrib import messages
from django.core.exceptions import PermissionDenied
from django.db import transaction
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.urls import reverse
from django.views.decorators.http import require_POST

from saehub.accounts.access import OTHERS, check, needs
from saehub.fragments import part
from saehub.jobs.kinds import KINDS
from saehub.jobs.models import Job, State, enqueue
from saehub.typed import row_number
from saes.abilities import abilities
from saes.card import model_card
from saes.claims import claims
from saes.compatibility import NO, fits
from saes.dependents import dependents, users
from saes.fetching import fetch
from saes.history import ADDITION, note, notes_of
from saes.import_forms import FactsForm, ImportForm
from saes.metrics import density_chart, grouped
from saes.models import SAE, HubRepository
from saes.recommended import recommended_beside
from saes.removal import InUse, in_cache, may_remove, remove
from saes.same_weights import twins_of
from saes.sharing import ExportForm, UploadForm, archives, licence_of, may_upload, uploads_of
from saes.snippets import snippets
from saes.tags import starred_by

TABS = {"overview": "Overview", "files": "Files and conversion proof", "python": "How to load in Python", "share": "Export and upload",
        "history": "History"}  # fmt: skip
BRINGING = ("download", "adopt", "inspect")
MEASURING = ("evaluate", "harvest", "verify", "export_sae", "upload_sae")


# ------------------------------------------------------------------------------------------------------- what it is


@needs("saes.view_sae")
def sae_detail(request: HttpRequest, pk: int) -> HttpResponse:
    rows = SAE.objects.select_related("model", "owner", "release", "job", "run__capture__corpus")
    sae = rows.filter(pk=pk).first()
    return _refused(request, pk) if sae is None else detail_page(request, sae)


def _refused(request: HttpRequest, pk: int) -> HttpResponse:
    """Whoever watched an import that was refused is led to its job, which says why. Raises Http404 for any other number."""
    job = refusal_of(pk)
    if job is None:
        raise Http404
    if part(request, "live"):
        return HttpResponse(status=204, headers={"HX-Redirect": job.get_absolute_url()})
    return redirect(job)


def refusal_of(pk: int) -> Job | None:
    """The job of the import that was refused, or of the download of nothing: there is therefore no SAE of that number."""
    return (
        Job.objects.filter(kind__in=("adopt", "download"), subject_id=None, params__sae=pk)
        .exclude(state=State.DONE)
        .first()
    )


def detail_page(request: HttpRequest, sae: SAE, tab: str = "", **filled: forms.Form) -> HttpResponse:
    """The page of an SAE, with forms that were sent and are not right: `facts_form`, `export_form`, `upload_form`."""
    tab = tab or request.GET.get("tab", "")
    tab = tab if tab in TABS else "overview"
    jobs = jobs_of(sae)
    context = {
        "section": "saes",
        "sae": sae,
        "tab": tab,
        "tabs": TABS,
        "jobs": jobs,
        "busy": any(job.is_live for job in jobs),
        "can_now": abilities(sae),
        "twins": twins_of(sae),
        "hub": hub_address(),
        "licence": licence_of(sae),
        "repository": HubRepository.objects.filter(repo_id=sae.repo_id).first() if sae.repo_id else None,
        "starred": starred_by(request.user),
        "facts_form": FactsForm(sae.asked, initial=sae.facts) if sae.asked and not sae.ready and not sae.busy else None,
    }
    shows = {"overview": _overview, "files": _files, "python": _python, "share": _share, "history": _history}
    context |= shows[tab](sae)
    if tab == "overview":
        context |= _measured(sae, request.GET.get("evaluation", ""))
    if tab == "share":
        context["may_upload"] = may_upload(request.user)
    wrong = any(form.errors for form in filled.values())
    return render(
        request, "saes/sae_detail.html" + part(request, "live"), context | filled, status=422 if wrong else 200
    )


def hub_address() -> str:
    """Where links to the Hub lead."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


def _overview(sae: SAE) -> dict[str, Any]:
    found = fits(sae)
    return {
        "evaluations": sae.evaluations.select_related("capture__corpus", "corpus", "job", "owner")[:20],
        "captures": _fitting_captures(sae),
        "claims": claims(sae),
        "fits": found,
        "others": [fit for fit in found if fit.level == NO and not fit.named],
        "beside": recommended_beside(sae),
        "curations": SAE.Curation.choices,
    }


def _measured(sae: SAE, evaluation: str) -> dict[str, Any]:
    """The figures of the newest evaluation, or of the one that the address names."""
    pk = row_number(evaluation)
    chosen = sae.evaluations.ready().filter(pk=pk).first() if pk else None
    metrics = chosen.metrics if chosen else sae.metrics
    return {"chosen": chosen, "metrics": grouped(metrics), "density": density_chart(metrics)}


@dataclass(frozen=True)
class File:
    name: str
    bytes: int | None
    sha256: str
    missing: bool


def _files(sae: SAE) -> dict[str, Any]:
    found = []
    if sae.ready:
        anchor = sae.files if sae.files.is_dir() else sae.files.parent
        known = sae.checksums or {
            path.name: {
                "bytes": path.stat().st_size,
                "sha256": sae.sha256 if path.name.startswith("sae_weights") else "",
            }
            for path in (sorted(anchor.iterdir()) if anchor.is_dir() else [])
            if path.is_file()
        }
        found = [
            File(name, entry.get("bytes"), entry.get("sha256", ""), not (anchor / name).is_file())
            for name, entry in sorted(known.items())
        ]
    source = [File(name, entry["bytes"], entry["sha256"], False) for name, entry in sae.proof.get("source", {}).items()]
    return {"files": found, "sources": source, "gone": sae.ready and (not found or any(file.missing for file in found))}


def _python(sae: SAE) -> dict[str, Any]:
    return {"snippets": snippets(sae)}


def _share(sae: SAE) -> dict[str, Any]:
    licence = licence_of(sae)
    return {
        "archives": archives(sae),
        "uploads": uploads_of(sae),
        "card": model_card(sae, "saelens", licence=licence) if sae.ready else "",
        "export_form": ExportForm(sae=sae, auto_id="export_%s"),
        "upload_form": UploadForm(sae=sae, auto_id="upload_%s"),
    }


def _history(sae: SAE) -> dict[str, Any]:
    kinds = [kind.name for kind in KINDS.values() if kind.subject == "sae"]
    past = Job.objects.filter(kind__in=kinds, subject_id=sae.pk).select_related("owner")[:50]
    return {"notes": notes_of(sae), "past_jobs": past}


def jobs_of(sae: SAE) -> list[Job]:
    """The newest job of each kind that works on this SAE, where it is on or went wrong; how it came here is over then."""
    kinds = MEASURING if sae.ready else (*BRINGING, *MEASURING)
    newest = Job.objects.filter(kind__in=kinds, subject_id=sae.pk).order_by("kind", "-pk").distinct("kind")
    return [job for job in newest.select_related("owner") if job.is_live or job.state == State.FAILED]


def _fitting_captures(sae: SAE) -> list[Any]:
    """Finished captures of its model that hold its hook point, the one it was trained on first."""
    if sae.model is None:
        return []
    fitting = list(sae.model.captures.ready().filter(hook_names__contains=[sae.hook_name])[:50])
    run = getattr(sae, "run", None)
    return sorted(fitting, key=lambda capture: run is None or capture.pk != run.capture_id)


# ------------------------------------------------------------------------------------------------------- what starts


@require_POST
@needs("saes.view_sae", post="saes.view_sae")
def sae_start(request: HttpRequest, pk: int) -> HttpResponse:
    """Queue what brings or checks an SAE: download, inspect or verify. Each asks for its own permission."""
    sae = get_object_or_404(SAE.objects.select_related("job", "model"), pk=pk)
    kind = request.POST.get("kind", "")
    try:
        start(sae, kind, request.user)
    except ValueError as error:
        messages.error(request, str(error))
    return redirect(sae)


def start(sae: SAE, kind: str, user: Any) -> Job:
    """Queue one of the jobs that bring or check an SAE, or return the one that is on. Raises ValueError, PermissionDenied."""
    if kind not in ("download", "inspect", "verify"):
        raise ValueError(f"There is nothing of the name {kind[:40]} to start.")
    check(user, KINDS[kind].permission, sae)
    if kind == "download" and sae.ready:
        raise ValueError(f"{sae.name} is on this machine already.")
    if kind == "verify" and not sae.ready:
        raise ValueError(f"{sae.name} has no files on this machine; download it first.")
    if kind != "verify" and not sae.repo_id:
        raise ValueError(f"{sae.name} has no repository on the Hub.")
    running = Job.objects.live().filter(kind=kind, subject_id=sae.pk).first()
    if running is not None:
        return running
    if kind == "download":
        fetch(user, [sae])  # of two people at once, one starts it
        return Job.objects.get(pk=SAE.objects.values_list("job", flat=True).get(pk=sae.pk))
    return enqueue(kind, user, title=f"{KINDS[kind].title}: {sae.name}", sae=sae.pk)


@require_POST
@needs("saes.view_sae", post="saes.add_sae")
def sae_facts(request: HttpRequest, pk: int) -> HttpResponse:
    """Say what the files could not; the import or download then goes on."""
    sae = get_object_or_404(SAE.objects.select_related("job", "model", "release"), pk=pk)
    check(request.user, "saes.add_sae", sae)
    if sae.ready or sae.busy or not sae.asked:
        messages.info(request, "Nothing is asked of this SAE any more.")
        return redirect(sae)
    form = FactsForm(sae.asked, request.POST)
    if not form.is_valid():
        return detail_page(request, sae, facts_form=form)
    if not resume(sae, form.facts(), request.user):
        messages.info(request, "Nothing is asked of this SAE any more.")
    return redirect(sae)


@transaction.atomic
def resume(sae: SAE, facts: dict[str, Any], user: Any) -> bool:
    """Keep what somebody said of an SAE and go on with bringing it here; of two people at once, one does."""
    sae = SAE.objects.select_for_update(of=("self",)).select_related("job").get(pk=sae.pk)
    if sae.ready or sae.busy or not sae.asked:
        return False
    sae.facts = {**sae.facts, **facts}
    sae.asked = []
    sae.save(update_fields=["facts", "asked"])
    note(user, sae, f"Said: {', '.join(f'{name} = {value}' for name, value in facts.items())}"[:2000])
    sae.start(user)
    return True


class CurationForm(forms.Form):
    curation = forms.ChoiceField(choices=SAE.Curation.choices, required=False)
    notes = forms.CharField(required=False, max_length=20_000)
    licence = forms.CharField(required=False, max_length=60)
    pin = forms.CharField(required=False, max_length=200)


@require_POST
@needs("saes.view_sae", post="saes.change_sae")
def sae_curate(request: HttpRequest, pk: int) -> HttpResponse:
    sae = get_object_or_404(SAE, pk=pk)
    check(request.user, "saes.change_sae", sae)
    form = CurationForm(request.POST)
    if form.is_valid():
        curate(sae, request.user, **form.cleaned_data)
        messages.success(request, f"{sae.name} is {sae.get_curation_display()}.")
    else:
        messages.error(request, " ".join(str(error) for errors in form.errors.values() for error in errors))
    return redirect(sae)


def curate(
    sae: SAE,
    user: Any,
    *,
    curation: str = "",
    notes: str | None = None,
    name: str = "",
    licence: str | None = None,
    pin: str | None = None,
) -> None:
    """Change what people say of an SAE, with a line in its history for what really changed."""
    said = []
    if curation and curation != sae.curation:
        said.append(f"{sae.get_curation_display()} → {SAE.Curation(curation).label}")
        sae.curation = curation
    if name and name != sae.name:
        said.append(f"Renamed from {sae.name}")
        sae.name = name
    if notes is not None and notes != sae.notes:
        said.append("Notes changed")
        sae.notes = notes
    if licence is not None and licence != sae.licence:
        said.append(f"Licence: {licence or 'not stated'}")
        sae.licence = licence
    if pin is not None and pin != sae.pin:
        said.append(f"Recommended: {pin}" if pin else "Recommended no more")
        sae.pin = pin
    if said:
        sae.save(update_fields=["curation", "notes", "name", "licence", "pin"])
        note(user, sae, "; ".join(said))


# ------------------------------------------------------------------------------------------------------- bringing it


@needs("saes.add_sae")
def sae_import(request: HttpRequest) -> HttpResponse:
    form = ImportForm(request.POST or None, request.FILES or None, user=request.user)
    if request.method == "POST" and form.is_valid():
        sae = form.make()
        where = f"from {sae.facts['server_path']}" if "server_path" in sae.facts else "of files that were sent"
        note(request.user, sae, f"Imported {where}", ADDITION)
        return redirect(sae)
    context = {
        "section": "saes",
        "form": form,
        "roots": settings.IMPORT_DIRS,
        "limit": settings.SAE_UPLOAD_LIMIT,
    }
    return render(request, "saes/sae_import.html", context, status=422 if form.errors else 200)


# ------------------------------------------------------------------------------------------------------- taking it away


@needs("saes.delete_sae")
def sae_delete(request: HttpRequest, pk: int) -> HttpResponse:
    """What hangs on it first; then it goes, or only its files."""
    sae = get_object_or_404(SAE.objects.select_related("model", "owner", "release", "job"), pk=pk)
    if not may_remove(request.user, sae):
        raise PermissionDenied
    busy: list[str] = users(sae)
    if request.method == "POST":
        keep_row = request.POST.get("what") == "files"
        try:
            said = remove(
                sae,
                request.user,
                keep_row=keep_row,
                from_cache="from_cache" in request.POST,
                force="force" in request.POST,
            )
        except InUse as error:
            busy = error.users
        except ValueError as error:
            messages.error(request, str(error))
        else:
            messages.success(request, said)
            return redirect(sae if keep_row else reverse("saes:sae_list"))
    context = {
        "section": "saes",
        "sae": sae,
        "dependents": dependents(sae),
        "users": busy,
        "cached": in_cache(sae),
        "may_force": request.user.has_perm(OTHERS),  # type: ignore[union-attr]
    }
    return render(request, "saes/sae_delete.html", context, status=409 if request.method == "POST" else 200)
