"""How we talk to the Hugging Face Hub: one hardened client, waits between attempts, and a sentence for every refusal.

The client is the one that huggingface_hub itself uses in this process, so that what other libraries ask through it is
held to the same rules: no request waits for ever, and a token goes to the Hub's own address and nowhere else.
"""

from __future__ import annotations

import json
import math
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import quote

import httpx2
from huggingface_hub import constants, errors
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, set_client_factory
from huggingface_hub.utils._http import default_client_factory, parse_ratelimit_headers

from saehub.causes import chain_of
from saehub.jobs.progress import JobError

CONNECT_SECONDS = 10.0
READ_SECONDS = 30.0  # between two pieces of an answer
ATTEMPTS = 6  # in a row, without a byte gained
FIRST_WAIT = 1.0  # seconds; doubled with every attempt
LONGEST_WAIT = 30.0
LONGEST_RETRY_AFTER = 300.0  # what the Hub may ask us to wait before we say so instead
LARGEST_ANSWER = 64 * 1024 * 1024  # bytes of one JSON answer
RETRIED = frozenset({408, 429, 500, 502, 503, 504})
DROPPED = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError)

T = TypeVar("T")


class HubError(JobError):
    """The Hub cannot give what was asked for: one plain sentence, and a hint what to do."""


# -- the client
def _client() -> httpx2.Client:
    client = default_client_factory()
    client.event_hooks = {**client.event_hooks, "request": [*client.event_hooks["request"], _guard]}
    return client


def _guard(request: httpx2.Request) -> None:
    """Of every request, also of one that follows a redirect or was made by another library."""
    limits = request.extensions.get("timeout") or {}
    ours = {"connect": CONNECT_SECONDS, "read": READ_SECONDS, "write": READ_SECONDS, "pool": READ_SECONDS}
    request.extensions["timeout"] = {name: limits.get(name) or seconds for name, seconds in ours.items()}
    if not is_hub(str(request.url)):
        request.headers.pop("authorization", None)


set_client_factory(_client)


def is_hub(url: str) -> bool:
    """Whether an address is the Hub's own: the same scheme, host and port as HF_ENDPOINT."""
    return _origin(url) == _origin(constants.ENDPOINT)


def _origin(url: str) -> tuple[str, str, int | None]:
    parsed = httpx2.URL(url)
    return parsed.scheme, parsed.host, parsed.port or {"http": 80, "https": 443}.get(parsed.scheme)


def headers(token: str | None) -> dict[str, str]:
    """What goes with a request: who we are, and the token (HF_TOKEN, or the server's own login, when None)."""
    made = build_hf_headers(token=token or None, library_name="saehub")
    sent = made.get("authorization", "")
    if not re.fullmatch(r"[\x20-\x7e]*", sent):  # the HTTP library would print it in its error
        raise HubError("The Hub token holds characters no token has.", "Set it again under Account, or in HF_TOKEN.")
    return made


def address(repo_id: str, kind: str = "model", *parts: str) -> str:
    """Of the Hub's API: <endpoint>/api/models/<repo_id>/<parts>."""
    below = "".join(f"/{quote(part, safe='')}" for part in parts)
    return f"{constants.ENDPOINT}/api/{kind}s/{quote(repo_id)}{below}"


def get_json(url: str, token: str | None, until: float) -> tuple[Any, httpx2.Response]:
    """One JSON answer, limited in size and, by the monotonic clock, in time."""
    with get_session().stream("GET", url, headers=headers(token)) as response:
        hf_raise_for_status(response)
        body = bytearray()
        for chunk in response.iter_bytes():
            body += chunk
            if len(body) > LARGEST_ANSWER:
                raise HubError(f"The Hub's answer about {response.url.path} is larger than any that is right.")
            if time.monotonic() > until:
                raise httpx2.ReadTimeout("the answer comes too slowly")
    try:
        return json.loads(body), response
    except ValueError:
        raise HubError(
            f"{constants.ENDPOINT} does not answer as the Hub does.", "Check HF_ENDPOINT and any proxy."
        ) from None


# -- attempts
def ask(call: Callable[[], T], *, attempts: int = 4) -> T:
    """`call()`, again after a wait when the connection drops or the Hub is busy; a page may be waiting for it."""
    for attempt in range(1, attempts + 1):
        try:
            return call()
        except (*DROPPED, errors.HfHubHTTPError) as error:
            last = 2 if isinstance(error, httpx2.ConnectError) else attempts
            seconds = pause(error, attempt)
            if attempt >= last or not worth_another(error) or seconds > LONGEST_WAIT:
                raise
            time.sleep(seconds)
    raise AssertionError("unreachable")


def worth_another(error: Exception) -> bool:
    """Whether another attempt may succeed: a dropped connection, a busy or faulty server, a wait that we can afford."""
    if isinstance(error, errors.HfHubHTTPError):
        return error.response.status_code in RETRIED and (_told(error.response) or 0) <= LONGEST_RETRY_AFTER
    return isinstance(error, DROPPED)


