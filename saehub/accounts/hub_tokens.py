"""Tokens for the Hugging Face Hub, one a user, encrypted in the database.

The key is derived from SECRET_KEY, for each user another one: key = HKDF-SHA256(SECRET_KEY, info = purpose + user id). A
copy of the database alone opens none of them, and a token moved to another user's row opens nothing either.
"""

from __future__ import annotations

import base64
import json
import re
import time
from typing import Any

import httpx2
from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from django.conf import settings
from django.utils import timezone
from huggingface_hub import constants, get_token
from huggingface_hub.utils import build_hf_headers

from saehub.accounts.models import HubToken

PURPOSE = b"saehub: hub token of user "
CHECK_SECONDS = 10.0
LARGEST_ANSWER = 256 * 1024
SHAPE = re.compile(r"[\x21-\x7e]{8,200}")  # what can stand in a header; the HTTP library prints what cannot


class HubTokenError(ValueError):
    """A Hub token that cannot be used: one sentence and a hint, never the token."""

    def __init__(self, sentence: str, hint: str = "") -> None:
        super().__init__(sentence)
        self.hint = hint


class WrongToken(HubTokenError):
    """The Hub was asked and does not know the token."""


def hub_token(user: Any) -> str | None:
    """The token to ask the Hub with for `user`: their own, else the server's (HF_TOKEN, or its `hf auth login`).

    Raises HubTokenError when theirs cannot be read any more.
    """
    row = HubToken.objects.filter(owner_id=user.pk).first() if getattr(user, "pk", None) else None
    return unseal(row) if row else get_token()


def save(user: Any, token: str) -> HubToken:
    """Keep `token` as the one of `user`, in place of another. Raises HubTokenError for what no token looks like."""
    if not SHAPE.fullmatch(token):
        raise HubTokenError("This is not a token: those are letters and digits without spaces, such as hf_….")
    sealed = _fernet(user.pk).encrypt(token.encode()).decode()
    fields = {"sealed": sealed, "ending": token[-4:], "set_at": timezone.now(), "account": "", "checked_at": None}
    row, _ = HubToken.objects.update_or_create(owner=user, defaults=fields)
    return row


def unseal(row: HubToken) -> str:
    try:
        return _fernet(row.owner_id).decrypt(row.sealed.encode()).decode()
    except (InvalidToken, ValueError):
        raise HubTokenError(
            "Your Hub token cannot be read any more, because the server's SECRET_KEY has changed.",
            "Set the token again under Account.",
        ) from None


def _fernet(user_id: int) -> MultiFernet:
    """Encrypts with SECRET_KEY, and still opens what SECRET_KEY_FALLBACKS have sealed."""
    secrets = [str(key) for key in (settings.SECRET_KEY, *settings.SECRET_KEY_FALLBACKS)]
    info = PURPOSE + str(user_id).encode()
    keys = (HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(secret.encode()) for secret in secrets)
    return MultiFernet([Fernet(base64.urlsafe_b64encode(key)) for key in keys])


def whose(token: str) -> str:
    """Name of the Hub account a token belongs to, as the Hub says. Raises WrongToken, or HubTokenError for no answer."""
    if constants.is_offline_mode():
        raise HubTokenError("HF_HUB_OFFLINE is set, so the Hub was not asked about this token.")
    until = time.monotonic() + CHECK_SECONDS
    body = bytearray()
    try:
        with httpx2.stream(
            "GET", f"{constants.ENDPOINT}/api/whoami-v2", headers=build_hf_headers(token=token), timeout=CHECK_SECONDS
        ) as response:
            for chunk in response.iter_bytes():
                body += chunk
                if len(body) > LARGEST_ANSWER or time.monotonic() > until:
                    raise httpx2.ReadTimeout("too slow or too long")
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        how = "did not answer in time" if isinstance(error, httpx2.TimeoutException) else "cannot be reached"
        raise HubTokenError(f"The Hub at {constants.ENDPOINT} {how}, so the token is not checked.") from None
    if response.status_code in (401, 403):
        raise WrongToken("The Hub does not know this token: it is wrong, expired or revoked.")
    try:
        return str(json.loads(body)["name"])[:120]
    except (ValueError, KeyError, TypeError):
        said = f"{constants.ENDPOINT} answered with code {response.status_code} and no name"
        raise HubTokenError(f"{said}, so the token is not checked.") from None
