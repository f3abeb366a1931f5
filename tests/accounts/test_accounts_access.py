"""Who may open what: every URL of the site against every role, and the marks that decide it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from django.test import Client
from django.urls import URLPattern, URLResolver, get_resolver

from saehub.accounts.access import LOGIN, PUBLIC, allowed, needed
from saehub.api import api
from tests.conftest import ROLES

pytestmark = pytest.mark.django_db
NUMBER = re.compile(r"<int:\w+>")
WORD = re.compile(r"<slug:\w+>")


def patterns(
    resolver: Any = None, prefix: str = "", spaces: tuple[str, ...] = ()
) -> Iterator[tuple[str, Any, tuple[str, ...]]]:
    """(path, view, namespaces) of every URL of the site; numbers in a path become 1, words a word."""
    for entry in (resolver or get_resolver()).url_patterns:
        path = prefix + str(entry.pattern)
        if isinstance(entry, URLResolver):
            yield from patterns(entry, path, (*spaces, *filter(None, [entry.namespace])))
        elif isinstance(entry, URLPattern):
            yield "/" + WORD.sub("word", NUMBER.sub("1", path)), entry.callback, spaces


OWN = [(path, view) for path, view, spaces in patterns() if not {"admin", "api"} & set(spaces)]


def test_every_view_says_what_it_needs() -> None:
    assert len(OWN) > 20
    for path, view in OWN:
        for method in ("GET", "POST"):
            assert needed(view, method), path


def test_roles_and_strangers(client_of: Any, user_of: Any) -> None:
    """Without a login every page leads to the login; with one, exactly those without the permission get 403."""
    stranger, clients = Client(), {role: client_of(role) for role in (*ROLES, "stranger")}
    for path, view in OWN:
        permission = needed(view, "GET")
        if permission == PUBLIC:
            continue
        assert stranger.get(path).status_code == 302, path
        for role, client in clients.items():
            status = client.get(path).status_code
            may = allowed(user_of(role), permission)
            assert (status != 403) is may, f"{role} got {status} at {path}, which needs {permission}"
            assert status < 500, f"{role} got {status} at {path}"


def test_posts_are_refused_to_whoever_may_not_change(client_of: Any, user_of: Any) -> None:
    stranger, clients = Client(), {role: client_of(role) for role in (*ROLES, "stranger")}
    for path, view in OWN:
        permission = needed(view, "POST")
        if permission in (PUBLIC, LOGIN):
            continue
        assert stranger.post(path).status_code == 302, path
        for role, client in clients.items():
            if not allowed(user_of(role), permission):
                assert client.post(path).status_code == 403, f"{role} may not post to {path}"


def test_roles_build_on_each_other(user_of: Any) -> None:
    held = [user_of(role).get_all_permissions() for role in ROLES]
    for less, more in pairwise(held):
        assert less < more
    assert "training.add_run" not in held[1] and "training.add_run" in held[2]
    assert "accounts.use_admin" not in held[2] and "accounts.use_admin" in held[3]


def test_what_others_own_is_changed_only_by_who_may_act_for_others(user_of: Any) -> None:
    from saehub.jobs.models import enqueue

    job = enqueue("probe", user_of("annotator"), title="count", steps=1)
    assert allowed(user_of("annotator"), "jobs.cancel_job", job)
    assert not allowed(user_of("researcher"), "jobs.cancel_job", job)
    assert allowed(user_of("curator"), "jobs.cancel_job", job)
    assert allowed(user_of("viewer"), "jobs.view_job", job)


def test_an_inactive_user_may_nothing(user_of: Any) -> None:
    user = user_of("admin")
    user.is_active = False
    assert not allowed(user, LOGIN) and not allowed(user, "jobs.view_job")


def test_every_operation_of_the_api_says_what_it_needs() -> None:
    operations = api._operations()
    assert len(operations) > 100
    for operation in operations:
        assert [auth.permission for auth in operation.auth_callbacks], operation.operation_id


@pytest.mark.parametrize("role", ["viewer", "annotator", "researcher"])
def test_the_admin_is_closed_below_curator(role: str, client_of: Any) -> None:
    assert client_of(role).get("/admin/").status_code == 403


def test_a_curator_gets_the_models_of_the_registry_but_not_users(client_of: Any) -> None:
    page = client_of("curator").get("/admin/").content.decode()
    assert "/admin/saes/sae/" in page and "/admin/auth/user/" not in page
    assert client_of("curator").get("/admin/auth/user/").status_code == 403


def test_every_model_has_an_admin_that_opens(client_of: Any) -> None:
    """Its list, and its form for a new row where one may be made."""
    from django.apps import apps
    from django.contrib import admin

    parts_of_others = {
        "JobLine",
        "RunPoint",
        "Star",
        "Worker",
    }  # shown inside their job and their run, nobody else's business, and what processes say of themselves
    for label in ("saes", "training", "concepts", "inference", "jobs", "accounts"):
        for model in apps.get_app_config(label).get_models():
            if model.__name__ in parts_of_others:
                continue
            assert admin.site.is_registered(model), model
            where = f"/admin/{label}/{model._meta.model_name}/"
            answer = client_of("admin").get(where + "?q=x")
            assert answer.status_code == 200, where
