"""Errors of the API that no operation of it makes: an unknown address, a wrong method, a crash. They say so as all others do."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from django.http import HttpRequest, HttpResponse
from ninja.parser import Parser

from saehub.accounts.api_access import PROBLEM, Problem, problem
from saehub.plain import REFUSED, storable

PLACE = "/api/v1/"
KEPT = ("Allow", "WWW-Authenticate", "Retry-After")
SENTENCES = {
    400: "This request cannot be read.",
    404: "There is no operation at this address; /api/v1/docs lists them.",
    405: "This address does not take that method.",
    413: "This is larger than a request may be.",
}
CRASH = "Something went wrong here; the server's log says what."


class ProblemMiddleware:
    """Turns every other error under /api/v1/ into `application/problem+json`, and refuses what no database text can hold."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        if not request.path_info.startswith(PLACE):
            return self.get_response(request)
        if "\0" in request.path_info or "%00" in request.META.get("QUERY_STRING", ""):
            return problem(400, "An address may not hold zero bytes.")
        response = self.get_response(request)
        if response.status_code < 400 or response.get("Content-Type", "").startswith(PROBLEM):
            return response
        made = problem(response.status_code, SENTENCES.get(response.status_code, CRASH))
        for name in KEPT:
            if name in response:
                made[name] = response[name]
        return made


class StrictParser(Parser):
    """JSON as the standard has it, in texts that a database can hold. Raises Problem."""

    def parse_body(self, request: HttpRequest) -> Any:
        if request.content_type != "application/json" and not (request.content_type or "").endswith("+json"):
            said = request.content_type or "nothing"
            raise Problem(415, f"This takes application/json; the request says it is {said[:100]}.")
        try:
            found = json.loads(request.body, parse_constant=_refused)
        except (ValueError, RecursionError) as error:
            raise Problem(400, f"The body is not JSON: {str(error)[:200]}.") from None
        if b"\\u" in request.body and not storable(found):
            raise Problem(422, REFUSED)
        return found


def _refused(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")
