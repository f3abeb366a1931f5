"""Pages of the registry: the one list, downloads from the Hub, the basket."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from django.contrib import messages
from django.core.paginator import Paginator
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseBase, QueryDict
from django.shortcuts import redirect, render
from django.urls import reverse
from huggingface_hub.constants import is_offline_mode

from saehub.accounts.access import needs
from saehub.accounts.hub_tokens import HubTokenError, hub_token
from saehub.fragments import back_to, part
from saehub.jobs.models import enqueue
from saehub.jobs.progress import JobError
from saehub.streaming import small_file
from saehub.typed import whole_number
from saes import gemma_scope
from saes.basket import MOST, basket_of, put_in, take_out
from saes.batch import BatchSpec
from saes.fetching import Fetched, fetch, row_at
from saes.filters import Filters, number
from saes.listing import PAGE
from saes.models import SAE
from saes.one_sae import refusal_of
from saes.recommended import models_with_saes, recommended
from saes.registry import Row, registry
from saes.repository import StillAsking, known_gemma_scope, listing_of, places, variants
from saes.resolve import Place, place_of
from saes.same_weights import here_as
from saes.tags import starred_by

MOST_AT_ONCE = 500
NOT_A_PLACE = (
    "{} is not a repository; they look like google/gemma-scope-2b-pt-res, and an address on the Hub will do too."
)


# -- the list ----------------------------------------------------------------------------------------------------------
@needs("saes.view_sae")
def sae_list(request: HttpRequest) -> HttpResponse:
    """Every SAE this instance knows: trained here, imported, on the Hub."""
    context: dict[str, Any] = {"section": "saes", "in_basket": frozenset(basket_of(request)), "most": MOST}
    context |= {"hub_offline": is_offline_mode()} | registry(request.GET, starred_by(request.user))
    return render(request, "saes/sae_list.html" + part(request, "rows"), context)


@needs("saes.view_sae")
def sae_state(request: HttpRequest, pk: int) -> HttpResponse:
    """The cell that says how one SAE stands; it asks again while its download is on."""
    sae = SAE.objects.select_related("job").filter(pk=pk).first()
    context = {"row": Row(sae)} if sae else {"row": None, "refusal": refusal_of(pk)}
    return render(request, "saes/sae_list.html#state", context)


@needs("saes.view_sae")
def sae_recommended(request: HttpRequest) -> HttpResponse:
    """Of each site and layer of a model the SAE to begin with, and why it is that one."""
    models = models_with_saes()
    model = request.GET.get("model", "")[:120] or (models[0][0] if models else "")
    known = any(name == model for name, _ in models)
    rows = recommended(model) if model else []
    context = {"section": "saes", "models": models, "model": model, "known": known, "rows": rows}
    return render(request, "saes/sae_recommended.html", context)


@needs("saes.change_sae")
def catalogue_sync(request: HttpRequest) -> HttpResponseBase:
    """Queue a sync with the public directory, and show its job."""
    if request.method != "POST":
        raise Http404
    return redirect(enqueue("sync", request.user, title="Sync the catalogue").get_absolute_url())


# -- downloads ---------------------------------------------------------------------------------------------------------
@needs("saes.add_sae")
def sae_download(request: HttpRequest) -> HttpResponseBase:
    """Choose SAEs of a repository on the Hub; of Gemma Scope by layer, site, width and L0."""
    if request.method == "POST":
        return _download(request)
    text = request.GET.get("repo", "").strip()[:400]
    place = place_of(text) if text else None
    context: dict[str, Any] = {
        "section": "saes",
        "text": text,
        "place": place,
        "gemma_scope": known_gemma_scope(),
        "hub_offline": is_offline_mode(),
        "q": request.GET.get("q", "").strip()[:200] or (place.path if place else ""),
    }
    status = 200
    if text and place is None:
        context["fault"], status = NOT_A_PLACE.format(text), 422
    elif place is not None:
        place = Place(place.repo_id, place.path, request.GET.get("revision", "").strip()[:80] or place.revision)
        context |= {"place": place} | _held(request, place, context["q"])
    return render(request, "saes/sae_download.html" + part(request, "found"), context, status=status)


def _held(request: HttpRequest, place: Place, q: str) -> dict[str, Any]:
    """What the repository holds, or why that is not known: the Hub's own sentence, or that it is still being asked."""
    try:
        token = hub_token(request.user)
        if gemma_scope.is_gemma_scope(place.repo_id):
            return _gemma_scope(request, place, token)
        return _places(request, place, q, token)
    except StillAsking as error:
        return {"asking": str(error)}
    except (JobError, HubTokenError) as error:
        return {"fault": str(error), "hint": error.hint}


