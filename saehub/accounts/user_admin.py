"""The admin of accounts, in place of Django's own."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.contrib.auth.admin import UserAdmin
from django.contrib.auth.models import User
from django.http import HttpRequest

from saehub.accounts.admin import HouseAdmin

admin.site.unregister(User)  # Django's own was registered when it was imported


@admin.register(User)
class AccountAdmin(HouseAdmin, UserAdmin):
    """Accounts, for superusers and whoever is an admin by group; only the former make or change superusers."""

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> Any:
        fields = super().get_readonly_fields(request, obj)
        return fields if request.user.is_superuser else (*fields, "is_superuser", "user_permissions")

    def _may(self, request: HttpRequest, action: str, obj: Any = None) -> bool:
        if action != "view" and getattr(obj, "is_superuser", False) and not request.user.is_superuser:
            return False
        return super()._may(request, action, obj)
