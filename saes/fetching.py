"""From places on the Hub to rows, and from rows to downloads: what the pages, the basket and the API all do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from django.db import IntegrityError, transaction

from saehub.accounts.access import allowed
from saes.gemma_scope import parse
from saes.models import SAE
from saes.naming import named


@dataclass
class Fetched:
    """What became of the rows somebody asked to download."""

    started: list[SAE] = field(default_factory=list)
    here: list[SAE] = field(default_factory=list)
    busy: list[SAE] = field(default_factory=list)
    refused: list[SAE] = field(default_factory=list)  # somebody else's, or nowhere on the Hub

    def sentence(self) -> str:
        parts = (
            (self.started, "queued for download"),
            (self.busy, "on its way already" if len(self.busy) == 1 else "on their way already"),
            (self.here, "here already"),
            (self.refused, "left alone: of somebody else, or not on the Hub"),
        )
        said = [f"{len(rows)} {words}" for rows, words in parts if rows]
        return (", ".join(said) or "Nothing was chosen") + "."


def row_at(user: Any, repo_id: str, path: str, *, revision: str = "", format: str = "") -> SAE:
    """The row of a place on the Hub; made, with what its name says, where the registry has none yet.

    Of Gemma Scope a file of an SAE means its folder, as the catalogue has it.
    """
    scope = parse(repo_id, path)
    if scope is not None:
        path, format = scope.path, format or scope.format
    said = named(format, repo_id, path) if format else None
    values: dict[str, Any] = {
        "source": SAE.Source.HUB,
        "name": (f"{repo_id}:{path}" if path else repo_id)[:200],
        "owner": user,
        "revision": revision,
        "format": format,
    }
    if said is not None:
        values |= {
            "site": said.site, "layer": said.layer, "hook_name": said.hook_name, "hook_name_out": said.hook_name_out,
            "architecture": said.architecture, "d_sae": said.d_sae, "k": said.k, "model_name": said.model_name,
            "published_l0": said.l0,
        }  # fmt: skip
    try:
        with transaction.atomic():
            row, made = SAE.objects.get_or_create(repo_id=repo_id, repo_path=path, defaults=values)
    except IntegrityError:  # somebody made it in this moment
        row, made = SAE.objects.get(repo_id=repo_id, repo_path=path), False
    if not made and revision and revision != row.revision and not row.ready and not row.busy:
        row.revision = revision
        row.save(update_fields=["revision"])
    return row


def fetch(user: Any, rows: Iterable[SAE]) -> Fetched:
    """Queue the download of every row that is not here, not on its way, and may be downloaded by this user."""
    found = Fetched()
    for row in rows:
        if row.ready:
            found.here.append(row)
        elif row.busy:
            found.busy.append(row)
        elif not row.repo_id or not allowed(user, "saes.add_sae", row):
            found.refused.append(row)
        elif _started(user, row):
            found.started.append(row)
        else:
            found.busy.append(row)
    return found


def _started(user: Any, row: SAE) -> bool:
    """Whether this call queued it: of two at once, one waits for the other's lock and then finds it busy."""
    with transaction.atomic():
        locked = SAE.objects.select_for_update(of=("self",)).select_related("job").get(pk=row.pk)
        if locked.ready or locked.busy:
            return False
        row.job = locked.start(user)
    return True
