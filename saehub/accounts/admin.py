"""Admin base classes that ask the choke point, and the admin of tokens."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils.html import format_html

from saehub.accounts.access import ADMIN, allowed
from saehub.accounts.models import APIToken, Change, HubToken, KeptAnswer


class HouseAdmin(admin.ModelAdmin):
    """Every model's admin: permissions by `allowed`, a link to the public page, provenance read-only."""

    list_per_page = 50
    show_full_result_count = False

    def _may(self, request: HttpRequest, action: str, obj: Any = None) -> bool:
        meta = self.opts
        return allowed(request.user, ADMIN) and allowed(
            request.user, f"{meta.app_label}.{action}_{meta.model_name}", obj
        )

    def has_module_permission(self, request: HttpRequest) -> bool:
        return self.has_view_permission(request)

    def has_view_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return self._may(request, "view", obj) or self._may(request, "change", obj)

    def has_add_permission(self, request: HttpRequest) -> bool:
        return self._may(request, "add")

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return self._may(request, "change", obj)

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return self._may(request, "delete", obj)

    @admin.display(description="page")
    def page(self, obj: Any) -> str:
        return format_html('<a href="{}">open</a>', obj.get_absolute_url()) if obj.pk else "–"


class MadeByJobs(HouseAdmin):
    """Rows that jobs make: to look at, annotate and delete here, never to add."""

    def delete_queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        """One by one, so that each row's folder goes with it."""
        for row in queryset:
            row.delete()

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False


@admin.register(APIToken)
class APITokenAdmin(MadeByJobs):
    list_display = ("name", "owner", "scope", "start", "created_at", "expires_at", "used_at")
    list_filter = ("scope", "owner")
    search_fields = ("name", "start", "owner__username")
    readonly_fields = ("owner", "start", "created_at", "used_at")
    fields = ("name", "owner", "scope", "start", "created_at", "expires_at", "used_at")


@admin.register(HubToken)
class HubTokenAdmin(MadeByJobs):
    """Who has one; it can be removed here, and read nowhere."""

    list_display = ("owner", "account", "ending", "set_at", "checked_at")
    list_select_related = ("owner",)
    search_fields = ("owner__username", "account")
    readonly_fields = fields = ("owner", "account", "ending", "set_at", "checked_at")


@admin.register(KeptAnswer)
class KeptAnswerAdmin(MadeByJobs):
    """Answers kept for a day, so that a request sent twice is done once."""

    list_display = ("key", "owner", "status", "expires_at")
    list_filter = ("owner",)
    search_fields = ("key", "owner__username")
    readonly_fields = fields = ("owner", "key", "digest", "status", "body", "expires_at")


@admin.register(Change)
class ChangeAdmin(MadeByJobs):
    """Who changed what, by page, API and administration. To read: nobody adds, changes or deletes a line."""

    list_display = ("at", "name", "way", "token", "method", "what", "path")
    list_filter = ("way", "method", ("user", admin.RelatedOnlyFieldListFilter))
    search_fields = ("name", "what", "path", "token")
    date_hierarchy = "at"
    fields = ("at", "user", "name", "way", "token", "method", "what", "path")

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False  # no superuser either

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False
