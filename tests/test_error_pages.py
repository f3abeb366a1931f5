"""Errors are pages of ours: one heading, one sentence, a way on, and nothing of the code."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from django.test import Client

from saehub import views
from saehub.error_pages import refusal

pytestmark = pytest.mark.django_db


def ours(answer: Any, status: int, heading: str, said: str = "") -> str:
    """The text of an error page, once it is seen to be one of the site."""
    assert answer.status_code == status and answer["Content-Type"].startswith("text/html"), answer.content[:300]
    page: str = answer.content.decode()
    assert "css/base.css" in page and 'class="brand"' in page and 'class="alone panel"' in page, page[:500]
    assert re.findall(r"<h1>(.*?)</h1>", page) == [heading]
    assert said in page and re.search(r'class="btns"><a class="btn" href="/"', page)
    return page


def test_what_is_not_there_and_what_is_not_allowed(client_of: Any) -> None:
    for client in (client_of("viewer"), Client()):
        ours(client.get("/nowhere/"), 404, "There is nothing here")
    ours(client_of("viewer").get("/admin/"), 403, "You may not do this", "a-viewer")
    ours(client_of("viewer").post("/jobs/probe/"), 403, "You may not do this")


def test_a_crash(client_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a secret of the code")

    monkeypatch.setattr(views, "render", broken)
    client = client_of("viewer")
    client.raise_request_exception = False
    assert "secret" not in ours(client.get("/"), 500, "Something broke on our side")


@pytest.mark.parametrize("address", ["/saes/?q=a%00b", "/search/?q=a%0%000b", "/saes/download/?q=a%00b&revision=%00"])
def test_zero_bytes_are_left_out_of_an_address(client_of: Any, address: str) -> None:
    answer = client_of("researcher").get(address)
    assert answer.status_code == 200 and "ab" in answer.content.decode()
    assert client_of("viewer").get("/search/?q=%2500").context["q"] == "%00", "a percent sign is none"


def test_a_form_without_its_token(client_of: Any) -> None:
    client = Client(enforce_csrf_checks=True)
    ours(client.post("/login/", {"username": "a"}), 403, "This form has to be sent again", "nothing was done")


def test_a_host_that_is_not_ours() -> None:
    answer = Client().get("/login/", headers={"host": "elsewhere.example"})
    assert "elsewhere" not in ours(answer, 400, "This request could not be read", "ALLOWED_HOSTS")


def test_a_form_that_is_too_large(client_of: Any, settings: Any) -> None:
    settings.DATA_UPLOAD_MAX_MEMORY_SIZE = 2**20
    answer = client_of("researcher").post("/corpora/new/", {"text": "a" * 2**21})
    ours(answer, 413, "This is too large to be sent", "1 MB beside its files")
    settings.DATA_UPLOAD_MAX_NUMBER_FIELDS = 3
    answer = client_of("researcher").post("/corpora/new/", {str(i): "1" for i in range(5)})
    ours(answer, 413, "This is too large to be sent", "more fields")


def test_a_button_s_address_opened_as_a_page(client_of: Any) -> None:
    answer = client_of("viewer").get("/jobs/1/cancel/")
    ours(answer, 405, "This address is not a page", "press it there")
    assert answer["Allow"] == "POST" and answer["Content-Length"] == str(len(answer.content))
    assert "css/base.css" not in client_of("viewer").put("/api/v1/jobs").content.decode()


@pytest.mark.parametrize(
    ("referer", "to"),
    [("http://testserver/jobs/7/", "http://testserver/jobs/7/"), ("https://evil.example/", "/"), ("", "/")],
)
def test_a_session_that_ended_leads_back_to_the_form_and_nowhere_else(referer: str, to: str, user_of: Any) -> None:
    user = user_of("viewer")
    user.set_password("correct horse battery")
    user.save()
    client = Client()
    answer = client.post("/jobs/7/cancel/", headers={"referer": referer} if referer else {})
    login = urlsplit(answer["Location"])
    given = {"username": user.username, "password": "correct horse battery", "next": parse_qs(login.query)["next"][0]}
    assert client.post(login.path, given)["Location"] == to


def test_what_a_server_refuses_by_itself() -> None:
    kind, body = refusal(413, "It is <large>.", "text/html,*/*")
    assert kind.startswith("text/html") and b"css/base.css" in body and b"It is &lt;large&gt;." in body
    kind, body = refusal(507, "It is full.", "*/*")
    assert (
        kind == "application/problem+json" and b'"status": 507' in body and b'"title": "Insufficient Storage"' in body
    )
