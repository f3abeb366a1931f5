from __future__ import annotations

from django.contrib import admin

from concepts.models import FeatureView
from saehub.accounts.admin import MadeByJobs


@admin.register(FeatureView)
class FeatureViewAdmin(MadeByJobs):
    list_display = ("name", "sae", "capture", "n_tokens", "alive", "dead", "seconds", "owner", "ready_at", "page")
    list_filter = ("sae__model_name", "sae__architecture", "owner")
    search_fields = ("name", "sae__name", "capture__name")
    list_select_related = ("sae", "capture", "owner")
    date_hierarchy = "created_at"
    fields = (
        "name", "owner", "page", "sae", "capture", "k", "n_tokens", "alive", "dead", "seconds", "created_at",
        "ready_at", "job",
    )  # fmt: skip
    readonly_fields = tuple(name for name in fields if name not in ("name", "owner"))
