"""Everybody's own account: API tokens and the token for the Hub."""

from __future__ import annotations

from typing import Any

from django.contrib import messages
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.utils import timezone
from django.views.decorators.cache import never_cache
from django.views.decorators.debug import sensitive_post_parameters
from django.views.decorators.http import require_POST

from saehub.accounts import hub_tokens
from saehub.accounts.access import LOGIN, check, needs
from saehub.accounts.forms import HubTokenForm, TokenForm
from saehub.accounts.models import APIToken, HubToken


@never_cache
@needs(LOGIN)
def account_detail(request: HttpRequest) -> HttpResponse:
    """One's own account: groups, API tokens, Hub token. A new API token's secret is in the answer to its form alone."""
    form = TokenForm(request.POST or None)
    secret = form.make(request.user) if request.method == "POST" and form.is_valid() else ""
    return _page(request, form=TokenForm() if secret else form, secret=secret)


def _page(request: HttpRequest, **given: Any) -> HttpResponse:
    hub_row = _hub_row(request)
    context: dict[str, Any] = {
        "form": TokenForm(),
        "hub_form": HubTokenForm(),
        "tokens": request.user.api_tokens.all(),  # type: ignore[union-attr]
        "groups": request.user.groups.values_list("name", flat=True),
        "hub_row": hub_row,
        "hub_fault": _fault(hub_row),
    } | given
    bad = context["form"].errors or context["hub_form"].errors
    return render(request, "accounts/account_detail.html", context, status=422 if bad else 200)


def _hub_row(request: HttpRequest) -> HubToken | None:
    return HubToken.objects.filter(owner_id=request.user.pk).first()


def _fault(row: HubToken | None) -> str:
    """Why the kept token is of no use; "" when it can be read."""
    try:
        if row is not None:
            hub_tokens.unseal(row)
    except hub_tokens.HubTokenError as error:
        return str(error)
    return ""


@require_POST
@needs(LOGIN)
def token_delete(request: HttpRequest, pk: int) -> HttpResponse:
    token = get_object_or_404(APIToken, pk=pk)
    check(request.user, LOGIN, token)
    token.delete()
    return redirect("accounts:account_detail")


# -- the token for the Hub; always one's own
@require_POST
@never_cache
@sensitive_post_parameters("token")
@needs(LOGIN)
def hub_token_set(request: HttpRequest) -> HttpResponse:
    form = HubTokenForm(request.POST)
    if not form.is_valid():
        return _page(request, hub_form=form)
    form.save(request.user)
    if form.unchecked:
        messages.warning(request, f"The token is kept. {form.unchecked}")
    else:
        messages.success(request, f"The token is kept; on the Hub it belongs to {form.account}.")
    return redirect("accounts:account_detail")


@require_POST
@needs(LOGIN)
def hub_token_check(request: HttpRequest) -> HttpResponse:
    """Ask the Hub whose the token is."""
    row = _hub_row(request)
    if row is None:
        messages.warning(request, "There is no Hub token to check.")
        return redirect("accounts:account_detail")
    try:
        row.account, row.checked_at = hub_tokens.whose(hub_tokens.unseal(row)), timezone.now()
        row.save(update_fields=["account", "checked_at"])
        messages.success(request, f"The Hub knows the token; it belongs to {row.account}.")
    except hub_tokens.HubTokenError as error:
        messages.error(request, f"{error} {error.hint}".strip())
    return redirect("accounts:account_detail")


@require_POST
@needs(LOGIN)
def hub_token_delete(request: HttpRequest) -> HttpResponse:
    HubToken.objects.filter(owner_id=request.user.pk).delete()
    messages.success(request, "Your Hub token is removed.")
    return redirect("accounts:account_detail")
