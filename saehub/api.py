"""/api/v1: the same rows under the same permissions, for scripts."""

from __future__ import annotations

from typing import Any

from django.core.exceptions import PermissionDenied
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404
from ninja import NinjaAPI
from ninja.errors import AuthenticationError, HttpError, ValidationError

from saehub.accounts.access import LOGIN
from saehub.accounts.api_access import Needs, Problem, problem, require_own
from saehub.jobs.models import Job
from saehub.jobs.runner import summary
from saes.api import router as saes

DESCRIPTION = """Every request carries `Authorization: Bearer sae_…`; make a token on your account page. A token may do what its
owner may, `read` tokens only look. Errors are `application/problem+json` (RFC 9457): `status`, `title`, `detail` in one
sentence, and `errors` by field where input was refused. Long work answers 202 with a job; ask `/jobs/{id}` how it stands."""

api = NinjaAPI(
    title="SAEHub",
    version="1",
    description=DESCRIPTION,
    urls_namespace="api",
    docs_url=None,
    openapi_url="/openapi.json",
)


@api.exception_handler(Problem)
def _problem(request: HttpRequest, error: Problem) -> HttpResponse:
    return problem(error.status, error.detail, **error.more)


@api.exception_handler(HttpError)
def _http_error(request: HttpRequest, error: HttpError) -> HttpResponse:
    return problem(error.status_code, str(error))


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


@api.exception_handler(ValidationError)
def _invalid(request: HttpRequest, error: ValidationError) -> HttpResponse:
    fields: dict[str, list[str]] = {}
    for found in error.errors:
        place = ".".join(str(part) for part in found["loc"][1:]) or "body"
        fields.setdefault(place, []).append(str(found["msg"]))
    name, said = next(iter(fields.items()))
    return problem(422, f"{name}: {said[0]}.", errors=fields)


@api.get("/me", auth=Needs(LOGIN))
def me(request: HttpRequest) -> dict[str, Any]:
    user: Any = request.user
    return {"name": user.get_username(), "groups": list(user.groups.values_list("name", flat=True))}


@api.get("/jobs", auth=Needs("jobs.view_job"))
def job_list(request: HttpRequest, state: str = "", limit: int = 50) -> list[dict[str, Any]]:
    jobs = Job.objects.filter(state=state) if state else Job.objects.all()
    return [summary(job) for job in jobs[: min(max(limit, 1), 200)]]


@api.get("/jobs/{pk}", auth=Needs("jobs.view_job"))
def job_detail(request: HttpRequest, pk: int) -> dict[str, Any]:
    return summary(get_object_or_404(Job, pk=pk))


@api.post("/jobs/{pk}/cancel", auth=Needs("jobs.cancel_job"))
def job_cancel(request: HttpRequest, pk: int) -> dict[str, Any]:
    job = get_object_or_404(Job, pk=pk)
    require_own(request, "jobs.cancel_job", job)
    job.cancel()
    job.refresh_from_db()
    return summary(job)


api.add_router("", saes)
