"""Who changed what of an SAE, on its pages, in the API and in the admin: one list, Django's own."""

from __future__ import annotations

from typing import Any

from django.contrib.admin.models import ADDITION, CHANGE, DELETION, LogEntry
from django.contrib.contenttypes.models import ContentType

from saes.models import SAE

__all__ = ["ADDITION", "CHANGE", "DELETION", "note", "notes_of"]


def note(user: Any, sae: SAE, text: str, flag: int = CHANGE) -> None:
    """Add a line to the SAE's history. What nobody in person did leaves none: its job says it."""
    if getattr(user, "pk", None):
        LogEntry.objects.create(
            user_id=user.pk,
            content_type=ContentType.objects.get_for_model(SAE),
            object_id=str(sae.pk),
            object_repr=sae.name[:200],
            action_flag=flag,
            change_message=text,
        )


def notes_of(sae: SAE, most: int = 100) -> list[LogEntry]:
    kind = ContentType.objects.get_for_model(SAE)
    return list(LogEntry.objects.filter(content_type=kind, object_id=str(sae.pk)).select_related("user")[:most])
