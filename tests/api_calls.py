"""What tests of the API share."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

from django.test import Client
from django.utils import timezone

from saehub.accounts.models import APIToken


def ask(user: Any, method: str, path: str, body: Any = None, scope: str = "write", key: str = "", **more: Any) -> Any:
    """A request with a token of this user; `body` goes as JSON, `data` as a form with files."""
    secret = APIToken.make(user, "t", scope, timezone.now() + timedelta(days=1))[1]
    given = {"data": json.dumps(body), "content_type": "application/json"} if body is not None else {}
    headers = {"Authorization": f"Bearer {secret}"} | ({"Idempotency-Key": key} if key else {})
    return getattr(Client(), method)(f"/api/v1{path}", headers=headers, **given | more)


def problem(answer: Any, status: int, said: str = "") -> dict[str, Any]:
    """The body of an error, checked to be one of RFC 9457 with a sentence that holds `said`."""
    assert answer.status_code == status, answer.content
    assert answer["Content-Type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert body["status"] == status and body["title"] and body["detail"].endswith((".", "…")), body
    assert said in body["detail"], body
    return body


def good(answer: Any, status: int = 200) -> Any:
    assert answer.status_code == status, answer.content
    return answer.json()
