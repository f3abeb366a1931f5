"""API tokens: hashed, scoped, expiring; and login throttling."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from django.conf import settings
from django.test import Client
from django.utils import timezone

from saehub.accounts.models import APIToken
from saehub.jobs.models import Job, State, enqueue

pytestmark = pytest.mark.django_db


def token(user: Any, scope: str = "read", days: int = 1) -> str:
    return APIToken.make(user, "test", scope, timezone.now() + timedelta(days=days))[1]


def call(method: str, path: str, secret: str = "") -> Any:
    headers = {"Authorization": f"Bearer {secret}"} if secret else {}
    return getattr(Client(), method)(f"/api/v1{path}", headers=headers)


def test_only_a_digest_is_stored(user_of: Any) -> None:
    secret = token(user_of("viewer"))
    row = APIToken.objects.get()
    assert secret not in str(row.__dict__)
    assert len(row.digest) == 64 and secret.startswith(row.start)


def test_a_token_acts_as_its_owner(user_of: Any) -> None:
    answer = call("get", "/me", token(user_of("researcher")))
    assert answer.json() == {"name": "a-researcher", "groups": ["researcher"]}
    assert APIToken.objects.get().used_at is not None


def test_no_wrong_expired_or_disabled_token_passes(user_of: Any) -> None:
    user = user_of("researcher")
    assert call("get", "/me").status_code == 401
    assert call("get", "/me", "sae_wrong").status_code == 401
    assert call("get", "/me", token(user, days=-1)).status_code == 401
    good = token(user)
    user.is_active = False
    user.save()
    assert call("get", "/me", good).status_code == 401


def test_a_session_does_not_open_the_api(client_of: Any) -> None:
    assert client_of("admin").get("/api/v1/me").status_code == 401


def test_scope_and_role_both_limit(user_of: Any) -> None:
    job = enqueue("probe", user_of("annotator"), title="count", steps=1)
    cancel = f"/jobs/{job.pk}/cancel"
    assert call("post", cancel, token(user_of("annotator"), "read")).status_code == 403
    assert call("post", cancel, token(user_of("viewer"), "write")).status_code == 403
    assert call("post", cancel, token(user_of("researcher"), "write")).status_code == 403, "it is somebody else's"
    assert call("post", cancel, token(user_of("annotator"), "write")).json()["state"] == "cancelled"
    assert Job.objects.get(pk=job.pk).state == State.CANCELLED


def test_the_page_shows_a_new_token_once(client_of: Any) -> None:
    client = client_of("viewer")
    page = client.post("/account/", {"name": "notebook", "scope": "read", "days": "30"}).content.decode()
    row = APIToken.objects.get()
    assert row.start in page and "sae_" in page
    secret = page[page.index("sae_") :].split("<")[0].strip()
    assert call("get", "/me", secret).status_code == 200
    assert secret not in client.get("/account/").content.decode()


def test_a_bad_token_form_keeps_what_was_typed(client_of: Any) -> None:
    answer = client_of("viewer").post("/account/", {"name": "notebook", "scope": "read", "days": "0"})
    assert answer.status_code == 422
    assert 'value="notebook"' in answer.content.decode()
    assert not APIToken.objects.exists()


def test_tokens_are_deleted_by_their_owner_only(client_of: Any, user_of: Any) -> None:
    token(user_of("viewer"))
    row = APIToken.objects.get()
    assert client_of("researcher").post(f"/account/tokens/{row.pk}/delete/").status_code == 403
    assert client_of("viewer").post(f"/account/tokens/{row.pk}/delete/").status_code == 302
    assert not APIToken.objects.exists()


def with_password(user: Any) -> None:
    user.set_password("correct horse battery")
    user.save()


def test_guessing_passwords_is_throttled(user_of: Any) -> None:
    with_password(user_of("viewer"))
    client = Client()
    for _ in range(settings.AXES_FAILURE_LIMIT):
        client.post("/login/", {"username": "a-viewer", "password": "guess"})
    answer = client.post("/login/", {"username": "a-viewer", "password": "correct horse battery"})
    assert answer.status_code == 429
    assert "_auth_user_id" not in client.session


def test_the_right_password_opens(user_of: Any) -> None:
    with_password(user_of("viewer"))
    client = Client()
    answer = client.post("/login/?next=/jobs/", {"username": "a-viewer", "password": "correct horse battery"})
    assert answer.status_code == 302 and answer["Location"] == "/jobs/"


def test_pages_carry_a_strict_policy(client_of: Any) -> None:
    policy = client_of("viewer").get("/jobs/")["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy


def test_a_fragment_without_a_session_leads_to_the_login_and_back() -> None:
    answer = Client().get(
        "/jobs/", headers={"HX-Request": "true", "HX-Current-URL": "http://testserver/jobs/?state=done"}
    )
    assert answer.status_code == 204
    assert answer["HX-Redirect"] == "/login/?next=%2Fjobs%2F%3Fstate%3Ddone"
