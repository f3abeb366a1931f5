from __future__ import annotations

import json
from typing import Any

from django import forms
from django.contrib import admin, messages
from django.contrib.admin.actions import delete_selected
from django.contrib.admin.helpers import ActionForm
from django.contrib.auth import get_user_model
from django.core.paginator import Paginator
from django.db import connection
from django.db.models import QuerySet
from django.http import HttpRequest
from django.urls import reverse
from django.utils.functional import cached_property
from django.utils.html import format_html

from saehub.accounts.admin import HouseAdmin, MadeByJobs
from saehub.figures import breakable
from saehub.jobs.models import State
from saehub.typed import row_number
from saes.dependents import users
from saes.facets import FACET_FIELDS, SEPARATOR
from saes.filters import search_query
from saes.history import curate_all, note_all
from saes.models import SAE, HubRepository, LanguageModel, Release
from saes.one_sae import start
from saes.removal import InUse, remove
from saes.tags import TagsField, tag, tags_of

MOST_JOBS = 500
HEAVY = ("config", "proof", "checksums", "metrics", "facts", "aliases", "notes", "words", "facets", "asked")


class Estimated(Paginator):
    """Counts exactly up to a limit; a larger unfiltered table by what PostgreSQL itself believes of it."""

    LIMIT = 10_000

    @cached_property
    def count(self) -> int:  # type: ignore[override]
        rows: Any = self.object_list
        if rows.query.where:
            return int(rows.order_by().count())
        table = rows.model._meta.db_table
        with connection.cursor() as cursor:
            cursor.execute("SELECT reltuples::bigint FROM pg_class WHERE oid = %s::regclass", [f'"{table}"'])
            believed = int(cursor.fetchone()[0])
        return believed if believed > self.LIMIT else int(rows.order_by().count())


class ReleaseFilter(admin.RelatedFieldListFilter):
    """Only the release that was followed to: a list of hundreds of releases beside every page helps nobody."""

    def field_choices(self, field: Any, request: HttpRequest, model_admin: Any) -> list[Any]:
        chosen: Any = self.lookup_val
        chosen = chosen[0] if isinstance(chosen, list) else chosen
        row = Release.objects.filter(pk=row_number(chosen)).first() if chosen else None
        return [(row.pk, row.name)] if row else []

    def has_output(self) -> bool:
        return bool(self.lookup_val)


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


class HereFilter(admin.SimpleListFilter):
    title = "files"
    parameter_name = "here"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [("yes", "here"), ("no", "not here"), ("failed", "could not be brought")]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        if self.value() == "failed":
            return queryset.filter(ready_at=None, job__state=State.FAILED)
        return queryset.filter(ready_at__isnull=self.value() == "no") if self.value() else queryset


class FacetFilter(admin.SimpleListFilter):
    """One field's values, read for all such filters at once off the index that the registry's list keeps of them."""

    field = ""

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        place = FACET_FIELDS.index(self.field)
        return [(value, value) for value in sorted({text[place] for text in _facets_of(request)} - {""})]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return queryset.filter(**{self.field: self.value()}) if self.value() else queryset


class SiteFilter(FacetFilter):
    field = title = parameter_name = "site"


class ArchitectureFilter(FacetFilter):
    field = title = parameter_name = "architecture"


class ModelFilter(FacetFilter):
    field = parameter_name = "model_name"
    title = "language model"


class TagFilter(FacetFilter):
    field = "tags"
    title = parameter_name = "tag"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        sets = {text[FACET_FIELDS.index(self.field)] for text in _facets_of(request)}
        return [(word, word) for word in sorted({word for written in sets for word in json.loads(written)})]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return queryset.filter(tags__contains=[self.value()]) if self.value() else queryset


def _facets_of(request: Any) -> list[list[str]]:
    if not hasattr(request, "facets_of_saes"):
        texts = SAE.objects.order_by().values_list("facets", flat=True).distinct()
        request.facets_of_saes = [text.split(SEPARATOR, len(FACET_FIELDS) - 1) for text in texts]
    found: list[list[str]] = request.facets_of_saes
    return found


class DeskForm(ActionForm):
    """The fields of the actions that give rows to somebody, and that tag them."""

    owner = forms.ModelChoiceField(
        get_user_model().objects.filter(is_active=True).order_by("username"),
        required=False,
        label="Owner",
        empty_label="(nobody: the house)",
    )
    tags = TagsField(label="Tags")


@admin.register(HubRepository)
class HubRepositoryAdmin(MadeByJobs):
    """What the Hub said of a repository; without its row it is asked again."""

    list_display = ("repo_id", "licence", "gated", "checked_at")
    list_filter = ("gated", "licence")
    search_fields = ("repo_id",)
    readonly_fields = fields = ("repo_id", "licence", "gated", "checked_at")
    paginator = Estimated


