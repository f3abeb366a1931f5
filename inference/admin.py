from __future__ import annotations

from django.contrib import admin

from inference.models import Generation, Inference, PromptBatch, Resident, Sweep
from saehub.accounts.admin import MadeByJobs


@admin.register(Generation)
class GenerationAdmin(MadeByJobs):
    """A generation is a record of what was asked and what came out: only its name and owner can be changed."""

    list_display = ("name", "model", "sae", "n_edits", "scope", "temperature", "seconds", "owner", "created_at", "page")
    list_filter = ("scope", "chat", "model", "owner")
    search_fields = ("name", "prompt", "sae__name", "model__name")
    list_select_related = ("model", "sae", "owner")
    date_hierarchy = "created_at"
    fields = (
        "name", "owner", "page", "model", "sae", "prompt", "chat", "edits", "config", "config_fact", "scope", "max_new_tokens", "temperature",
        "seed", "baseline", "steered", "policy", "versions", "seconds", "created_at", "ready_at", "job",
    )  # fmt: skip
    readonly_fields = tuple(name for name in fields if name not in ("name", "owner"))

    @admin.display(description="edits")
    def n_edits(self, row: Generation) -> int:
        return len(row.edits)


@admin.register(Inference)
class InferenceAdmin(MadeByJobs):
    """A text and what fires on it: only its name and owner can be changed."""

    list_display = ("name", "model", "n_tokens", "seconds", "owner", "created_at", "page")
    list_filter = ("chat", "model", "owner")
    search_fields = ("name", "prompt", "model__name")
    list_select_related = ("model", "owner")
    date_hierarchy = "created_at"
    fields = (
        "name", "owner", "page", "model", "saes", "prompt", "more_prompts", "chat", "prepend_bos", "probabilities",
        "top_next", "new_tokens", "temperature", "seed", "config", "config_fact", "edits", "top_features",
        "save_top_texts", "n_tokens", "outputs", "facts", "policy", "versions", "seconds", "created_at", "ready_at", "job",
    )  # fmt: skip
    readonly_fields = tuple(name for name in fields if name not in ("name", "owner"))


@admin.register(PromptBatch)
class PromptBatchAdmin(MadeByJobs):
    """A corpus read text by text: only its name and owner can be changed."""

    list_display = ("name", "model", "corpus", "n_prompts", "n_rows", "size_bytes", "owner", "created_at", "page")
    list_filter = ("model", "corpus", "owner")
    search_fields = ("name", "corpus__name", "model__name")
    list_select_related = ("model", "corpus", "owner")
    date_hierarchy = "created_at"
    fields = (
        "name", "owner", "page", "model", "saes", "corpus", "prepend_bos", "top", "max_prompts", "n_prompts", "n_cut",
        "n_tokens", "n_rows", "size_bytes", "facts", "policy", "versions", "seconds", "created_at", "ready_at", "job",
    )  # fmt: skip
    readonly_fields = tuple(name for name in fields if name not in ("name", "owner"))


@admin.register(Sweep)
class SweepAdmin(MadeByJobs):
    """A generation at several strengths: only its name and owner can be changed."""

    list_display = ("name", "generation", "seconds", "owner", "created_at", "page")
    list_filter = ("owner",)
    search_fields = ("name", "generation__prompt")
    list_select_related = ("generation", "owner")
    date_hierarchy = "created_at"
    fields = (
        "name", "owner", "page", "generation", "factors", "points", "versions", "seconds", "created_at", "ready_at", "job",
    )  # fmt: skip
    readonly_fields = tuple(name for name in fields if name not in ("name", "owner"))


@admin.register(Resident)
class ResidentAdmin(MadeByJobs):
    """What each live worker keeps warm; written by the workers."""

    list_display = ("name", "kind", "n_bytes", "budget", "host", "pid", "used_at")
    list_filter = ("host", "kind")
    search_fields = ("name", "host")
    fields = ("name", "kind", "n_bytes", "budget", "host", "pid", "used_at")
    readonly_fields = fields
