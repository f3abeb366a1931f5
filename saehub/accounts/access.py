"""The one choke point: every view, socket, endpoint and admin page asks `allowed`.

A view says what it needs with `@needs("app.codename")`, or `@needs(LOGIN)`, or `@needs(PUBLIC)`. The middleware refuses a
view that says nothing, so that a forgotten mark closes a page instead of opening it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from django.contrib.auth.views import redirect_to_login
from django.core.exceptions import ImproperlyConfigured, PermissionDenied
from django.http import HttpRequest, HttpResponse, HttpResponseBase
from django.urls import reverse
from django.utils.http import urlencode

PUBLIC = "public"
LOGIN = "login"
OTHERS = "accounts.act_for_others"
ADMIN = "accounts.use_admin"

View = TypeVar("View", bound=Callable[..., Any])


def allowed(user: Any, permission: str, obj: Any = None) -> bool:
    """May `user` do what `permission` names (to `obj`)?

    Somebody else's object may be looked at, but changed, cancelled or deleted only by its owner or by who may act for
    others. An object without an owner belongs to the house: anyone with the permission may change it.
    """
    if permission == PUBLIC:
        return True
    if not (user.is_authenticated and user.is_active):
        return False
    if permission != LOGIN and not user.has_perm(permission):
        return False
    owner = getattr(obj, "owner_id", None)
    if obj is None or owner is None or owner == user.pk or _only_looks(permission):
        return True
    return bool(user.has_perm(OTHERS))


def _only_looks(permission: str) -> bool:
    return permission.partition(".")[2].startswith("view_")


def check(user: Any, permission: str, obj: Any = None) -> None:
    """`allowed`, or PermissionDenied (403)."""
    if not allowed(user, permission, obj):
        raise PermissionDenied


def needs(permission: str, *, post: str = "") -> Callable[[View], View]:
    """Mark a view with the permission it needs, and another one for requests that change something."""

    def mark(view: View) -> View:
        view.needs = permission  # type: ignore[attr-defined]
        view.needs_post = post or permission  # type: ignore[attr-defined]
        return view

    return mark


def needed(view: Any, method: str) -> str:
    """Permission a view asks for; a class-based view may carry the mark on its class."""
    holder = view if hasattr(view, "needs") else getattr(view, "view_class", view)
    name = "needs" if method in {"GET", "HEAD", "OPTIONS"} else "needs_post"
    try:
        return str(getattr(holder, name))
    except AttributeError:
        raise ImproperlyConfigured(f"{view.__module__}.{view.__name__} does not say what it @needs.") from None


class AccessMiddleware:
    """Asks `allowed` before every view. The API asks it in its own authentication, per operation."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        return self.get_response(request)

    def process_view(self, request: HttpRequest, view: Any, args: Any, kwargs: Any) -> HttpResponseBase | None:
        spaces = request.resolver_match.namespaces if request.resolver_match else []
        if "api" in spaces:
            return None
        permission = ADMIN if "admin" in spaces else needed(view, request.method or "GET")
        if allowed(request.user, permission):
            return None
        if request.user.is_authenticated:
            raise PermissionDenied
        return _to_login(request)


def _to_login(request: HttpRequest) -> HttpResponse:
    """The login page, and back. A fragment request is answered so that htmx moves the whole page, not the fragment.

    What a form sent leads back to the form's page: its own address need not be one. The login checks that it is ours.
    """
    if not getattr(request, "htmx", False):
        looked = request.method in ("GET", "HEAD")
        return redirect_to_login(request.get_full_path() if looked else request.headers.get("Referer") or "/")
    current = request.htmx.current_url_abs_path or "/"  # type: ignore[attr-defined]
    response = HttpResponse(status=204)
    response["HX-Redirect"] = f"{reverse('login')}?{urlencode({'next': current})}"
    return response


class Can:
    """`{% if can.training.add_run %}` in templates: the same question as everywhere."""

    def __init__(self, user: Any, app: str = "") -> None:
        self._user, self._app = user, app

    def __getitem__(self, name: str) -> Any:
        return allowed(self._user, f"{self._app}.{name}") if self._app else Can(self._user, name)

    def __iter__(self) -> Any:
        raise TypeError("`can` is asked by name")


def permissions(request: HttpRequest) -> dict[str, Any]:
    return {"can": Can(request.user)} if hasattr(request, "user") else {}
