"""Every operation of the API against every role, and against rows that somebody else owns."""

from __future__ import annotations

import re
from typing import Any

import pytest
from django.test import Client

from saehub.accounts.access import allowed
from saehub.api import api
from tests.api_calls import ask, problem
from tests.conftest import ROLES

pytestmark = pytest.mark.django_db
SOMEBODY = ("stranger", *ROLES)


def operations() -> list[tuple[str, str, str]]:
    """(method, path, permission) of each; numbers in a path become 1."""
    found = []
    for router in api._get_bound_routers():
        for path, view in router.path_operations.items():
            place = re.sub(r"\{[^}]*\}", "1", f"/{path.strip('/')}")
            found += [
                (method.lower(), place, auth.permission)
                for operation in view.operations
                for method in operation.methods
                for auth in operation.auth_callbacks
            ]
    return found


OPERATIONS = operations()
LOOKS_BY_POST = {"/concepts/preview"}  # computes, and keeps nothing


def test_the_walk_sees_what_the_description_lists(client_of: Any) -> None:
    schema = client_of("viewer").get("/api/v1/openapi.json").json()
    listed = {
        (method, re.sub(r"\{[^}]*\}", "1", path.removeprefix("/api/v1")))
        for path, methods in schema["paths"].items()
        for method in methods
    }
    assert {(method, path) for method, path, _ in OPERATIONS} == listed and len(listed) > 100


def test_what_changes_something_needs_more_than_to_look() -> None:
    for method, path, permission in OPERATIONS:
        looks = ".view_" in permission or permission == "login"
        assert looks == (method == "get" or path in LOOKS_BY_POST), f"{method} {path} needs {permission}"


def test_without_a_token_nothing_opens(client_of: Any) -> None:
    """Not even with the session of a browser, which a page of another site could borrow."""
    browser = client_of("admin")
    for method, path, _ in OPERATIONS:
        for client in (Client(), browser):
            problem(getattr(client, method)(f"/api/v1{path}"), 401, "Give a valid token")


def test_the_least_role_that_may_gets_in_and_the_one_below_does_not(user_of: Any) -> None:
    """Roles build on each other (test_accounts_access.py), so that these two say what all others get."""
    for method, path, permission in OPERATIONS:
        least = next(role for role in SOMEBODY if allowed(user_of(role), permission))
        answer = ask(user_of(least), method, path)
        assert answer.status_code != 403 and answer.status_code < 500, f"{least}: {answer.status_code} {method} {path}"
        if answer.status_code >= 400:
            problem(answer, answer.status_code)
        if least != SOMEBODY[0]:
            below = SOMEBODY[SOMEBODY.index(least) - 1]
            problem(ask(user_of(below), method, path), 403, f"it needs {permission}")


def test_a_token_to_read_changes_nothing(user_of: Any) -> None:
    for method, path, _ in OPERATIONS:
        if method != "get" and path not in LOOKS_BY_POST:
            problem(ask(user_of("admin"), method, path, scope="read"), 403, "This token may not do that")
