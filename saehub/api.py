"""/api/v1: the same rows under the same permissions, for scripts."""

from __future__ import annotations

from typing import Any

from django.contrib.auth.models import AnonymousUser
from django.http import HttpRequest
from django.shortcuts import get_object_or_404
from ninja import NinjaAPI
from ninja.errors import HttpError
from ninja.security import HttpBearer

from saehub.accounts.access import LOGIN, allowed
from saehub.accounts.models import APIToken
from saehub.jobs.models import Job
from saehub.jobs.runner import summary
from saes.models import SAE


class Needs(HttpBearer):
    """`Authorization: Bearer sae_…`, checked against the permission of the operation by the choke point."""

    def __init__(self, permission: str) -> None:
        super().__init__()
        self.permission = permission

    def authenticate(self, request: HttpRequest, token: str) -> Any:
        row = APIToken.find(token)
        if row is None:
            return None
        request.user = row.owner
        if not (row.covers(self.permission) and allowed(row.owner, self.permission)):
            raise HttpError(403, f"This token may not do that; it needs {self.permission}.")
        return row


api = NinjaAPI(title="SAEHub", version="1", urls_namespace="api", docs_url=None, openapi_url="/openapi.json")


def _own(request: HttpRequest, permission: str, obj: Any) -> None:
    if not allowed(getattr(request, "user", AnonymousUser()), permission, obj):
        raise HttpError(403, "This belongs to somebody else.")


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
    _own(request, "jobs.cancel_job", job)
    job.cancel()
    job.refresh_from_db()
    return summary(job)


@api.get("/saes", auth=Needs("saes.view_sae"))
def sae_list(request: HttpRequest, limit: int = 50, offset: int = 0) -> dict[str, Any]:
    rows = SAE.objects.ready()
    return {"count": rows.count(), "items": [_sae(row) for row in rows[offset : offset + min(max(limit, 1), 200)]]}


@api.get("/saes/{pk}", auth=Needs("saes.view_sae"))
def sae_detail(request: HttpRequest, pk: int) -> dict[str, Any]:
    return _sae(get_object_or_404(SAE, pk=pk)) | {"metrics": SAE.objects.get(pk=pk).metrics}


@api.get("/saes/{pk}/config", auth=Needs("saes.view_sae"))
def sae_config(request: HttpRequest, pk: int) -> dict[str, Any]:
    return get_object_or_404(SAE, pk=pk).config


def _sae(row: SAE) -> dict[str, Any]:
    return {
        "id": row.pk, "name": row.name, "source": row.source, "model": row.model_name, "hook_name": row.hook_name,
        "layer": row.layer, "architecture": row.architecture, "d_in": row.d_in, "d_sae": row.d_sae, "k": row.k,
        "format": row.format, "size_bytes": row.size_bytes, "l0": row.l0, "explained_variance": row.explained_variance,
        "created_at": row.created_at,
    }  # fmt: skip
