from __future__ import annotations

from django.contrib import admin

from saehub.accounts.admin import MadeByJobs
from saes.models import SAE, LanguageModel


@admin.register(LanguageModel)
class LanguageModelAdmin(MadeByJobs):
    list_display = (
        "name",
        "source",
        "architecture",
        "n_layers",
        "d_model",
        "n_parameters",
        "owner",
        "ready_at",
        "page",
    )
    list_filter = ("source", "architecture", "owner")
    search_fields = ("name", "location", "architecture")
    list_select_related = ("owner",)
    date_hierarchy = "created_at"
    fields = (
        "name", "owner", "page", "source", "location", "revision", "architecture", "n_layers", "d_model", "vocabulary",
        "context_length", "n_parameters", "size_bytes", "has_bos", "has_chat", "created_at", "ready_at", "job",
    )  # fmt: skip
    readonly_fields = tuple(name for name in fields if name not in ("name", "owner"))


@admin.register(SAE)
class SAEAdmin(MadeByJobs):
    list_display = (
        "name", "model_name", "hook_name", "architecture", "d_sae", "l0", "explained_variance", "source",
        "owner", "page",
    )  # fmt: skip
    list_filter = ("source", "architecture", "model_name", "owner")
    search_fields = ("name", "model_name", "hook_name", "sha256", "notes")
    list_select_related = ("owner",)
    date_hierarchy = "created_at"
    fields = (
        "name", "owner", "notes", "page", "source", "model", "model_name", "hook_name", "layer", "architecture", "d_in",
        "d_sae", "k", "format", "path", "size_bytes", "sha256", "l0", "explained_variance", "metrics", "config",
        "created_at", "ready_at", "job",
    )  # fmt: skip
    readonly_fields = tuple(name for name in fields if name not in ("name", "owner", "notes"))
