from importlib import import_module

from django.apps import AppConfig
from django.contrib.admin import autodiscover
from django.contrib.admin.apps import SimpleAdminConfig


class AccountsConfig(AppConfig):
    default = True
    name = "saehub.accounts"
    label = "accounts"
    verbose_name = "Accounts"


class HouseAdminConfig(SimpleAdminConfig):
    default = False
    default_site = "saehub.accounts.site.HouseSite"

    def ready(self) -> None:
        super().ready()
        autodiscover()
        import_module("saehub.accounts.user_admin")  # after Django's own, which it replaces