@admin.register(Release)
class ReleaseAdmin(HouseAdmin):
    list_display = ("name", "repo_id", "model_name", "format", "directory", "synced_at", "saes_of")
    list_filter = ("format",)
    search_fields = ("name", "repo_id", "model_name")
    readonly_fields = ("synced_at", "directory")
    actions = ("publish", "review", "deprecate")
    paginator = Estimated

    @admin.display(description="SAEs")
    def saes_of(self, obj: Release) -> str:
        return format_html(
            '<a href="{}?release__id__exact={}">its SAEs</a>', reverse("admin:saes_sae_changelist"), obj.pk
        )

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    @admin.action(description="Publish all of its SAEs", permissions=["change"])
    def publish(self, request: HttpRequest, queryset: QuerySet[Release]) -> None:
        self._curate(request, queryset, SAE.Curation.PUBLISHED)

    @admin.action(description="Mark all of its SAEs as reviewed", permissions=["change"])
    def review(self, request: HttpRequest, queryset: QuerySet[Release]) -> None:
        self._curate(request, queryset, SAE.Curation.REVIEWED)

    @admin.action(description="Deprecate all of its SAEs", permissions=["change"])
    def deprecate(self, request: HttpRequest, queryset: QuerySet[Release]) -> None:
        self._curate(request, queryset, SAE.Curation.DEPRECATED)

    def _curate(self, request: HttpRequest, queryset: QuerySet[Release], curation: str) -> None:
        n = curate_all(request.user, SAE.objects.filter(release__in=queryset), curation)
        self.message_user(request, f"{_are(n)} {curation} now.", messages.SUCCESS)


def _are(n: int) -> str:
    return f"{n:,} SAE{'s are' if n != 1 else ' is'}"


def _delete_unused(desk: SAEAdmin, request: HttpRequest, queryset: QuerySet[SAE]) -> Any:
    used = {row.pk: users(row) for row in queryset} if request.POST.get("post") else {}
    for row in queryset:
        if used.get(row.pk):
            desk.message_user(request, f"{row.name} stays: {' '.join(used[row.pk])}", messages.ERROR)
    left = queryset.exclude(pk__in=[pk for pk, said in used.items() if said])
    return delete_selected(desk, request, left) if left.exists() else None


PARTS: tuple[tuple[str | None, tuple[str, ...], tuple[str, ...]], ...] = (
    (None, (), ("name", "curation", "owner", "tags", "licence", "pin", "notes", "page")),
    (
        "What it is",
        (),
        (
            "source", "model", "model_name", "hook_name", "hook_name_out", "site", "layer", "architecture", "d_in",
            "d_sae", "k",
        ),
    ),
    (
        "Where it was published",
        (),
        (
            "release", "sae_id", "aliases", "repo_id", "repo_path", "revision", "neuronpedia_id", "published_l0",
            "published_variance", "gone_at",
        ),
    ),
    (
        "Its files",
        (),
        ("format", "path", "size_bytes", "sha256", "facts", "asked", "read_at", "verified_at", "ready_at", "job"),
    ),
    ("Measured", (), ("l0", "explained_variance")),
    ("As it was read", ("collapse",), ("config", "proof", "checksums", "metrics", "created_at")),
)  # fmt: skip
CHANGED_HERE = ("name", "curation", "owner", "tags", "licence", "pin", "notes", "model")
READ_ONLY = tuple(name for _, _, names in PARTS for name in names if name not in CHANGED_HERE)


