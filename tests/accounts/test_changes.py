"""The log of changes: who sent what changed something, by page, API and administration; looks and refusals leave none."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.db import DatabaseError
from django.test import Client
from django.utils import timezone
from django.utils.http import urlencode

from saehub.accounts import changes
from saehub.accounts.models import Change
from saes.models import SAE
from tests.api_calls import good
from tests.conftest import make_user
from tests.sae_rows import a_trained_sae

pytestmark = pytest.mark.django_db
ROW = ("name", "way", "token", "method", "what", "path")


def rows() -> list[tuple[str, ...]]:
    """Oldest first, and forgotten."""
    found = list(Change.objects.order_by("pk").values_list(*ROW))
    Change.objects.all().delete()
    return found


def test_each_way_leaves_a_row(client_of: Any, api: Any) -> None:
    sae = a_trained_sae()
    star = f"/saes/{sae.pk}/star/"
    assert client_of("researcher").post(star, {"starred": "1"}).status_code == 302
    assert rows() == [("a-researcher", "page", "", "POST", "saes:sae_star", star)]
    good(api("curator", "patch", f"/saes/{sae.pk}", {"notes": "secret words"}))
    assert rows() == [("a-curator", "api", "t", "PATCH", "api:sae_detail", f"/api/v1/saes/{sae.pk}")]
    desk = "/admin/saes/sae/"
    sent = {"action": "publish", "_selected_action": [sae.pk], "index": "0"}
    assert client_of("curator").post(desk, sent).status_code in (200, 302)
    assert rows() == [("a-curator", "admin", "", "POST", "admin:saes_sae_changelist", desk)]
    assert "secret words" not in str(list(Change.objects.values())), "what was sent is in the row's own history"


def test_looks_and_refusals_leave_none(client_of: Any, api: Any) -> None:
    sae = a_trained_sae()
    client_of("viewer").get(sae.get_absolute_url())
    assert client_of("viewer").post(f"/saes/{sae.pk}/delete/").status_code == 403
    assert client_of("curator").post("/saes/999999/star/").status_code == 404
    assert api("viewer", "delete", f"/saes/{sae.pk}").status_code == 403
    assert api("curator", "patch", f"/saes/{sae.pk}", {"curation": "nonsense"}).status_code == 422
    assert Client().post("/login/", {"username": "a", "password": "b"}).status_code == 200, "nobody yet"
    assert rows() == []


def test_who_comes_and_goes(user_of: Any) -> None:
    user, client = user_of("viewer"), Client()
    user.set_password("correct horse battery")
    user.save()
    assert client.post("/login/", {"username": user.username, "password": "correct horse battery"}).status_code == 302
    assert client.post("/logout/").status_code == 302
    assert rows() == [
        (user.username, "page", "", "POST", "login", "/login/"),
        (user.username, "page", "", "POST", "logout", "/logout/"),
    ]


def test_a_deleted_account_keeps_its_name_and_a_log_that_fails_keeps_the_change(
    client_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae, user = a_trained_sae(), make_user("ada", "researcher")
    client = Client()
    client.force_login(user, backend="django.contrib.auth.backends.ModelBackend")
    client.post(f"/saes/{sae.pk}/star/", {"starred": "1"})
    user.delete()
    row = Change.objects.get()
    assert row.user is None and row.name == "ada"

    def full(**values: Any) -> None:
        raise DatabaseError("no space")

    monkeypatch.setattr(changes.Change.objects, "create", full)
    answer = client_of("curator").post(f"/saes/{sae.pk}/curate/", {"notes": "kept"})
    assert answer.status_code == 302 and SAE.objects.get().notes == "kept"


def test_curators_read_it_in_the_administration_and_nobody_changes_it(client_of: Any) -> None:
    row = Change.objects.create(
        name="ada", way="api", token="note<b>book", what="api:sae_delete", path="/api/v1/saes/7"
    )
    page = client_of("curator").get("/admin/accounts/change/").content.decode()
    assert "api:sae_delete" in page and "note&lt;b&gt;book" in page
    one = f"/admin/accounts/change/{row.pk}"
    assert client_of("curator").get(f"{one}/change/").status_code == 200
    root = Client()
    root.force_login(User.objects.create_superuser("root"), backend="django.contrib.auth.backends.ModelBackend")
    assert root.get("/admin/accounts/change/").status_code == 200
    assert root.post(f"{one}/delete/", {"post": "yes"}).status_code == 403
    for role in ("curator", "admin"):
        assert client_of(role).post(f"{one}/delete/", {"post": "yes"}).status_code == 403
        assert client_of(role).get("/admin/accounts/change/add/").status_code == 403
    assert client_of("researcher").get("/admin/accounts/change/").status_code == 403
    assert Change.objects.filter(pk=row.pk).exists()


def test_the_api_narrows_it(api: Any, django_assert_num_queries: Any) -> None:
    now = timezone.now()
    for number in range(4):
        Change.objects.create(
            name="ada" if number % 2 else "bob", way="page", what="saes:sae_delete", path=f"/saes/{number}/delete/",
            at=now - timedelta(days=number),
        )  # fmt: skip
    assert api("researcher", "get", "/changes").status_code == 403

    def ask(**query: Any) -> list[str]:
        return [
            one["path"] for one in good(api("curator", "get", f"/changes?{urlencode(query)}", scope="read"))["items"]
        ]

    assert ask(user="ada") == ["/saes/3/delete/", "/saes/1/delete/"] and ask(path="/saes/2/") == ["/saes/2/delete/"]
    assert ask(since=(now - timedelta(hours=30)).isoformat(), user="ada") == ["/saes/1/delete/"]
    (found,) = good(api("curator", "get", "/changes?limit=1"))["items"]
    assert (found["user"], found["way"], found["what"]) == ("ada", "page", "saes:sae_delete")
