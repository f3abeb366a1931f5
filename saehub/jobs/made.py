"""What jobs make: rows with a name, an owner, the job that makes them, and perhaps a folder of files."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Self

from django.conf import settings
from django.db import DEFAULT_DB_ALIAS, models
from django.db.models.deletion import Collector
from django.db.transaction import on_commit
from django.utils import timezone

from saehub.jobs.models import Job, State, enqueue


class MadeQuerySet(models.QuerySet):
    def ready(self) -> Self:
        return self.filter(ready_at__isnull=False)


class Made(models.Model):
    """Abstract. A row is made first (queued), filled by its job, and is `ready` once that job has finished it."""

    KIND = ""  # job kind that makes it; its parameter of the same meaning is KINDS[KIND].subject
    FOLDER = ""  # folder of its files: <data>/<FOLDER>/<pk>

    name = models.CharField(max_length=120)
    owner = models.ForeignKey(
        settings.AUTH_USER_MODEL, null=True, blank=True, on_delete=models.SET_NULL, related_name="+"
    )
    created_at = models.DateTimeField(auto_now_add=True)
    ready_at = models.DateTimeField(null=True, blank=True, editable=False)
    job = models.ForeignKey(Job, null=True, blank=True, on_delete=models.SET_NULL, related_name="+", editable=False)

    objects: Any = MadeQuerySet.as_manager()

    class Meta:
        abstract = True

    def __str__(self) -> str:
        return self.name

    @property
    def ready(self) -> bool:
        return self.ready_at is not None

    @property
    def state(self) -> str:
        """`ready`, or how the job that makes it stands; `new` when none was queued yet."""
        if self.ready:
            return "ready"
        return self.job.state if self.job else "new"

    @property
    def busy(self) -> bool:
        return not self.ready and self.job is not None and self.job.state in (State.QUEUED, State.RUNNING)

    @property
    def folder(self) -> Path:
        return Path(settings.DATA_DIR) / self.FOLDER / str(self.pk)

    def start(self, user: Any, *, title: str = "") -> Job:
        """Queue the job that makes this row."""
        from saehub.jobs.kinds import KINDS

        kind = KINDS[self.KIND]
        self.job = enqueue(kind.name, user, title=title or f"{kind.title}: {self.name}", **{kind.subject: self.pk})
        self.save(update_fields=["job"])
        return self.job

    def finish(self, **fields: Any) -> None:
        """Write what the job found, and mark the row ready."""
        for name, value in (fields | {"ready_at": timezone.now()}).items():
            setattr(self, name, value)
        self.save(update_fields=[*fields, "ready_at"])

    def own_files(self) -> list[Path]:
        """Folders that go with this row."""
        return [self.folder] if self.FOLDER and self.pk else []

    def delete(self, *args: Any, **kwargs: Any) -> Any:
        """With its files and those of the rows that go with it.

        The rows go first, and their files once that is committed: files without a row are litter, a row without files is a
        broken page.
        """
        folders = [folder for row in self._going() for folder in row.own_files()]
        gone = super().delete(*args, **kwargs)
        on_commit(partial(_remove, folders))
        return gone

    def _going(self) -> list[Made]:
        """This row and the ones that the database deletes with it."""
        collector = Collector(using=self._state.db or DEFAULT_DB_ALIAS)
        collector.collect([self])
        groups: list[Any] = [*collector.data.values(), *collector.fast_deletes]
        return [row for rows in groups for row in rows if isinstance(row, Made)]


def _remove(folders: Iterable[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