@admin.register(SAE)
class SAEAdmin(MadeByJobs):
    list_display = ("name", "curation", "place", "kind", "here", "owner", "page")  # what fits beside the filters
    list_filter = (
        "curation", TagFilter, "source", HereFilter, SiteFilter, ArchitectureFilter, ModelFilter, ("release", ReleaseFilter),
    )  # fmt: skip
    search_fields = ("words",)
    search_help_text = "Beginnings of words of names, repositories, paths, models, hook points and notes"
    list_select_related = ("owner",)
    autocomplete_fields = ("owner", "model")
    actions = (
        "publish",
        "review",
        "deprecate",
        "draft",
        "verify_files",
        "reread_config",
        "set_owner",
        "add_tags",
        "remove_tags",
    )
    action_form = DeskForm
    paginator = Estimated
    fieldsets = tuple((title, {"fields": names, "classes": css}) for title, css, names in PARTS)
    readonly_fields = READ_ONLY

    @admin.display(description="model, place", ordering="model_name")
    def place(self, obj: SAE) -> str:
        where = " ".join(str(part) for part in (obj.site, obj.layer) if part not in ("", None))
        return format_html("{}<br>{}", breakable(obj.model_name or "–"), where)

    @admin.display(description="kind, features", ordering="d_sae")
    def kind(self, obj: SAE) -> str:
        return format_html("{}<br>{}", obj.architecture or "–", f"{obj.d_sae:,}" if obj.d_sae else "")

    @admin.display(description="here", boolean=True, ordering="ready_at")
    def here(self, obj: SAE) -> bool:
        return obj.ready

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        """A list of a hundred thousand does not read configs and proofs."""
        rows = super().get_queryset(request)
        if request.resolver_match and request.resolver_match.url_name == "saes_sae_changelist":
            return rows.defer(*HEAVY)
        return rows

    def get_search_results(self, request: HttpRequest, queryset: QuerySet[Any], search_term: str) -> tuple[Any, bool]:
        """By the words that the database keeps of every SAE, as the registry's page searches."""
        query = search_query(search_term)
        if not search_term:
            return queryset, False
        return (queryset.filter(words=query) if query else queryset.none()), False

    def get_actions(self, request: HttpRequest) -> dict[str, Any]:
        """Django's own deletion, but of what nobody is using."""
        actions: dict[str, Any] = super().get_actions(request)
        if "delete_selected" in actions:
            _, name, words = actions["delete_selected"]
            actions["delete_selected"] = (_delete_unused, name, words)
        return actions

    def delete_queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        """As the delete page does: one by one with its files, and nothing that is in use."""
        for row in queryset:
            try:
                remove(row, request.user)
            except InUse as error:
                self.message_user(request, f"{row.name} stays: {error}", messages.ERROR)

    def delete_model(self, request: HttpRequest, obj: SAE) -> None:
        self.delete_queryset(request, [obj])  # type: ignore[arg-type]

    # -- actions
    @admin.action(description="Publish", permissions=["change"])
    def publish(self, request: HttpRequest, queryset: QuerySet[SAE]) -> None:
        self._curate(request, queryset, SAE.Curation.PUBLISHED)

    @admin.action(description="Mark as reviewed", permissions=["change"])
    def review(self, request: HttpRequest, queryset: QuerySet[SAE]) -> None:
        self._curate(request, queryset, SAE.Curation.REVIEWED)

    @admin.action(description="Deprecate", permissions=["change"])
    def deprecate(self, request: HttpRequest, queryset: QuerySet[SAE]) -> None:
        self._curate(request, queryset, SAE.Curation.DEPRECATED)

    @admin.action(description="Back to draft", permissions=["change"])
    def draft(self, request: HttpRequest, queryset: QuerySet[SAE]) -> None:
        self._curate(request, queryset, SAE.Curation.DRAFT)

    def _curate(self, request: HttpRequest, queryset: QuerySet[SAE], curation: str) -> None:
        n = curate_all(request.user, queryset, curation)
        self.message_user(request, f"{_are(n)} {curation} now.", messages.SUCCESS)

    @admin.action(description="Verify files", permissions=["change"])
    def verify_files(self, request: HttpRequest, queryset: QuerySet[SAE]) -> None:
        self._start(request, queryset, "verify")

    @admin.action(description="Re-read config", permissions=["change"])
    def reread_config(self, request: HttpRequest, queryset: QuerySet[SAE]) -> None:
        self._start(request, queryset, "inspect")

    def _start(self, request: HttpRequest, queryset: QuerySet[SAE], kind: str) -> None:
        """One job a row; what cannot be done is counted and the first reason given."""
        queued, refused = 0, []
        for row in queryset.select_related("job")[:MOST_JOBS]:
            try:
                start(row, kind, request.user)
                queued += 1
            except ValueError as error:
                refused.append(str(error))
        if queued:
            self.message_user(
                request,
                f"{queued:,} job{'s were' if queued != 1 else ' was'} queued: see Jobs, and each SAE's page.",
                messages.SUCCESS,
            )
        if refused:
            self.message_user(
                request,
                f"{len(refused):,} {'were' if len(refused) != 1 else 'was'} left out: {refused[0]}",
                messages.WARNING,
            )

    def formfield_for_dbfield(self, db_field: Any, request: Any, **kwargs: Any) -> Any:
        if db_field.name == "tags":
            return TagsField(help_text="Short words with spaces between them")
        return super().formfield_for_dbfield(db_field, request, **kwargs)

    @admin.action(description="Add the tags written", permissions=["change"])
    def add_tags(self, request: HttpRequest, queryset: QuerySet[SAE]) -> None:
        self._tag(request, queryset, add=True)

    @admin.action(description="Take off the tags written", permissions=["change"])
    def remove_tags(self, request: HttpRequest, queryset: QuerySet[SAE]) -> None:
        self._tag(request, queryset, add=False)

    def _tag(self, request: HttpRequest, queryset: QuerySet[SAE], *, add: bool) -> None:
        words = tags_of(request.POST.get("tags", ""))  # checked by the form of the actions
        keys = list(queryset.order_by().values_list("pk", flat=True))
        try:
            n = tag(request.user, keys, **{"add" if add else "remove": words})
        except ValueError as error:
            self.message_user(request, str(error), messages.ERROR)
        else:
            self.message_user(request, f"Tags of {n:,} SAE{'s' if n != 1 else ''} changed.", messages.SUCCESS)

    @admin.action(description="Give to the owner chosen", permissions=["change"])
    def set_owner(self, request: HttpRequest, queryset: QuerySet[SAE]) -> None:
        given = request.POST.get("owner", "")  # checked by the form of the actions
        owner = get_user_model().objects.get(pk=int(given)) if given else None
        rows = list(queryset.order_by().values_list("pk", "name"))
        SAE.objects.filter(pk__in=[pk for pk, _ in rows]).update(owner=owner)
        note_all(request.user, rows, f"Given to {owner.get_username() if owner else 'the house'}")
        self.message_user(request, f"{_are(len(rows))} of {owner or 'the house'} now.", messages.SUCCESS)
