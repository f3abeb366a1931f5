"""Who changed what of an SAE, on its pages, in the API and in the admin: one list, Django's own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from django.contrib.admin.models import ADDITION, CHANGE, DELETION, LogEntry
from django.contrib.contenttypes.models import ContentType
from django.db import transaction
from django.db.models import QuerySet

from saes.models import SAE

__all__ = ["ADDITION", "CHANGE", "DELETION", "curate_all", "note", "note_all", "notes_of"]


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


def note_all(user: Any, saes: Iterable[tuple[int, str]], text: str) -> None:
    """`note` for many SAEs, each as (pk, name), in one query."""
    kind = ContentType.objects.get_for_model(SAE)
    lines = (
        LogEntry(
            user_id=user.pk,
            content_type=kind,
            object_id=str(pk),
            object_repr=name[:200],
            action_flag=CHANGE,
            change_message=text,
        )
        for pk, name in saes
    )
    LogEntry.objects.bulk_create(lines, batch_size=1000)


def curate_all(user: Any, rows: QuerySet[SAE], curation: str) -> int:
    """Set the curation of many; each that really changes gets its line. Returns how many those are."""
    changed = list(rows.exclude(curation=curation).order_by().values_list("pk", "name", "curation"))
    with transaction.atomic():
        SAE.objects.filter(pk__in=[pk for pk, _, _ in changed]).update(curation=curation)
        for before in {before for _, _, before in changed}:
            saes = [(pk, name) for pk, name, was in changed if was == before]
            note_all(user, saes, f"{SAE.Curation(before).label} → {SAE.Curation(curation).label}")
    return len(changed)


def notes_of(sae: SAE, most: int = 100) -> list[LogEntry]:
    kind = ContentType.objects.get_for_model(SAE)
    return list(LogEntry.objects.filter(content_type=kind, object_id=str(sae.pk)).select_related("user")[:most])
