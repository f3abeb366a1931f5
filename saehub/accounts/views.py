from __future__ import annotations

from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_POST

from saehub.accounts.access import LOGIN, check, needs
from saehub.accounts.forms import TokenForm
from saehub.accounts.models import APIToken


@never_cache
@needs(LOGIN)
def account_detail(request: HttpRequest) -> HttpResponse:
    """One's own account: groups, API tokens. A new token's secret is in the answer to its form and nowhere else."""
    form = TokenForm(request.POST or None)
    secret = form.make(request.user) if request.method == "POST" and form.is_valid() else ""
    context = {
        "form": TokenForm() if secret else form,
        "secret": secret,
        "tokens": request.user.api_tokens.all(),  # type: ignore[union-attr]
        "groups": request.user.groups.values_list("name", flat=True),
    }
    return render(request, "accounts/account_detail.html", context, status=422 if form.errors else 200)


@require_POST
@needs(LOGIN)
def token_delete(request: HttpRequest, pk: int) -> HttpResponse:
    token = get_object_or_404(APIToken, pk=pk)
    check(request.user, LOGIN, token)
    token.delete()
    return redirect("accounts:account_detail")