def _places(request: HttpRequest, place: Place, q: str, token: str | None) -> dict[str, Any]:
    listing = listing_of(place.repo_id, place.revision, token)
    found = places(place.repo_id, listing.files)
    shown = [one for one in found if all(word in one.path.lower() for word in q.lower().split())]
    if not shown and q and any(one.path and q.startswith(f"{one.path}/") for one in found):  # a file inside of one
        shown = [one for one in found if one.path and q.startswith(f"{one.path}/")]
    page = Paginator(shown, PAGE).get_page(request.GET.get("page"))
    return {
        "page": page,
        "rows": _rows(place.repo_id, list(page), listing),
        "n_found": len(found),
        "n_files": len(listing.files),
        "commit": listing.commit,
        "offline": listing.offline,
    }


def _gemma_scope(request: HttpRequest, place: Place, token: str | None) -> dict[str, Any]:
    chosen = {key: request.GET.get(key, "")[:20] for key in gemma_scope.FACETS}
    live = bool(request.GET.get("live") or place.revision)
    every, source = variants(place.repo_id, place.revision, token, live=live)
    if place.path and not any(chosen.values()):
        every = [
            one for one in every if f"{place.path}/".startswith(f"{one.path}/") or one.path.startswith(f"{place.path}/")
        ] or every
    shown = gemma_scope.narrowed(every, chosen)
    if request.GET.get("canonical"):
        shown = [one for one in shown if one.canonical]
    wanted = number(request.GET.get("l0"))
    if wanted is not None:
        shown = gemma_scope.nearest_each(shown, wanted)
    page = Paginator(shown, PAGE).get_page(request.GET.get("page"))
    listing = listing_of(place.repo_id, place.revision, token) if source == "the Hub" else None  # it was just asked
    labels = {"layer": "Layer", "site": "Site", "width": "Features", "size": "L0 size"}
    return {
        "scope": True,
        "page": page,
        "rows": _rows(place.repo_id, list(page), listing),
        "n_found": len(every),
        "source": source,
        "facets": [
            (key, labels[key], chosen[key], values)
            for key, values in gemma_scope.counts(every, chosen).items()
            if len(values) > 1 or chosen[key]
        ],
        "l0": request.GET.get("l0", "")[:20],
        "l0_wrong": bool(request.GET.get("l0")) and wanted is None,
        "canonical": bool(request.GET.get("canonical")),
        "has_canonical": any(one.canonical for one in every),
        "narrowed": any(chosen.values()) or wanted is not None or bool(request.GET.get("canonical")),
    }


@dataclass(frozen=True)
class Offer:
    """An SAE that a repository holds: its row where it is known here, and another that is here with the same weights."""

    one: Any  # a Place or a Variant
    row: Row | None
    twin: SAE | None


def _rows(repo_id: str, shown: list[Any], listing: Any) -> list[Offer]:
    """Without a listing the Hub was not asked, and nothing is known of the weights."""
    known = SAE.objects.filter(repo_id=repo_id, repo_path__in=[one.path for one in shown]).select_related("job")
    rows = {sae.repo_path: Row(sae) for sae in known}
    twins = here_as(listing, shown) if listing else {}
    return [Offer(one, rows.get(one.path), twins.get(one.path)) for one in shown]


def _download(request: HttpRequest) -> HttpResponseBase:
    """Rows of the chosen places: into the basket, or queued. One alone leads to its page."""
    place = place_of(request.POST.get("repo", ""))
    pairs = [text.replace("\0", "")[:400] for text in request.POST.getlist("path")]
    if own := request.POST.get("own_path", "").replace("\0", "").strip(" /"):
        pairs.append(f"|{own}")
    back = request.POST.get("next", "")
    if place is None or not pairs or len(pairs) > MOST_AT_ONCE:
        say = (
            "Choose at least one SAE first."
            if place and not pairs
            else "That is not a choice of SAEs of one repository."
        )
        messages.error(request, say)
        return back_to(request, back, "saes:sae_download")
    rows = [_row(request, place, pair) for pair in dict.fromkeys(pairs)]
    if request.POST.get("action") == "add":
        _say_added(request, put_in(request, [row.pk for row in rows]), len(rows))
        return back_to(request, back, "saes:sae_basket")
    return _started(request, rows)


