"""What people say of SAEs in a click: the team's tags, one's own star."""

from __future__ import annotations

from django.contrib import messages
from django.http import HttpRequest, HttpResponse, HttpResponseBase
from django.shortcuts import get_object_or_404, render
from django.views.decorators.http import require_POST

from saehub.accounts.access import needs
from saehub.fragments import back_to
from saehub.typed import whole_number
from saes.basket import MOST
from saes.models import SAE
from saes.tags import star, tag, tags_of


@require_POST
@needs("saes.view_sae", post="saes.tag_sae")
def sae_tag(request: HttpRequest) -> HttpResponseBase:
    """Tag the SAEs that were chosen: `add` words, `remove` them, or `set` those of a single SAE. Tags are the team's, so
    whose SAE it is does not matter."""
    keys = [pk for text in request.POST.getlist("sae") if (pk := whole_number(text)) is not None][:MOST]
    action, known = request.POST.get("action", ""), list(SAE.objects.filter(pk__in=keys).values_list("pk", "tags"))
    try:
        words = tags_of(request.POST.get("tags", "")[:1000])
        if not known:
            raise ValueError("Choose at least one SAE first.")
        if not words and action != "set":
            raise ValueError("Write the tag first.")
        if action not in ("add", "remove", "set") or (action == "set" and len(known) != 1):
            raise ValueError("Say whether to add or remove tags.")
        left = set(known[0][1]) - set(words) if action == "set" else words
        n = tag(
            request.user,
            [pk for pk, _ in known],
            add=() if action == "remove" else words,
            remove=() if action == "add" else left,
        )
    except ValueError as error:
        messages.error(request, str(error))
    else:
        messages.success(request, f"Tags of {n} SAE{'s' if n != 1 else ''} changed." if n else "They were so already.")
    return back_to(request, request.POST.get("next", ""), SAE(pk=known[0][0]) if known else "saes:sae_list")


@require_POST
@needs("saes.view_sae", post="saes.star_sae")
def sae_star(request: HttpRequest, pk: int) -> HttpResponseBase:
    """This person's star: given, or taken off."""
    sae = get_object_or_404(SAE.objects.only("pk", "name"), pk=pk)
    on = request.POST.get("starred") == "1"
    star(request.user, sae, on)
    if getattr(request, "htmx", None):
        page: HttpResponse = render(request, "saes/sae_list.html#star", {"sae": sae, "starred": {pk} if on else set()})
        return page
    return back_to(request, request.POST.get("next", ""), sae)
