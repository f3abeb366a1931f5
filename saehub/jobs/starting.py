"""Operations of the API that start a job: 202 with what was started, once for each `Idempotency-Key`, waited for with `?wait=`."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from operator import itemgetter
from typing import Any

from django.db import connection
from django.http import HttpRequest
from ninja import Status

from saehub.accounts.api_access import Problem
from saehub.accounts.idempotency import as_operation, once
from saehub.jobs.models import LIVE, Job, State

LONGEST_WAIT = 300.0
MOST_WAITING = 200  # jobs of one user in the queues, beyond which scripts are asked to wait
RETRY_AFTER = 30
POLL_SECONDS = (0.1, 1.0)  # the first time and, after ever longer pauses, from then on


def starts(
    answer: Callable[[Any], dict[str, Any]], key: Callable[[dict[str, Any]], Any] = itemgetter("id")
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator. The view queues the work and returns the key of what it made; `answer(key)` is the body, with
    `job_ids`, the jobs to wait for; `key(body)` reads the key off it again, to answer anew after waiting.

    202 while they are on, and 200 once they are over, where the request waited so long, or where there is none.
    """

    def mark(view: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(view)
        def run(request: HttpRequest, *args: Any, **values: Any) -> Any:
            seconds = asked_wait(request)

            def begin() -> tuple[int, dict[str, Any]]:
                _check_queue(request)
                return _begun(answer(view(request, *args, **values)))

            status, body = once(request, begin)
            if seconds and over(body["job_ids"], seconds):
                return Status(200, answer(key(body)))
            return Status(status, body)

        run.waits = True  # type: ignore[attr-defined]
        return as_operation(run, view)

    return mark


def _check_queue(request: HttpRequest) -> None:
    """Raises Problem 429 where this user's jobs fill the queues: others wait behind them."""
    n = Job.objects.filter(owner_id=request.user.pk, state=State.QUEUED).count()
    if n >= MOST_WAITING:
        raise Problem(
            429, f"{n} of your jobs wait already; ask again when some of them are over.", retry_after=RETRY_AFTER
        )


def _begun(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    return (202 if body["job_ids"] else 200), body


def asked_wait(request: HttpRequest) -> float:
    """Seconds of `?wait=`. Raises Problem 422."""
    text = request.GET.get("wait", "0")
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= LONGEST_WAIT:  # NaN compares false
        said = f"wait is a number of seconds from 0 to {LONGEST_WAIT:.0f}."
        raise Problem(422, said, errors={"wait": [said]})
    return seconds


def over(job_ids: list[int], seconds: float) -> bool:
    """Whether these jobs are over, asked again and again for so many seconds. Between two looks no connection is held:
    a hundred scripts that wait would take all that the database has."""
    until, (pause, longest) = time.monotonic() + seconds, POLL_SECONDS
    while Job.objects.filter(pk__in=job_ids, state__in=LIVE).exists():
        left = until - time.monotonic()
        if left <= 0:
            return False
        if not connection.in_atomic_block:
            connection.close()
        time.sleep(min(pause, left))
        pause = min(2 * pause, longest)
    return True
