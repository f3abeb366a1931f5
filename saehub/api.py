"""/api/v1: the same rows under the same permissions, for scripts."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.core.exceptions import PermissionDenied, RequestDataTooBig, TooManyFieldsSent, TooManyFilesSent
from django.http import Http404, HttpRequest, HttpResponse
from ninja import Schema
from ninja.errors import AuthenticationError, HttpError, ValidationError
from pydantic import ConfigDict

from concepts.api import router as concepts
from inference.api import router as inference
from saehub.accounts.access import LOGIN
from saehub.accounts.api_access import Needs, Problem, problem
from saehub.accounts.api_changes import router as changes
from saehub.accounts.api_problems import StrictParser
from saehub.jobs.api import router as jobs
from saehub.jobs.api_workers import router as workers
from saehub.openapi import HubAPI
from saes.api import router as saes
from training.api import router as training

DESCRIPTION = """Every request carries `Authorization: Bearer sae_…`; make a token on your account page. A token may do what its
owner may, `read` tokens only look. Errors are `application/problem+json` (RFC 9457): `status`, `title`, `detail` in one
sentence, and `errors` by field where input was refused. Long work answers 202 with its jobs: give `?wait=` seconds to have it
wait, or ask `/jobs/{id}`. With an `Idempotency-Key` a request that is sent twice is done once. Lists are `count`, `limit`,
`offset` and `items` everywhere."""

api = HubAPI(
    title="SAEHub",
    version="1",
    description=DESCRIPTION,
    urls_namespace="api",
    docs_url=None,
    openapi_url="/openapi.json",
    parser=StrictParser(),
)


@api.exception_handler(Problem)
def _problem(request: HttpRequest, error: Problem) -> HttpResponse:
    return problem(error.status, error.detail, **error.more)


@api.exception_handler(HttpError)
def _http_error(request: HttpRequest, error: HttpError) -> HttpResponse:
    cause = error.__cause__
    return _problem(request, cause) if isinstance(cause, Problem) else problem(error.status_code, str(error))


@api.exception_handler(AuthenticationError)
def _who_are_you(request: HttpRequest, error: AuthenticationError) -> HttpResponse:
    answer = problem(401, "Give a valid token: Authorization: Bearer sae_…")
    answer["WWW-Authenticate"] = "Bearer"
    return answer


@api.exception_handler(PermissionDenied)
def _denied(request: HttpRequest, error: PermissionDenied) -> HttpResponse:
    return problem(403, str(error) or "You may not do this.")


@api.exception_handler(Http404)
def _not_found(request: HttpRequest, error: Http404) -> HttpResponse:
    return problem(404, "There is nothing of this number.")


@api.exception_handler(RequestDataTooBig)
@api.exception_handler(TooManyFieldsSent)
@api.exception_handler(TooManyFilesSent)
def _too_large(request: HttpRequest, error: Exception) -> HttpResponse:
    most = settings.DATA_UPLOAD_MAX_MEMORY_SIZE // 2**20
    return problem(
        413, f"This is larger than the {most} MB a request may be beside its files; send large texts as files."
    )


@api.exception_handler(ValidationError)
def _invalid(request: HttpRequest, error: ValidationError) -> HttpResponse:
    fields: dict[str, list[str]] = {}
    for found in error.errors:
        place = ".".join(str(part) for part in found["loc"][1:]) or "body"
        fields.setdefault(place, []).append(str(found["msg"]))
    name, said = next(iter(fields.items()))
    return problem(422, f"{name}: {said[0]}.", errors=fields)


class Me(Schema):
    """Who a token acts for."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"name": "ada", "groups": ["researcher"]}]})

    name: str
    groups: list[str]


@api.get("/me", auth=Needs(LOGIN), response=Me, summary="Whose token this is")
def me(request: HttpRequest) -> Any:
    user: Any = request.user
    return {"name": user.get_username(), "groups": list(user.groups.values_list("name", flat=True))}


api.add_router("", changes)
api.add_router("", jobs)
api.add_router("", workers)
api.add_router("", saes)
api.add_router("", training)
api.add_router("", concepts)
api.add_router("", inference)
