"""Wrong passwords are counted for a name at the client's address, also behind proxies."""

from __future__ import annotations

from typing import Any

import pytest
from django.test import RequestFactory

from saehub.accounts.addresses import client_address


@pytest.mark.parametrize(
    ("proxies", "header", "address"),
    [
        (0, "203.0.113.9", "10.0.0.1"),  # nobody vouches for the header
        (1, "203.0.113.9", "203.0.113.9"),
        (1, "198.51.100.7, 203.0.113.9", "203.0.113.9"),  # the first was written by the client
        (2, "198.51.100.7, 203.0.113.9, 10.0.0.2", "203.0.113.9"),
        (2, "203.0.113.9", "10.0.0.1"),  # went round a proxy
        (1, "", "10.0.0.1"),
    ],
)
def test_the_address_is_what_our_own_proxies_saw(settings: Any, proxies: int, header: str, address: str) -> None:
    settings.PROXIES = proxies
    request = RequestFactory().get("/", REMOTE_ADDR="10.0.0.1", headers={"X-Forwarded-For": header})
    assert client_address(request) == address


def test_one_guesser_behind_a_proxy_locks_nobody_else_out(settings: Any, client: Any, user_of: Any) -> None:
    settings.PROXIES, settings.AXES_FAILURE_LIMIT = 1, 2
    user = user_of("viewer")
    user.set_password("correct horse battery")
    user.save()

    def login(password: str, address: str) -> int:
        given = {"username": user.username, "password": password}
        return int(client.post("/login/", given, headers={"X-Forwarded-For": address}).status_code)

    assert [login("wrong", "203.0.113.9") for _ in range(2)] == [200, 429]
    assert login("correct horse battery", "203.0.113.9") == 429
    assert login("correct horse battery", "198.51.100.7") == 302
