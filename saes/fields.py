"""Form fields that both `saes` and `training` use."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from django import forms
from django.core.exceptions import ValidationError
from django.db import transaction


def server_path(text: str, roots: Iterable[Path]) -> Path:
    """The file or folder `text` names, resolved; it must exist and lie under one of `roots`, links followed.

    Where it lies is asked first, so that nobody learns what exists elsewhere on the server. Raises ValidationError.
    """
    allowed = [root.resolve() for root in roots]
    if "\0" in text or not text.startswith("/"):
        raise ValidationError("Give the whole path on the server, beginning with /.")
    path = _followed(text)
    if not any(path.is_relative_to(root) for root in allowed):
        listed = ", ".join(str(root) for root in allowed)
        raise ValidationError(
            f"Pages may read only under {listed}; put it there, or ask an admin to add its folder to "
            "SAEHUB_IMPORT_DIRS."
        )
    if not os.access(path, os.F_OK):
        raise ValidationError(f"There is nothing at {path} on the server.")
    return path


def _followed(text: str) -> Path:
    try:
        return Path(text).resolve()
    except (OSError, RuntimeError):  # links that lead in a circle
        raise ValidationError("There is nothing at this path on the server: its links lead in a circle.") from None


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files under a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


class NewRow(forms.ModelForm):
    """A form that makes a row and starts the job which fills it.

    Names are unique, but a row of one's own that never became ready gives way to a new one of the same name: it holds
    nothing, and somebody who mistyped an address wants to try again under the name they chose.
    """

    user: Any
    replaced: Any = None
    advanced: list[str] = []
    # field -> (another field, the value or values of it with which this one is asked for)
    only_with: dict[str, tuple[str, str | tuple[str, ...]]] = {}

    def __init__(self, *args: Any, user: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.user = user
        self.fields["name"].required = False
        self.fields["name"].help_text = "Made up from the rest when left empty"

    def full_clean(self) -> None:
        """Fields that the present choices do not ask for may be empty."""
        unasked = [self.fields[name] for name in self.only_with if not self.asks_for(name)]
        spared = [field for field in unasked if field.required]
        for field in spared:
            field.required = False
        super().full_clean()
        for field in spared:
            field.required = True

    def asks_for(self, name: str) -> bool:
        """Whether the present choices ask for this field."""
        of, values = self.only_with.get(name, ("", ()))
        return not of or self.data.get(of) in ((values,) if isinstance(values, str) else values)

    @property
    def advanced_errors(self) -> bool:
        """Whether the fold has to be open."""
        return any(name in self.errors for name in self.advanced)

    def validate_unique(self) -> None:
        """Left to `check_name`, which knows when an old row may go."""

    def check_name(self, default: Callable[[], str]) -> None:
        """Fill in and check the name, once the other fields are clean."""
        table = self._meta.model
        unique = table._meta.get_field("name").unique
        name = self.cleaned_data.get("name") or (default()[:110] if unique else unused_name(table, default()[:110]))
        self.cleaned_data["name"] = self.instance.name = name
        old = table.objects.select_related("job").filter(name=name).first() if unique else None
        if old is None:
            return
        if old.ready or old.busy or old.owner_id != self.user.pk:
            self.add_error("name", f"There is already one named {name}; choose another name.")
        self.replaced = old

    def make(self) -> Any:
        """The new row, saved, with its job queued."""
        with transaction.atomic():
            if self.replaced is not None:
                self.replaced.delete()
            self.instance.owner = self.user
            row = self.save()
            _clear(row)
            try:
                self.store(row)
                row.start(self.user)
            except BaseException:
                _clear(row)
                raise
        return row

    def store(self, row: Any) -> None:
        """Write what belongs into the row's folder, before its job may run. Nothing for most."""


def _clear(row: Any) -> None:
    """Remove what stands where a new row's files belong: of a row that a restored database does not know any more, or
    of this one, when it could not be begun.

    But not what the row itself points at: somebody may have put a model exactly there.
    """
    given = Path(getattr(row, "location", "") or "nowhere").resolve()
    for folder in row.own_files():
        if folder.resolve() not in (given, *given.parents):
            shutil.rmtree(folder, ignore_errors=True)


def unused_name(table: Any, name: str) -> str:
    """The name, with a number behind it when it is in use."""
    number, found = 1, name
    while table.objects.filter(name=found).exists():
        number += 1
        found = f"{name} {number}"
    return found