def _row(request: HttpRequest, place: Place, pair: str) -> SAE:
    """`format|path`, as the page offered it; the format only says which files are fetched, it is looked at again then."""
    form, _, path = pair.partition("|")
    revision = request.POST.get("revision", "").replace("\0", "").strip()[:80]
    return row_at(request.user, place.repo_id[:200], path.strip("/")[:300], revision=revision, format=form[:40])


def _started(request: HttpRequest, rows: list[SAE]) -> HttpResponseBase:
    found: Fetched = fetch(request.user, rows)
    take_out(request, [row.pk for row in (*found.started, *found.busy, *found.here)])
    if len(rows) == 1 and not found.refused:
        return redirect(rows[0].get_absolute_url())
    (messages.success if found.started else messages.info)(request, found.sentence())
    return redirect(f"{reverse('saes:sae_list')}?state=coming" if found.started else reverse("saes:sae_list"))


# -- the basket --------------------------------------------------------------------------------------------------------
@needs("saes.add_sae")
def sae_basket(request: HttpRequest) -> HttpResponseBase:
    """What was chosen: its size as far as it is known, the same as a spec for the terminal, and all of it at once."""
    if request.method == "POST":
        return _change_basket(request)
    rows = _chosen(basket_of(request))
    if request.GET.get("format") == "yaml":
        return small_file(_spec(rows), name="saes.yaml", kind="application/yaml")
    sizes = [row.size_bytes for row in rows if row.size_bytes]
    context = {
        "section": "saes",
        "rows": [Row(row) for row in rows],
        "total": sum(sizes),
        "unknown": len(rows) - len(sizes),
        "waiting": sum(not row.ready for row in rows),
        "spec": _spec(rows),
    }
    return render(request, "saes/sae_basket.html", context)


def _chosen(keys: list[int]) -> list[SAE]:
    rows = SAE.objects.select_related("job", "release").defer("config", "metrics", "proof", "words").in_bulk(keys)
    return [rows[key] for key in keys if key in rows]


def _spec(rows: list[SAE]) -> str:
    """The basket as `manage.py download_saes` reads it; what is nowhere on the Hub cannot be in it."""
    return BatchSpec.from_rows(row for row in rows if row.repo_id).to_yaml() if rows else ""


def _change_basket(request: HttpRequest) -> HttpResponseBase:
    action, back = request.POST.get("action", ""), request.POST.get("next", "")
    keys = [pk for text in request.POST.getlist("sae") if (pk := whole_number(text)) is not None][:MOST]
    if action == "add_all":  # what the list's filters find, on all of its pages
        keys = list(
            Filters.of(QueryDict(request.POST.get("query", "")), starred_by(request.user))
            .rows()
            .order_by("pk")
            .values_list("pk", flat=True)[:MOST]
        )
    elif action == "add_next":
        back = request.POST.get("next_page", "")
    known = list(SAE.objects.filter(pk__in=keys).values_list("pk", flat=True))
    if action == "fetch_all":
        return _started(request, _chosen(basket_of(request)))
    if action == "clear":
        take_out(request, basket_of(request))
        return redirect("saes:sae_basket")
    if action == "add_next" and not known:
        return back_to(request, back, "saes:sae_list")
    if not known:
        messages.error(request, "Choose at least one SAE first.")
    elif action == "fetch":
        return _started(request, _chosen(known))
    elif action == "remove":
        take_out(request, known)
    elif action in ("add", "add_next", "add_all"):
        _say_added(request, put_in(request, [key for key in keys if key in set(known)]), len(known))
    return back_to(request, back, "saes:sae_basket")


def _say_added(request: HttpRequest, added: int, asked: int) -> None:
    held = len(basket_of(request))
    already = (
        ""
        if added == asked
        else f" ({asked - added} were in it already)"
        if held < MOST
        else f"; it holds no more than {MOST:,}"
    )
    messages.success(request, f"{added} put into the basket{already}. It holds {held} now.")
