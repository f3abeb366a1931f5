"""What a person sent, or a path of the server, becomes an SAE: unpack, find the SAE in it, adopt it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from django.core.exceptions import ValidationError
from django.db import transaction

from saehub.jobs.progress import JobError, Progress
from saes.adopt import Refused, adopt_files, second_name, wait_for
from saes.checksums import WEIGHTS
from saes.history import ADDITION, DELETION, note
from saes.layouts import entries
from saes.models import SAE
from saes.numerics.folders import FolderError
from saes.numerics.formats import FormatError, TwoFormats, UnknownFormat, detect_format
from saes.uploads import unpack

MOST_FOLDERS = 2_000
MOST_AT_ONCE = 200  # SAEs of one import
NAME = 200  # characters
MOST_SHOWN = 12
AGAIN = "Nothing was registered. Correct the files, then import them again."


def import_files(progress: Progress, row: SAE) -> dict[str, Any]:
    """Adopt what waits in the row's upload folder, or at the path of the server it names.

    What is refused for what it is goes at once, files and row: the job alone says that it was sent, and why it is not
    here. What a retry or an answer may still bring in is kept. Raises JobError or a ValueError with one sentence.
    """
    try:
        root = _root(progress, row)
        entry, others = find_entry(row, root), []
        if isinstance(entry, list):
            others = share(progress, row, root, entry)
            entry = entry[0]
        made = adopt_files(progress, row, entry, row.facts)
        return made | ({"others": [other.pk for other in others]} if others else {})
    except ValidationError as error:
        _forget(progress, row)
        raise JobError(" ".join(error.messages), AGAIN) from error
    except FolderError:  # a full disk is not the fault of what was sent
        raise
    except (ValueError, Refused) as error:
        _forget(progress, row)
        if str(error).startswith("files "):  # the folder that we put them in: a name its sender never gave
            error.args = (f"What was sent {str(error).removeprefix('files ')}", *error.args[1:])
        if not getattr(error, "hint", ""):
            error.hint = AGAIN  # type: ignore[union-attr]  # what the job's card reads
        raise


def _forget(progress: Progress, row: SAE) -> None:
    """Nothing is registered of what is refused, and what was sent goes; a path of the server stays as it is."""
    note(progress.job.owner, row, "Refused: nothing was registered", DELETION)
    row.delete()


def _root(progress: Progress, row: SAE) -> Path:
    if row.facts.get("server_path"):
        path = Path(row.facts["server_path"])
        if not path.exists():
            raise JobError(f"There is nothing at {path} any more.", "Put it back, then press Retry.")
        return path
    if not row.upload.exists():
        raise JobError("The files that were sent are not here any more.", "Import them again.")
    progress.start("Unpacking", unit="bytes")
    return unpack(row.upload, progress)


def find_entry(row: SAE, root: Path) -> Path | list[Path]:
    """The one SAE at `root` or below it, or all of them; of more than MOST_AT_ONCE the row waits for an answer which.

    Raises FormatError with what is wrong with the only thing that could be one, MissingFacts.
    """
    place = str(row.facts.get("entry") or "")
    if place:
        entry = (root / place).absolute()
        if ".." in Path(place).parts or not entry.is_relative_to(root.absolute()) or not entry.parent.is_dir():
            raise FormatError(f"There is no {place} in these files.")
        return entry
    if root.is_file():
        return root
    found, faults = _candidates(root)
    if len(found) > MOST_AT_ONCE:
        shown = ", ".join(str(path.relative_to(root)) for path in found[:MOST_SHOWN])
        wait_for(row, ["entry"], f"These files hold {len(found)} SAEs: {shown} and more. Say which one.", {})
    if not found:
        raise faults[-1]
    return found if len(found) > 1 else found[0]


def share(progress: Progress, row: SAE, root: Path, found: list[Path]) -> list[SAE]:
    """Of several SAEs the row becomes the first; each other one gets a row, an import and its own hold on the files.

    All of it or nothing, so that a second attempt finds one SAE for each row. Returns the new rows.
    """
    places = [str(path.relative_to(root)) for path in found]
    name = row.name
    made: list[SAE] = []
    try:
        with transaction.atomic():
            _becomes(row, name, places[0])
            row.save(update_fields=["name", "facts"])
            for place in places[1:]:
                other = SAE(owner=row.owner, source=row.source, format=row.format, facts=dict(row.facts))
                _becomes(other, name, place)
                other.save()
                made.append(other)
                if not row.facts.get("server_path"):
                    shutil.rmtree(other.upload, ignore_errors=True)
                    shutil.copytree(
                        root, other.upload / "files", copy_function=lambda a, b: second_name(Path(a), Path(b))
                    )
                other.start(progress.job.owner)
    except BaseException:
        for other in made:
            shutil.rmtree(other.upload, ignore_errors=True)
        raise
    progress.log(f"These files hold {len(found)} SAEs. This one is {places[0]}.")
    for other, place in zip(made, places[1:], strict=True):
        note(progress.job.owner, other, f"Imported with {row.name}", ADDITION)
        progress.log(f"{place} is imported as SAE {other.pk}, {other.name}")
    return made


def _becomes(row: SAE, name: str, place: str) -> None:
    """Call the row after its place, and say that it is the SAE there."""
    row.name = f"{name}/{place}" if len(name) + len(place) < NAME else f"{name[: NAME // 3]}/…{place[-NAME // 2 :]}"
    row.facts = {**row.facts, "entry": place}
    if row.facts.get("repo_path"):
        row.facts["repo_path"] = f"{row.facts['repo_path'].rstrip('/')}/{place}"


def _candidates(root: Path) -> tuple[list[Path], list[FormatError]]:
    """Folders and files that are SAEs, from the top down, and why the others are not, the likeliest last."""
    found: list[Path] = []
    faults: list[FormatError] = []
    waiting = [root]
    seen = 0
    while waiting and seen < MOST_FOLDERS:
        folder = waiting.pop(0)
        seen += 1
        children = sorted(child for child in folder.iterdir() if not child.name.startswith("."))
        below = [child for child in children if child.is_dir()]
        try:
            detect_format(folder)
            found.append(folder)
            continue
        except TwoFormats:
            raise
        except FormatError as error:
            fault = error
        files = _files(children)
        if files:
            found += files
            continue
        if any(child.is_file() for child in children) or not faults:
            faults.append(fault)
        if not isinstance(fault, UnknownFormat):
            continue
        waiting += below
    faults.sort(key=lambda fault: not isinstance(fault, UnknownFormat))
    return found or _by_names(root), faults


def _by_names(root: Path) -> list[Path]:
    """SAEs that are neither a folder nor a file of their own, such as one layer of several in the same folder."""
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    found = []
    for entry, _ in entries(names)[:MOST_FOLDERS]:
        try:
            detect_format(root / entry)
        except FormatError:
            continue
        found.append(root / entry)
    return found


def _files(children: list[Path]) -> list[Path]:
    """The weight files of a folder, where each of them is an SAE by itself; else none: never some of them."""
    weights = [child for child in children if child.is_file() and child.name.endswith(WEIGHTS)]
    try:
        for path in weights:
            detect_format(path)
    except FormatError:
        return []
    return weights
