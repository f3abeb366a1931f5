"""Accounts in the admin: an admin by group makes them and gives them roles, but nobody rises above themselves."""

from __future__ import annotations

from typing import Any

import pytest
from django.contrib.auth.models import Group, User

pytestmark = pytest.mark.django_db
PASSWORD = "correct horse battery"


def form_of(user: User, **changes: Any) -> dict[str, Any]:
    """What the page of an account sends back."""
    joined = user.date_joined
    return {
        "username": user.username, "is_active": "on", "groups": [group.pk for group in user.groups.all()],
        "date_joined_0": joined.strftime("%Y-%m-%d"), "date_joined_1": joined.strftime("%H:%M:%S"),
        "last_login_0": "", "last_login_1": "", "first_name": "", "last_name": "", "email": "",
    } | changes  # fmt: skip


def test_an_admin_makes_an_account_and_gives_it_a_role(client_of: Any) -> None:
    client = client_of("admin")
    sent = {"username": "ada", "usable_password": "true", "password1": PASSWORD, "password2": PASSWORD}
    answer = client.post("/admin/auth/user/add/", sent)
    ada = User.objects.get(username="ada")
    assert answer.status_code == 302 and ada.check_password(PASSWORD) and not ada.is_superuser
    researcher = Group.objects.get(name="researcher")
    assert client.post(f"/admin/auth/user/{ada.pk}/change/", form_of(ada, groups=[researcher.pk])).status_code == 302
    assert list(ada.groups.all()) == [researcher]


def test_no_admin_makes_a_superuser_of_anybody(client_of: Any, user_of: Any) -> None:
    client, user = client_of("admin"), user_of("admin")
    page = f"/admin/auth/user/{user.pk}/change/"
    assert b'name="is_superuser"' not in client.get(page).content
    assert client.post(page, form_of(user, is_superuser="on", user_permissions=["1"])).status_code == 302
    user.refresh_from_db()
    assert not user.is_superuser and not user.user_permissions.exists()


def test_a_superuser_is_changed_by_superusers_only(client_of: Any, user_of: Any) -> None:
    root = User.objects.create_superuser("root", password=PASSWORD)
    place, client = f"/admin/auth/user/{root.pk}", client_of("admin")
    assert client.post(f"{place}/change/", form_of(root, is_active="")).status_code == 403
    assert client.post(f"{place}/password/", {"password1": "mine" * 4, "password2": "mine" * 4}).status_code == 403
    assert client.post(f"{place}/delete/", {"post": "yes"}).status_code == 403
    client.post("/admin/auth/user/", {"action": "delete_selected", "_selected_action": [root.pk], "post": "yes"})
    root.refresh_from_db()
    assert root.is_active and root.check_password(PASSWORD)
    client.force_login(root, backend="django.contrib.auth.backends.ModelBackend")
    assert b'name="is_superuser"' in client.get(f"/admin/auth/user/{user_of('admin').pk}/change/").content


def test_groups_are_looked_at_only_and_a_curator_sees_no_accounts(client_of: Any) -> None:
    assert client_of("admin").get("/admin/auth/group/").status_code == 200
    assert client_of("admin").get("/admin/auth/group/add/").status_code == 403
    assert client_of("curator").get("/admin/auth/user/").status_code == 403
