"""What every part of the API asks with: a token, checked for the permission of its operation; and how it says no."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from django.contrib.auth.models import AnonymousUser
from django.http import HttpRequest, HttpResponse, JsonResponse
from ninja.errors import HttpError
from ninja.security import HttpBearer

from saehub.accounts.access import allowed
from saehub.accounts.models import APIToken

PROBLEM = "application/problem+json"


class Needs(HttpBearer):
    """`Authorization: Bearer sae_…`, checked against the permission of the operation by the choke point."""

    openapi_name = "token"

    def __init__(self, permission: str) -> None:
        super().__init__()
        self.permission = permission

    def authenticate(self, request: HttpRequest, token: str) -> Any:
        row = APIToken.find(token)
        if row is None:
            return None
        request.user = row.owner
        if not (row.covers(self.permission) and allowed(row.owner, self.permission)):
            raise HttpError(403, f"This token may not do that; it needs {self.permission}.")
        return row


def require_own(request: HttpRequest, permission: str, obj: Any) -> None:
    """For operations on one object. Raises HttpError 403 where it is somebody else's."""
    if not allowed(getattr(request, "user", AnonymousUser()), permission, obj):
        raise HttpError(403, "This belongs to somebody else.")


class Problem(Exception):
    """An answer that is not what was asked for: a status, one sentence, and whatever a program may want to know."""

    def __init__(self, status: int, detail: str, **more: Any) -> None:
        super().__init__(detail)
        self.status, self.detail, self.more = status, detail, more


def problem_body(status: int, detail: str, **more: Any) -> dict[str, Any]:
    """RFC 9457."""
    return {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail, **more}


def problem(status: int, detail: str, **more: Any) -> HttpResponse:
    answer = JsonResponse(problem_body(status, detail, **more), status=status, content_type=PROBLEM)
    if "retry_after" in more:
        answer["Retry-After"] = str(more["retry_after"])
    return answer
