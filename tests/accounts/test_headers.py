"""What every answer carries, whoever makes it: pages, errors, the admin, the API, files."""

from __future__ import annotations

from typing import Any

import pytest
from django.test import Client

from saehub import views

pytestmark = pytest.mark.django_db


def is_strict(answer: Any) -> bool:
    policy = answer["Content-Security-Policy"]
    return (
        "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
        and answer["X-Content-Type-Options"] == "nosniff" and answer["Referrer-Policy"] == "same-origin"
        and answer["Cross-Origin-Opener-Policy"] == "same-origin"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/", 200),
        ("/login/", 302),
        ("/nowhere/", 404),
        ("/saes/999999/", 404),
        ("/admin/", 200),
        ("/admin/saes/sae/", 200),
        ("/admin/auth/user/add/", 200),
        ("/admin/nowhere/", 404),
        ("/static/css/base.css", 200),
        ("/static/nowhere.css", 404),
        ("/healthz", 200),
        ("/api/v1/docs", 200),
        ("/api/v1/openapi.json", 200),
        ("/api/v1/jobs", 401),
        ("/api/v1/nowhere", 404),
        ("/saes/basket/?format=yaml", 200),
    ],
)
def test_every_answer_has_the_policy(path: str, status: int, client_of: Any) -> None:
    answer = client_of("admin").get(path)
    assert answer.status_code == status
    assert is_strict(answer), dict(answer.items())


def test_refusals_have_it_too(client_of: Any) -> None:
    for answer, status in (
        (Client().get("/jobs/"), 302),
        (client_of("viewer").get("/admin/"), 403),
        (client_of("viewer").post("/jobs/probe/"), 403),
        (Client(enforce_csrf_checks=True).post("/login/", {"username": "a", "password": "b"}), 403),
        (Client().get("/login/", headers={"host": "elsewhere.example"}), 400),
    ):
        assert answer.status_code == status and is_strict(answer), dict(answer.items())


def test_a_crash_has_it_and_shows_nothing_of_itself(client_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a secret of the code")

    monkeypatch.setattr(views, "render", broken)
    client = client_of("viewer")
    client.raise_request_exception = False
    answer = client.get("/")
    assert answer.status_code == 500 and is_strict(answer)
    assert "a secret of the code" not in answer.content.decode()


def test_cookies_are_out_of_reach_of_scripts_and_other_sites(user_of: Any) -> None:
    user = user_of("viewer")
    user.set_password("correct horse battery")
    user.save()
    client = Client()
    client.get("/login/")
    client.post("/login/", {"username": user.username, "password": "correct horse battery"})
    session = client.cookies["sessionid"]
    assert session["httponly"] and session["samesite"] == "Lax"
    assert client.cookies["csrftoken"]["samesite"] == "Lax"


def test_the_admin_has_nothing_inline_that_the_policy_forbids(client_of: Any) -> None:
    for path in ("/admin/", "/admin/saes/sae/", "/admin/saes/release/add/", "/admin/auth/user/", "/admin/jobs/job/"):
        page = client_of("admin").get(path).content.decode()
        assert "<script>" not in page and " style=" not in page and " onclick=" not in page, path