def pause(error: Exception, attempt: int) -> float:
    """Seconds before attempt `attempt` + 1: what the Hub asks for, else min(2^(attempt-1) first, longest), less up to half."""
    told = _told(error.response) if isinstance(error, errors.HfHubHTTPError) else None
    if told is not None:
        return told
    return min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT) * random.uniform(0.5, 1)


def _told(response: httpx2.Response) -> float | None:
    """Seconds of Retry-After (a number or a date), or of the rate limit's reset."""
    said = response.headers.get("retry-after", "").strip()
    if said.isdigit():
        return float(said)
    if said:
        try:
            return max(parsedate_to_datetime(said).timestamp() - time.time(), 0.0)
        except ValueError:
            return None
    limit = parse_ratelimit_headers(response.headers)
    return float(limit.reset_in_seconds) if limit and limit.remaining == 0 and response.status_code == 429 else None


def _wait(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{math.ceil(seconds / 60)} minutes"


# -- what went wrong, in words
@contextmanager
def hub_errors(repo_id: str, path: str = "", kind: str = "model") -> Iterator[None]:
    """What the network and the Hub answer becomes one HubError.

    The cause is not chained: its text may hold signed addresses, and a job's traceback is stored.
    """
    try:
        yield
    except (errors.HfHubHTTPError, errors.HFValidationError, httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise explain(error, repo_id, path, kind) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError) as error:
        raise explain(error, repo_id, path, kind) from None


def explain(error: Exception, repo_id: str, path: str = "", kind: str = "model") -> HubError:
    """The HubError that says what `error` means for this repository."""
    if isinstance(error, errors.HfHubHTTPError):
        return _refused(error, repo_id, path, kind)
    if isinstance(error, errors.HFValidationError):
        return HubError(f'"{repo_id}" is not the id of a repository.', "It is written organisation/name.")
    causes = list(chain_of(error))
    answered = [cause for cause in causes if isinstance(cause, errors.HfHubHTTPError)]
    if answered:
        return _refused(answered[0], repo_id, path, kind)
    if constants.is_offline_mode() or any(isinstance(cause, errors.OfflineModeIsEnabled) for cause in causes):
        return HubError(
            f"{repo_id} is not on this machine, and HF_HUB_OFFLINE is set: the Hub is not asked.",
            "Unset HF_HUB_OFFLINE, or put the files into the Hub's cache.",
        )
    if isinstance(error, httpx2.UnsupportedProtocol | httpx2.InvalidURL):
        return HubError(f"{constants.ENDPOINT} is not an address of a Hub.", "Check HF_ENDPOINT.")
    how = "did not answer in time" if isinstance(error, httpx2.TimeoutException) else "cannot be reached"
    return HubError(
        f"{repo_id} is not on this machine and the Hugging Face Hub {how}; check the network, or give a local folder.",
        f"The Hub's address is {constants.ENDPOINT} (HF_ENDPOINT). What was brought stays; press Retry to go on.",
    )


def _refused(error: errors.HfHubHTTPError, repo_id: str, path: str, kind: str) -> HubError:
    status = error.response.status_code
    with_token = "authorization" in error.response.request.headers
    page = f"{constants.ENDPOINT}/{'' if kind == 'model' else kind + 's/'}{repo_id}"
    token_hint = "Set your Hub token under Account (or HF_TOKEN for all), then press Retry."
    if isinstance(error, errors.GatedRepoError):  # before RepositoryNotFoundError, whose kind it is
        if status == 401 or not with_token:
            return HubError(
                f"{repo_id} is gated: accept its terms on {page} and give a Hub token.", f"Do both once. {token_hint}"
            )
        return HubError(
            f"{repo_id} is gated: the account of your Hub token has not been granted access.",
            f"Accept the terms on {page} with that account (some authors then decide by hand), then press Retry.",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(f"{repo_id} has no such revision (branch, tag or commit) on the Hub.", f"See {page}.")
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return HubError(f"{repo_id} has no file {path or 'of this name'} at this revision.", f"See {page}/tree/main.")
    if isinstance(error, errors.DisabledRepoError):
        return HubError(f"{repo_id} has been disabled on the Hub.", f"See {page}.")
    if status == 401 and with_token:
        return HubError("The Hub does not accept this Hub token: it is wrong, expired or revoked.", token_hint)
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        return HubError(
            f"There is no repository {repo_id} on the Hub, or it is private and needs an access token.",
            f"Check the name. {'Your Hub token may not see it.' if with_token else token_hint}",
        )
    if status == 403:
        return HubError(
            f"The Hub token may not read {repo_id}.",
            "Give the token read access to it on the Hub (a fine-grained token names what it may read), then press Retry.",
        )
    if status == 429:
        told = _told(error.response)
        when = f"in {_wait(told)}" if told else "in a few minutes"
        return HubError(
            "The Hub limits how often we may ask, and the limit is reached.",
            f"Press Retry {when}; a Hub token raises the limit.",
        )
    if status >= 500:
        return HubError(
            f"The Hub has a fault of its own ({status}), so {path or 'what it holds'} of {repo_id} could not be had.",
            "Press Retry later; what was brought stays.",
        )
    return HubError(f"The Hub refused {path or 'to answer'} of {repo_id} with code {status}.", f"See {page}.")
