"""Which pages may open a web socket: ours."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from channels.security.websocket import WebsocketDenier
from django.conf import settings
from django.http.request import validate_host

App = Callable[[dict[str, Any], Any, Any], Awaitable[None]]


class OwnPages:
    """ASGI: refuses a socket whose page is not of the very host name and port that it asks.

    A browser sends our cookie along with every page of the same host name, on whatever port: in a lab that may be anybody's
    notebook. Behind a proxy that changes the Host header, CSRF_TRUSTED_ORIGINS names the site, as it does for forms.
    """

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        headers = dict(scope.get("headers", ()))
        ours = is_ours(headers.get(b"origin", b"").decode("latin-1"), headers.get(b"host", b"").decode("latin-1"))
        await (self.app if ours else WebsocketDenier())(scope, receive, send)


def is_ours(origin: str, host: str) -> bool:
    """Whether a page of `origin` (such as http://lab:8000) is one of the site that is asked as `host` (lab:8000)."""
    try:
        asked = urlsplit(origin)
        name = asked.hostname or ""
    except ValueError:
        return False
    if origin in settings.CSRF_TRUSTED_ORIGINS:
        return True
    named = f"[{name}]" if ":" in name else name
    return asked.netloc.lower() == host.lower() and validate_host(named, settings.ALLOWED_HOSTS)
