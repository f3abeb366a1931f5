"""Users' Hub tokens: kept encrypted, checked with the Hub, shown nowhere."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from django.db import connection
from huggingface_hub import constants

from saehub.accounts import hub_tokens
from saehub.accounts.hub_tokens import HubTokenError, hub_token
from saehub.accounts.models import HubToken
from tests.mini_hub import MiniHub

pytestmark = pytest.mark.django_db
TOKEN = "hf_secretOfTheResearcher1234"
SET, CHECK, DELETE = "/account/hub-token/", "/account/hub-token/check/", "/account/hub-token/delete/"


@pytest.fixture
def known(hub: MiniHub) -> MiniHub:
    hub.tokens[TOKEN] = "ada"
    return hub


def page_after(client: Any, answer: Any) -> str:
    assert answer.status_code == 302, answer.content.decode()
    return str(client.get("/account/").content.decode())


def test_a_token_is_checked_kept_and_never_shown(known: MiniHub, client_of: Any, user_of: Any) -> None:
    client = client_of("researcher")
    page = page_after(client, client.post(SET, {"token": f" {TOKEN} "}))
    assert "it belongs to ada" in page and "…1234" in page
    assert TOKEN not in page and TOKEN[3:-4] not in page
    assert hub_token(user_of("researcher")) == TOKEN
    assert [asked.authorization for asked in known.gets("whoami-v2")] == [f"Bearer {TOKEN}"]


def test_at_rest_it_is_encrypted(known: MiniHub, client_of: Any) -> None:
    client_of("researcher").post(SET, {"token": TOKEN})
    with connection.cursor() as cursor:
        cursor.execute("SELECT * FROM accounts_hubtoken")
        row = str(cursor.fetchall())
    assert "1234" in row, "the ending, to tell it apart"
    assert TOKEN not in row and "secretOf" not in row


def test_the_same_token_of_two_users_is_sealed_differently_and_opens_for_its_owner_only(user_of: Any) -> None:
    mine, other = (hub_tokens.save(user_of(role), TOKEN) for role in ("researcher", "curator"))
    assert mine.sealed != other.sealed
    other.sealed = mine.sealed
    with pytest.raises(HubTokenError):
        hub_tokens.unseal(other)


def test_another_one_takes_its_place_and_it_can_be_removed(known: MiniHub, client_of: Any, user_of: Any) -> None:
    client, user = client_of("researcher"), user_of("researcher")
    client.post(SET, {"token": TOKEN})
    known.tokens["hf_another_5678"] = "ada-at-work"
    page = page_after(client, client.post(SET, {"token": "hf_another_5678"}))
    assert "ada-at-work" in page and "…5678" in page and "…1234" not in page
    assert HubToken.objects.count() == 1 and hub_token(user) == "hf_another_5678"
    assert "None yet. With it, your downloads" in page_after(client, client.post(DELETE))
    assert hub_token(user) is None


def test_a_token_the_hub_does_not_know_is_not_kept(known: MiniHub, client_of: Any, user_of: Any) -> None:
    client = client_of("researcher")
    client.post(SET, {"token": TOKEN})
    answer = client.post(SET, {"token": "hf_wrong_and_secret"})
    assert answer.status_code == 422
    page = answer.content.decode()
    assert "it is wrong, expired or revoked" in page and "hf_wrong_and_secret" not in page
    assert hub_token(user_of("researcher")) == TOKEN, "the one that was there stays"


@pytest.mark.parametrize("typed", ["", "a b c d e f g h", "hf_ümlaut_ümlaut", "short", "x" * 300, "hf_line\nbreak_x"])
def test_what_is_no_token_is_said(known: MiniHub, client_of: Any, typed: str) -> None:
    answer = client_of("researcher").post(SET, {"token": typed})
    assert answer.status_code == 422 and 'class="error"' in answer.content.decode()
    assert not HubToken.objects.exists() and not known.gets("whoami-v2")


@pytest.mark.parametrize(
    "why, says",
    [("closed", "cannot be reached"), ("offline", "HF_HUB_OFFLINE"), ("slow", "in time"), ("fault", "code 500")],
)
def test_without_an_answer_it_is_kept_unchecked(
    known: MiniHub, client_of: Any, user_of: Any, monkeypatch: Any, why: str, says: str
) -> None:
    monkeypatch.setattr(hub_tokens, "CHECK_SECONDS", 0.3)
    {
        "closed": known.close,
        "offline": lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True),
        "slow": lambda: known.fault("whoami", "delay", 1.5, times=None),
        "fault": lambda: known.fault("whoami", "status", 500, times=None),
    }[why]()
    client = client_of("researcher")
    page = page_after(client, client.post(SET, {"token": TOKEN}))
    assert "The token is kept." in page and says in page and "never checked" in page
    assert hub_token(user_of("researcher")) == TOKEN


def test_checking_says_when_it_was_revoked(known: MiniHub, client_of: Any) -> None:
    client = client_of("researcher")
    client.post(SET, {"token": TOKEN})
    assert "The Hub knows the token; it belongs to ada." in page_after(client, client.post(CHECK))
    known.tokens = {"hf_other": "x"}
    assert "it is wrong, expired or revoked" in page_after(client, client.post(CHECK))
    client.post(DELETE)
    assert "There is no Hub token to check." in page_after(client, client.post(CHECK))


def test_after_the_key_was_changed_it_is_a_sentence(
    known: MiniHub, client_of: Any, user_of: Any, monkeypatch: Any
) -> None:
    from django.conf import settings

    old = settings.SECRET_KEY
    client = client_of("researcher")
    client.post(SET, {"token": TOKEN})
    row = HubToken.objects.get()
    monkeypatch.setattr(settings, "SECRET_KEY", "another key of this server")
    with pytest.raises(HubTokenError, match="SECRET_KEY has changed") as error:
        hub_token(user_of("researcher"))
    assert "Set the token again" in error.value.hint
    monkeypatch.setattr(settings, "SECRET_KEY_FALLBACKS", [old])
    assert hub_tokens.unseal(row) == TOKEN, "a key that is being retired still opens it"
    monkeypatch.setattr(settings, "SECRET_KEY_FALLBACKS", [])
    client = client_of("researcher")  # the session was signed with the old key
    assert "cannot be read any more" in client.get("/account/").content.decode()
    assert "SECRET_KEY has changed" in page_after(client, client.post(CHECK))


def test_the_servers_token_is_used_by_those_without_one(user_of: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_server")
    assert hub_token(user_of("researcher")) == hub_token(None) == "hf_of_the_server"
    hub_tokens.save(user_of("researcher"), TOKEN)
    assert hub_token(user_of("researcher")) == TOKEN


def test_nobody_reads_or_changes_that_of_another(known: MiniHub, client_of: Any, user_of: Any) -> None:
    hub_tokens.save(user_of("researcher"), TOKEN)
    client_of("viewer").post(DELETE)
    assert hub_token(user_of("researcher")) == TOKEN
    assert "1234" not in client_of("viewer").get("/account/").content.decode()


def test_the_admin_shows_who_has_one_and_nothing_of_it(client_of: Any, user_of: Any) -> None:
    row = hub_tokens.save(user_of("researcher"), TOKEN)
    client = client_of("admin")
    for path in ("/admin/accounts/hubtoken/", f"/admin/accounts/hubtoken/{row.pk}/change/"):
        page = client.get(path).content.decode()
        assert "a-researcher" in page and "1234" in page
        assert row.sealed not in page and TOKEN not in page
    assert client_of("curator").get("/admin/accounts/hubtoken/").status_code == 403


def test_it_is_in_no_log(known: MiniHub, client_of: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    known.fault("whoami", "status", 500, times=1)
    client = client_of("researcher")
    client.post(SET, {"token": TOKEN})
    client.post(CHECK)
    assert len(caplog.text) > 100 and TOKEN not in caplog.text
