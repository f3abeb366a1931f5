"""Features, labels, concepts and configs of edits in /api/v1."""

from __future__ import annotations

from ninja import Router

from concepts import (
    api_changes,
    api_configs,
    api_dictionaries,
    api_explanations,
    api_exports,
    api_features,
    api_imports,
    api_labels,
    api_search,
)

router = Router()
for part in (
    api_features,
    api_labels,
    api_search,
    api_explanations,
    api_exports,
    api_dictionaries,
    api_imports,
    api_changes,
    api_configs,
):
    router.add_router("", part.router)
