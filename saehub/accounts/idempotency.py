"""`Idempotency-Key`: a request that is sent twice is done once.

The key and what was done are written in one transaction. A second request with the key waits at the unique constraint
until the first is committed, and is then given its answer; where the first was refused or died, nothing was written and
the second does the work. Keys are each user's own and expire after a day.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable
from datetime import timedelta
from functools import wraps
from typing import Any, get_type_hints

from django.db import transaction
from django.http import HttpRequest
from django.utils import timezone
from ninja import Status
from ninja.responses import NinjaJSONEncoder

from saehub.accounts.api_access import Problem
from saehub.accounts.models import KeptAnswer

HEADER = "Idempotency-Key"
REPLAYED = "Idempotency-Replayed"
LIFE = timedelta(days=1)
LONGEST = 200
NOT_COUNTED = {"wait"}  # of the query: how long one waits does not make it another request

Answer = tuple[int, Any]


def once(request: HttpRequest, make: Callable[[], Answer]) -> Answer:
    """(status, body) of `make`, or what it gave to the first request with this key. Without a key it is just called.

    Raises Problem 422 for a key that was used for another request, and whatever `make` raises.
    """
    key = request.headers.get(HEADER)
    if key is None:
        return make()
    if not (0 < len(key) <= LONGEST and key.isprintable() and key.isascii()):
        raise Problem(422, f"{HEADER} has to be 1 to {LONGEST} printable ASCII characters, such as a UUID.")
    KeptAnswer.objects.filter(owner_id=request.user.pk, expires_at__lte=timezone.now()).delete()
    digest = _digest(request)
    with transaction.atomic():
        row, new = KeptAnswer.objects.get_or_create(
            owner_id=request.user.pk, key=key, defaults={"digest": digest, "expires_at": timezone.now() + LIFE}
        )
        if new:
            row.status, made = make()
            row.body = json.loads(json.dumps(made, cls=NinjaJSONEncoder))
            row.save(update_fields=["status", "body"])
            return row.status, made
    if row.digest != digest:
        raise Problem(422, f"This {HEADER} was used for another request; take a new key for a new request.")
    request.replayed = True  # type: ignore[attr-defined]
    return row.status, row.body


def _digest(request: HttpRequest) -> str:
    """What makes two requests the same: method, path, query, and the content, however its JSON is spaced and ordered."""
    query = sorted((name, values) for name, values in request.GET.lists() if name not in NOT_COUNTED)
    if (request.content_type or "").startswith("multipart/"):
        content: Any = [
            sorted(request.POST.lists()),
            [
                (name, file.name, _digest_of_file(file))
                for name in request.FILES
                for file in request.FILES.getlist(name)
            ],
        ]
    else:
        content = _read(request.body)
    parts = [request.method, request.path, query, content]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _read(body: bytes) -> Any:
    """Its JSON; what it is to the letter where it is none, since operations that take no body do not look at it."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return body.hex()


def _digest_of_file(file: Any) -> str:
    total = hashlib.sha256()
    for chunk in file.chunks():
        total.update(chunk)
    file.seek(0)
    return total.hexdigest()


def keyed(view: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of an operation that makes something: it takes an `Idempotency-Key`. The view returns a Status."""

    @wraps(view)
    def run(request: HttpRequest, *args: Any, **values: Any) -> Any:
        def make() -> Answer:
            made = view(request, *args, **values)
            return (made.status_code, made.value) if isinstance(made, Status) else (200, made)

        return Status(*once(request, make))

    return as_operation(run, view)


def as_operation(run: Callable[..., Any], view: Callable[..., Any]) -> Callable[..., Any]:
    """Give a wrapper the signature of its view with annotations resolved: ninja looks for their names in the wrong module."""
    hints = get_type_hints(view, include_extras=True)
    signature = inspect.signature(view)
    parameters = [one.replace(annotation=hints.get(one.name, one.annotation)) for one in signature.parameters.values()]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.keyed = True  # type: ignore[attr-defined]
    return run
