from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.db.models import QuerySet
from django.http import HttpRequest

from saehub.accounts.access import allowed
from saehub.accounts.admin import MadeByJobs
from saehub.jobs.models import Job, JobLine


class LineInline(admin.TabularInline):
    model = JobLine
    extra = 0
    max_num = 0
    can_delete = False
    readonly_fields = ("at", "text")

    def has_view_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return allowed(request.user, "jobs.view_job", obj)


@admin.register(Job)
class JobAdmin(MadeByJobs):
    list_display = ("pk", "title", "kind", "queue", "state", "owner", "attempt", "created_at", "finished_at", "page")
    list_filter = ("state", "queue", "kind", "owner")
    search_fields = ("title", "error", "worker")
    date_hierarchy = "created_at"
    list_select_related = ("owner",)
    actions = ("cancel", "retry")
    inlines = (LineInline,)

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> list[str]:
        return [field.name for field in Job._meta.fields]

    @admin.action(description="Cancel selected jobs", permissions=["cancel"])
    def cancel(self, request: HttpRequest, jobs: QuerySet[Job]) -> None:
        for job in jobs:
            job.cancel()

    @admin.action(description="Try selected jobs again", permissions=["cancel"])
    def retry(self, request: HttpRequest, jobs: QuerySet[Job]) -> None:
        for job in jobs:
            job.retry()

    def has_cancel_permission(self, request: HttpRequest) -> bool:
        return self._may(request, "cancel")
