"""Where a request comes from, also behind proxies."""

from __future__ import annotations

from django.conf import settings
from django.http import HttpRequest


def client_address(request: HttpRequest) -> str:
    """The address that wrong passwords are counted for.

    Each proxy adds the address that it was asked from at the end of X-Forwarded-For, so with n proxies of one's own the
    n-th from the end is the client's; what stands before it the client may have written itself. Without proxies, or where
    the header has fewer, it is the connection's.
    """
    said = [one.strip() for one in request.headers.get("X-Forwarded-For", "").split(",") if one.strip()]
    n = settings.PROXIES
    return said[-n] if 0 < n <= len(said) else request.META.get("REMOTE_ADDR", "")
