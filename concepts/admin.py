from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.db.models import QuerySet
from django.http import HttpRequest

from concepts.models import (
    Concept,
    ConceptConfig,
    ConceptDictionary,
    ConceptFeature,
    ConceptImport,
    DictionaryRevision,
    Explanation,
    FeatureView,
    Label,
    LabelChange,
)
from saehub.accounts.admin import HouseAdmin, MadeByJobs


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


@admin.register(Label)
class LabelAdmin(HouseAdmin):
    list_display = ("text", "sae", "feature", "accepted", "source", "by", "owner", "created_at", "page")
    list_filter = ("source", "accepted", "owner")
    search_fields = ("text", "by", "sae__name")
    list_select_related = ("sae", "owner")
    fields = (
        "text",
        "page",
        "sae",
        "feature",
        "owner",
        "source",
        "by",
        "method",
        "confidence",
        "score",
        "notes",
        "accepted",
        "created_at",
    )
    readonly_fields = ("page", "sae", "feature", "owner", "source", "accepted", "created_at")

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False


@admin.register(LabelChange)
class LabelChangeAdmin(HouseAdmin):
    """To look at; a change is undone on its feature's page."""

    list_display = ("what", "sae", "feature", "owner", "created_at")
    search_fields = ("what", "sae__name")
    list_select_related = ("sae", "owner")
    fields = readonly_fields = ("what", "sae", "feature", "before", "after", "owner", "created_at")

    def get_queryset(self, request: HttpRequest) -> QuerySet[LabelChange]:
        return super().get_queryset(request).defer("before", "after")

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """One out of the middle would make the history wrong."""
        return False


@admin.register(ConceptDictionary)
class ConceptDictionaryAdmin(MadeByJobs):
    """Concepts are changed on their pages, where every change is kept; here is what stands around them."""

    list_display = ("name", "sae", "owner", "source", "created_at", "changed_at", "page")
    list_filter = ("owner",)
    search_fields = ("name", "source", "sae__name")
    list_select_related = ("sae", "owner")
    fields = ("name", "page", "sae", "owner", "source", "notes", "created_at", "changed_at")
    readonly_fields = ("page", "sae", "created_at", "changed_at")


class MembersInline(admin.TabularInline):
    model = ConceptFeature
    fields = readonly_fields = ("feature", "weight", "sign", "score")
    extra = 0
    can_delete = False

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


@admin.register(Concept)
class ConceptAdmin(MadeByJobs):
    """To look at: a concept is changed on its page, where the dictionary's history keeps what it was."""

    list_display = ("name", "dictionary", "description", "page")
    list_filter = ("dictionary__sae__name",)
    search_fields = ("name", "description", "dictionary__name")
    list_select_related = ("dictionary",)
    fields = readonly_fields = ("name", "page", "dictionary", "description")
    inlines = (MembersInline,)

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


@admin.register(ConceptFeature)
class ConceptFeatureAdmin(MadeByJobs):
    list_display = ("feature", "concept", "weight", "sign", "score")
    search_fields = ("=feature", "concept__name")
    list_select_related = ("concept",)
    fields = readonly_fields = ("feature", "concept", "weight", "sign", "score")

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


@admin.register(DictionaryRevision)
class DictionaryRevisionAdmin(HouseAdmin):
    list_display = ("dictionary", "number", "reason", "owner", "added", "changed", "removed", "created_at")
    search_fields = ("dictionary__name", "reason")
    list_select_related = ("dictionary", "owner")
    fields = readonly_fields = ("dictionary", "number", "reason", "owner", "added", "changed", "removed", "created_at")

    def get_queryset(self, request: HttpRequest) -> QuerySet[DictionaryRevision]:
        return super().get_queryset(request).defer("changes")

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """One out of the middle would make the history wrong."""
        return False


@admin.register(ConceptConfig)
class ConceptConfigAdmin(MadeByJobs):
    list_display = ("name", "number", "sae", "owner", "note", "created_at", "page")
    list_filter = ("owner",)
    search_fields = ("name", "note", "sae__name")
    list_select_related = ("sae", "owner")
    fields = readonly_fields = ("name", "number", "page", "sae", "owner", "note", "created_at")

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False  # a version never changes


@admin.register(ConceptImport)
class ConceptImportAdmin(MadeByJobs):
    list_display = ("name", "sae", "dictionary", "form", "size_bytes", "owner", "created_at", "ready_at", "page")
    list_filter = ("form", "owner")
    search_fields = ("name", "sae__name", "dictionary__name")
    list_select_related = ("sae", "dictionary", "owner")
    fields = readonly_fields = (
        "name", "page", "sae", "dictionary", "owner", "form", "size_bytes", "sha256", "counts", "created_at",
        "ready_at", "job",
    )  # fmt: skip


@admin.register(Explanation)
class ExplanationAdmin(MadeByJobs):
    list_display = ("name", "view", "model", "seconds", "owner", "created_at", "ready_at", "page")
    list_filter = ("model", "owner")
    search_fields = ("name", "model__name", "view__sae__name")
    list_select_related = ("view", "model", "owner")
    fields = readonly_fields = (
        "name", "page", "view", "model", "n_shown", "n_tested", "accept_from", "seconds", "owner", "created_at",
        "ready_at", "job",
    )  # fmt: skip

    def get_queryset(self, request: HttpRequest) -> QuerySet[Explanation]:
        return super().get_queryset(request).defer("found", "features")
