from __future__ import annotations

from django.contrib import admin

from saehub.accounts.admin import MadeByJobs
from training.models import Capture, Corpus, Evaluation, Run, RunPoint, Sweep

MADE = ("owner", "created_at", "ready_at", "job")


@admin.register(Corpus)
class CorpusAdmin(MadeByJobs):
    list_display = (
        "name",
        "source",
        "location",
        "n_documents",
        "n_characters",
        "size_bytes",
        "owner",
        "ready_at",
        "page",
    )
    list_filter = ("source", "owner")
    search_fields = ("name", "location", "sha256")
    list_select_related = ("owner",)
    date_hierarchy = "created_at"
    fields = (
        "name", "page", "source", "location", "subset", "split", "text_field", "revision", "n_documents",
        "n_characters", "size_bytes", "sha256", "chats", "sample", *MADE,
    )  # fmt: skip
    readonly_fields = tuple(name for name in fields if name not in ("name", "owner"))


@admin.register(Capture)
class CaptureAdmin(MadeByJobs):
    list_display = ("name", "model", "corpus", "n_tokens", "size_bytes", "dtype", "owner", "ready_at", "page")
    list_filter = ("model", "dtype", "owner")
    search_fields = ("name", "model__name", "corpus__name")
    list_select_related = ("model", "corpus", "owner")
    date_hierarchy = "created_at"
    fields = (
        "name", "page", "model", "corpus", "hook_names", "context_length", "prepend_bos", "store_special", "dtype",
        "packed", "chat_template", "plain_chats", "roles", "compute_dtype", "max_norm_ratio", "stored", "parts", "location",
        "max_tokens", "n_tokens", "n_masked", "n_contexts", "size_bytes", "seconds", "manifest", *MADE,
    )  # fmt: skip
    readonly_fields = tuple(name for name in fields if name not in ("name", "owner"))


@admin.register(Run)
class RunAdmin(MadeByJobs):
    list_display = (
        "name",
        "capture",
        "hook_name",
        "architecture",
        "tokens",
        "seconds",
        "sae",
        "owner",
        "ready_at",
        "page",
    )
    list_filter = ("architecture", "capture__model", "owner")
    search_fields = ("name", "hook_name", "capture__name")
    list_select_related = ("capture", "sae", "owner")
    date_hierarchy = "created_at"
    fields = (
        "name", "page", "capture", "hook_name", "architecture", "config", "evaluate_after", "harvest_after", "sweep", "stop_at",
        "pause_at", "error",
        "sae", "tokens", "seconds", *MADE,
    )  # fmt: skip
    readonly_fields = tuple(name for name in fields if name not in ("name", "owner"))


@admin.register(Sweep)
class SweepAdmin(MadeByJobs):
    list_display = ("name", "capture", "seconds", "owner", "ready_at", "page")
    list_filter = ("capture__model", "owner")
    search_fields = ("name", "capture__name")
    list_select_related = ("capture", "owner")
    date_hierarchy = "created_at"
    fields = ("name", "page", "capture", "grid", "config", "seconds", *MADE)
    readonly_fields = tuple(name for name in fields if name not in ("name", "owner"))


@admin.register(RunPoint)
class RunPointAdmin(MadeByJobs):
    """A run's curve; to look at."""

    list_display = ("run", "step", "tokens")
    search_fields = ("run__name",)
    list_filter = ("run__architecture",)
    list_select_related = ("run",)
    readonly_fields = ("run", "step", "tokens", "values")


@admin.register(Evaluation)
class EvaluationAdmin(MadeByJobs):
    list_display = ("name", "sae", "capture", "max_contexts", "seconds", "owner", "ready_at", "page")
    list_filter = ("sae__architecture", "owner")
    search_fields = ("name", "sae__name", "capture__name")
    list_select_related = ("sae", "capture", "owner")
    date_hierarchy = "created_at"
    fields = ("name", "page", "sae", "capture", "max_contexts", "metrics", "seconds", *MADE)
    readonly_fields = tuple(name for name in fields if name not in ("name", "owner"))
