"""The admin site: open to who may use it by group, and every model's admin asks the choke point."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.http import HttpRequest

from saehub.accounts.access import ADMIN, allowed


class HouseSite(admin.AdminSite):
    site_header = site_title = "SAEHub admin"
    index_title = "Curate the registry"

    def has_permission(self, request: HttpRequest) -> bool:
        return allowed(request.user, ADMIN)

    def register(self, model_or_iterable: Any, admin_class: Any = None, **options: Any) -> None:
        """Other packages' admins (users, queue, login attempts) get our permission checks in front of their own."""
        from saehub.accounts.admin import HouseAdmin

        admin_class = admin_class or HouseAdmin
        if not issubclass(admin_class, HouseAdmin):
            admin_class = type(f"House{admin_class.__name__}", (HouseAdmin, admin_class), {})
        super().register(model_or_iterable, admin_class, **options)
