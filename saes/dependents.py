"""What hangs on an SAE, in whichever app: asked of Django's own list of relations, so that no app above is imported."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from django.db.models import CASCADE, Model

from saehub.jobs.kinds import KINDS
from saehub.jobs.made import Made
from saehub.jobs.models import LIVE, Job
from saes.models import SAE

SHOWN = 5
DEEPEST = 3  # relations of relations


@dataclass(frozen=True)
class Dependent:
    """Rows of one table that point at an SAE, directly or through others."""

    label: str
    count: int
    rows: list[Any]  # the newest few, where they have pages
    goes: bool  # with the SAE; else it stays and forgets which SAE it was


def dependents(sae: SAE) -> list[Dependent]:
    """Everything in the database that points to an SAE, one entry for each kind of row."""
    found = []
    for model, lookup, goes in _relations(SAE):
        rows = model._base_manager.filter(**{lookup: sae.pk})
        count = rows.count()
        if count:
            meta = model._meta
            shown = list(rows.order_by("-pk")[:SHOWN]) if hasattr(model, "get_absolute_url") else []
            words = str(meta.verbose_name if count == 1 else meta.verbose_name_plural)
            found.append(Dependent(words, count, shown, goes))
    return found


def users(sae: SAE) -> list[str]:
    """What is using the SAE at this moment, a sentence each: nobody should take it away under them."""
    jobs = live_jobs(sae)
    sentences = [f"{job.title} (job {job.pk}) is {'waiting' if job.state == 'queued' else 'running'}." for job in jobs]
    told = {job.pk for job in jobs}
    for row in _rows_being_made(sae):
        if row.job_id not in told:
            sentences.append(f"{type(row)._meta.verbose_name.capitalize()} {row.name} is {row.state}.")
    return sentences


def live_jobs(sae: SAE) -> list[Job]:
    """Jobs that work on this SAE itself."""
    kinds = [kind.name for kind in KINDS.values() if kind.subject == "sae"]
    return list(Job.objects.live().filter(kind__in=kinds, subject_id=sae.pk))


def live_jobs_of_rows(sae: SAE) -> list[Job]:
    """Jobs that make rows which need this SAE."""
    return [row.job for row in _rows_being_made(sae)]


def _rows_being_made(sae: SAE) -> Iterator[Any]:
    for model, lookup, _ in _relations(SAE):
        if issubclass(model, Made):
            busy = {lookup: sae.pk, "job__state__in": LIVE}
            yield from model.objects.filter(**busy, ready_at=None).select_related("job")


def _relations(model: type[Model], lookup: str = "", depth: int = 1) -> Iterator[tuple[Any, str, bool]]:
    """(model, lookup that leads to the SAE, whether its rows are deleted along) of everything that points at it."""
    for relation in model._meta.related_objects:
        field: Any = relation.field
        path = f"{field.name}__{lookup}" if lookup else field.name
        goes = relation.on_delete is CASCADE
        yield relation.related_model, path, goes
        if goes and depth < DEEPEST:
            yield from _relations(relation.related_model, path, depth + 1)
