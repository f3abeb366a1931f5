"""Pages for what reaches no view: a request that cannot be read, one that is too large, a form's address opened as a page.

Under /api/v1 the same is said as RFC 9457 (saehub/accounts/api_problems.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable

from django.conf import settings
from django.core.exceptions import DisallowedHost, RequestDataTooBig, TooManyFieldsSent, TooManyFilesSent
from django.http import HttpRequest, HttpResponse
from django.template.loader import render_to_string

from saehub.accounts.api_access import PROBLEM, problem_body

TITLES = {
    400: "This request could not be read",
    405: "This address is not a page",
    413: "This is too large to be sent",
    507: "The server's disk is too full",
}


def page(status: int, sentence: str) -> str:
    """A page of ours that needs neither a request nor the database."""
    return render_to_string("refused.html", {"title": TITLES[status], "said": sentence})


def refusal(status: int, sentence: str, accept: str) -> tuple[str, bytes]:
    """Content type and body for a server that refuses before Django is asked: a page for browsers, else RFC 9457."""
    if "text/html" in accept:
        return "text/html; charset=utf-8", page(status, sentence).encode()
    return PROBLEM, json.dumps(problem_body(status, sentence)).encode()


def bad_request(request: HttpRequest, exception: Exception) -> HttpResponse:
    """Django's handler400: says which of the reasons it is, as far as that is no secret."""
    status, sentence = 400, "Its sender wrote it wrongly, or it was changed on its way; go back and try again."
    if isinstance(exception, RequestDataTooBig):
        most = settings.DATA_UPLOAD_MAX_MEMORY_SIZE // 2**20
        status, sentence = 413, f"A form takes {most} MB beside its files; go back and send a long text as a file."
    elif isinstance(exception, TooManyFieldsSent | TooManyFilesSent):
        status, sentence = 413, "It has more fields or files than a form takes; go back and send them as one zip."
    elif isinstance(exception, DisallowedHost):
        sentence = "This server does not answer to the name in the address; ALLOWED_HOSTS says to which it does."
    return HttpResponse(page(status, sentence), status=status)


class NoZeroBytes:
    """No text of the database can hold a zero byte: they are left out of addresses here, not wherever one is read."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        query = request.META.get("QUERY_STRING", "")
        while "%00" in query:  # leaving one out may make another
            query = query.replace("%00", "")
        request.META["QUERY_STRING"] = query
        return self.get_response(request)


class NotAPage:
    """The address of a button, opened as a page, answers with a page that says so instead of nothing."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        response = self.get_response(request)
        if response.status_code == 405 and not response.content:
            sentence = "It only takes what a button or form sends; open the page with the button and press it there."
            response.content = page(405, sentence).encode()
            response["Content-Length"] = str(len(response.content))  # it was said of the empty answer
        return response
