"""What the Hub says of a repository as a whole: its licence, whether it is gated, and whether somebody may have its files."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from django.utils import timezone
from huggingface_hub import constants, errors
from huggingface_hub.utils import get_session, hf_raise_for_status

from saehub.accounts.hub_tokens import HubTokenError, hub_token
from saehub.accounts.models import HubToken
from saehub.jobs.progress import JobError
from saes.hub_client import HubError, address, ask, explain, get_json, headers, hub_errors
from saes.models import HubRepository

ASK_SECONDS = 15.0  # somebody looks at the page
KEPT = timedelta(days=1)


class Refused(Exception):
    """The Hub knows the repository and does not give its files to who asks."""

    def __init__(self, said: HubError) -> None:
        super().__init__(str(said))
        self.said = said


@dataclass(frozen=True)
class Access:
    """Whether somebody may have a repository's files. `granted` None: the Hub could not be asked, `sentence` says why."""

    repo_id: str
    granted: bool | None
    sentence: str = ""
    hint: str = ""
    token: str = ""  # whose token was used: "yours", "the server's", "" for none
    licence: str = ""
    gated: str = ""

    @property
    def page(self) -> str:
        """Where the terms are accepted."""
        return f"{constants.ENDPOINT}/{self.repo_id}"


def access_of(user: Any, repo_id: str) -> Access:
    """Ask the Hub now, with the token that a download of this user would use. Raises nothing: what went wrong is said."""
    granted, said, hint = None, "", ""
    try:
        token = hub_token(user)
        remember(repo_id, token)
        granted = _granted(repo_id, token)
    except (HubError, HubTokenError) as error:
        said, hint = str(error), error.hint
    except Refused as error:
        granted, said, hint = False, str(error.said), error.said.hint
    kept = HubRepository.objects.filter(repo_id=repo_id).first()
    known = {"licence": kept.licence, "gated": kept.gated} if kept else {}
    return Access(repo_id, granted, said, hint, _whose(user), **known)


def remember(repo_id: str, token: str | None = None) -> HubRepository:
    """Read a repository's licence and gate off the Hub and keep them. Raises HubError."""
    expand = "&".join(f"expand={name}" for name in ("cardData", "gated", "sha"))
    with hub_errors(repo_id):
        found, _ = ask(
            lambda: get_json(f"{address(repo_id)}?{expand}", token, time.monotonic() + ASK_SECONDS), attempts=2
        )
    said: dict[str, Any] = found if isinstance(found, dict) else {}
    card = said.get("cardData")
    fields = {"licence": _licence(card if isinstance(card, dict) else {}), "gated": _gate(said.get("gated"))}
    row, _ = HubRepository.objects.update_or_create(repo_id=repo_id, defaults=fields)
    return row


def remember_once(repo_id: str, token: str | None) -> None:
    """`remember` where nothing was kept lately. A download does not fail for it."""
    if HubRepository.objects.filter(repo_id=repo_id, checked_at__gt=timezone.now() - KEPT).exists():
        return
    try:
        remember(repo_id, token)
    except JobError:
        return


def _granted(repo_id: str, token: str | None) -> bool:
    """True. Raises Refused where the Hub does not give its files, HubError where it cannot be asked."""
    url = address(repo_id, "model", "auth-check")
    with hub_errors(repo_id):
        try:
            ask(lambda: hf_raise_for_status(get_session().get(url, headers=headers(token))), attempts=2)
        except errors.RepositoryNotFoundError as error:  # gated ones are of its kind
            raise Refused(explain(error, repo_id)) from None
    return True


def _whose(user: Any) -> str:
    if HubToken.objects.filter(owner_id=user.pk).exists():
        return "yours"
    return "the server's" if hub_token(None) else ""


def _licence(card: dict[str, Any]) -> str:
    """`license` of a card's metadata; of an own one its name."""
    said = card.get("license")
    if said == "other" and isinstance(card.get("license_name"), str):
        said = card["license_name"]
    if isinstance(said, list):
        said = said[0] if said else ""
    return said.replace("\0", "")[:60] if isinstance(said, str) else ""


def _gate(said: Any) -> str:
    return said if said in ("auto", "manual") else ("auto" if said is True else "")
