"""What an import would do to a dictionary or to the labels of an SAE, and doing it.

The preview and the import itself are the same plan, made anew each time from the file and from what is there now, so that
nothing applied is older than what was looked at by more than the plan says. A long file is looked at by a job, and the
preview says when that was.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from django.db import transaction
from django.db.models import Count, Q
from django.utils import timezone

from concepts import file_reader, file_writer, interchange
from concepts.file_writer import Held
from concepts.interchange import Entry, Refused
from concepts.models import ConceptDictionary, ConceptFeature, ConceptImport, ConceptState, Label, facts_of
from saes.models import SAE

SHOWN = 50  # rows of each sort that a preview lists
LOOK_AT_ONCE = 2 * 2**20  # bytes that a page looks through itself, a twentieth of it when gzipped; more are a job
APPLY_AT_ONCE = 5000  # rows that a page applies itself; more are a job
REPORT_EVERY = 10_000  # rows
ROWS_AT_ONCE = 5000
TOLD = ("score", "confidence", "notes")  # what a file may change of a label


@dataclass(frozen=True)
class Difference:
    """A row that adds something, or changes what is there."""

    entry: Entry
    words: str = ""  # what changes, "score 0.5 → 0.9"


@dataclass
class Plan:
    """What the rows of a file come to. Of each sort the first SHOWN are kept to be looked at, and all are counted."""

    form: str = ""
    added: list[Difference] = field(default_factory=list)
    changed: list[Difference] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("added", "changed", "unchanged", "refused"), 0)
    )

    @property
    def effective(self) -> int:
        """Rows that would do something."""
        return self.counts["added"] + self.counts["changed"]

    def count(self, sort: str, row: Any = None) -> None:
        self.counts[sort] += 1
        if row is not None and self.counts[sort] <= SHOWN:
            getattr(self, sort).append(row)


@dataclass
class DictionaryPlan(Plan):
    states: dict[str, ConceptState] = field(default_factory=dict)  # of concepts that something happens to


@dataclass
class LabelPlan(Plan):
    new: list[Entry] = field(default_factory=list)
    told: list[tuple[int, dict[str, Any], dict[str, Any]]] = field(
        default_factory=list
    )  # label: what it had, what it gets


def plan(row: ConceptImport, report: Callable[[int], None] | None = None) -> Plan:
    """What applying it would do now; `report` hears how many rows are read. Raises interchange.FileRefused."""
    with row.file.open("rb") as file:
        form, entries = file_reader.read(file, row.facts)
        if report is not None:
            entries = _reported(entries, report)
        if row.dictionary is not None:
            return plan_dictionary(row.dictionary, form, entries)
        return plan_labels(row.sae, form, entries)


def _reported(entries: Iterator[Entry | Refused], report: Callable[[int], None]) -> Iterator[Entry | Refused]:
    for count, entry in enumerate(entries):
        if count % REPORT_EVERY == 0:
            report(count)
        yield entry


def is_long(row: ConceptImport) -> bool:
    """Whether looking through the file would hold up a page, and with it everybody's."""
    with row.file.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return row.size_bytes > (LOOK_AT_ONCE // 20 if packed else LOOK_AT_ONCE)


def look(row: ConceptImport, report: Callable[[int], None]) -> dict[str, Any]:
    """The work of the job that looks at a long file: its plan is kept as the page shows it, or why it cannot be read."""
    try:
        found = plan(row, report)
        seen: dict[str, Any] = {"form": found.form, "counts": found.counts}
        seen |= {sort: [asdict(one) for one in getattr(found, sort)] for sort in ("added", "changed", "refused")}
    except interchange.FileRefused as refusal:
        seen = {"fault": str(refusal)}
    ConceptImport.objects.filter(pk=row.pk).update(look=seen | {"at": timezone.now().isoformat()})
    return seen


def preview(row: ConceptImport) -> Plan:
    """What a page shows of it: the plan as it is now, or what a job found in a long file. Raises interchange.FileRefused."""
    if not row.by_job:
        return plan(row)
    if row.look is None:
        raise interchange.FileRefused("It was not looked at to its end; send it again.")
    if "fault" in row.look:
        raise interchange.FileRefused(row.look["fault"])
    seen = row.look
    found = Plan(seen["form"], refused=[Refused(**one) for one in seen["refused"]], counts=seen["counts"])
    for sort in ("added", "changed"):
        getattr(found, sort).extend(Difference(Entry(**one["entry"]), one["words"]) for one in seen[sort])
    return found


def begin(row: ConceptImport, user: Any) -> dict[str, int] | None:
    """Apply it now and return the counts, or queue the job that does where it is much work, and return None.

    Raises interchange.FileRefused, and FileNotFoundError where the file is gone.
    """
    if is_long(row) or plan(row).effective > APPLY_AT_ONCE:
        row.start(user)
        return None
    return apply(row, user)


def apply(row: ConceptImport, user: Any) -> dict[str, int]:
    """Do what `plan` says, all of it or nothing; returns the counts. Raises interchange.FileRefused."""
    with transaction.atomic():
        SAE.objects.select_for_update(no_key=True).get(
            pk=row.sae_id
        )  # the plan must still be true when it is carried out
        found = plan(row)
        if isinstance(found, DictionaryPlan):
            assert row.dictionary is not None
            row.dictionary.change(found.states, user, f"Import of {row.name}")
        elif isinstance(found, LabelPlan):
            _write_labels(row, found, user)
        row.finish(counts=found.counts, form=found.form, replaced=row.replaced, look=None)
    row.file.unlink(missing_ok=True)
    return found.counts


# ------------------------------------------------------------------------------------------------------ to a dictionary


def plan_dictionary(dictionary: ConceptDictionary, form: str, entries: Iterable[Entry | Refused]) -> DictionaryPlan:
    """Each row puts its feature into the concept of its name. What the file does not say stays as it is, and what it does
    not name is left alone."""
    found = DictionaryPlan(form)
    held = dictionary.states()
    members: dict[str, dict[int, list[Any]]] = {}
    texts: dict[str, str] = {}
    touched: set[str] = set()
    for entry in entries:
        if isinstance(entry, Refused):
            found.count("refused", entry)
            continue
        name = entry.name
        if name not in members:
            state = held.get(name) or {"description": "", "members": []}
            members[name], texts[name] = {m[0]: m for m in state["members"]}, state["description"]
        was, text = members[name].get(entry.feature), texts[name]
        told = text if entry.description is None else entry.description
        now = _member(entry, was)
        if was == now and told == text:
            found.count("unchanged")
            continue
        members[name][entry.feature], texts[name] = now, told
        touched.add(name)
        found.count("added" if was is None else "changed", Difference(entry, _difference(was, now, told != text)))
    found.states = {
        name: {"description": texts[name], "members": [members[name][i] for i in sorted(members[name])]}
        for name in touched
    }
    return found


def _member(entry: Entry, was: list[Any] | None) -> list[Any]:
    _, weight, sign, score = was or [entry.feature, 1.0, 1, None]
    return [
        entry.feature,
        weight if entry.weight is None else entry.weight,
        sign if entry.sign is None else entry.sign,
        score if entry.score is None else entry.score,
    ]


def _difference(was: list[Any] | None, now: list[Any], text: bool) -> str:
    parts = []
    if was is not None:
        named = zip(("weight", "sign", "score"), was[1:], now[1:], strict=True)
        parts = [f"{what} {_said(a)} → {_said(b)}" for what, a, b in named if a != b]
    return ", ".join(parts + ["description"] * text) if was is not None else ""


def _said(value: float | None) -> str:
    return "not said" if value is None else f"{value:g}"


def entries_of(dictionary: ConceptDictionary) -> list[Entry]:
    """What the dictionary holds, a row for every feature of every concept, as files say it."""
    rows = [
        Entry(0, feature, name, score, weight, sign, state["description"])
        for name, state in dictionary.states().items()
        for feature, weight, sign, score in state["members"]
    ]
    return sorted(rows, key=lambda row: (row.feature, row.name))


# ----------------------------------------------------------------------------------------------------------- to labels


def plan_labels(sae: SAE, form: str, entries: Iterable[Entry | Refused]) -> LabelPlan:
    """Each row is a label of its feature. A person's label is never changed by a file."""
    found = LabelPlan(form)
    held = {
        (label.feature, label.text, label.by, label.method): label
        for label in Label.objects.filter(sae=sae)
        .only("feature", "text", "by", "method", "source", *TOLD)
        .iterator(10_000)
    }
    for entry in entries:
        if isinstance(entry, Refused):
            found.count("refused", entry)
            continue
        there = held.get((entry.feature, entry.name, entry.by, entry.method))
        if there is None:
            found.new.append(entry)
            found.count("added", Difference(entry))
            continue
        had = {name: getattr(there, name) for name in TOLD}
        gets = {name: value for name in TOLD if (value := getattr(entry, name)) not in (None, "", had[name])}
        if there.source == Label.Source.PERSON or not gets:
            found.count("unchanged")
        else:
            found.told.append((there.pk, had, had | gets))
            found.count("changed", Difference(entry, ", ".join(_told(name, had[name], gets[name]) for name in gets)))
    return found


def _told(name: str, was: Any, now: Any) -> str:
    return "notes" if name == "notes" else f"{name} {_said(was)} → {_said(now)}"


def _write_labels(row: ConceptImport, found: LabelPlan, user: Any) -> None:
    taken = set(Label.objects.filter(sae=row.sae, accepted=True).values_list("feature", flat=True))
    accepted = {id(entry) for entry in _best(found.new, taken)} if row.accept else set()
    for start in range(0, len(found.new), ROWS_AT_ONCE):  # bulk_create would hold all of its objects
        Label.objects.bulk_create(
            Label(
                sae=row.sae, feature=entry.feature, text=entry.name, owner=user, by=entry.by, method=entry.method,
                source=Label.Source.MODEL if entry.by else Label.Source.IMPORT, score=entry.score,
                confidence=entry.confidence, notes=entry.notes, accepted=id(entry) in accepted, imported=row,
            )
            for entry in found.new[start : start + ROWS_AT_ONCE]
        )  # fmt: skip
    _tell((pk, now) for pk, _, now in found.told)
    row.replaced = [[pk, had] for pk, had, _ in found.told]


def _tell(told: Iterable[tuple[int, dict[str, Any]]]) -> None:
    """Score, confidence and notes of labels."""
    rows = [Label(pk=pk, **values) for pk, values in told]
    Label.objects.bulk_update(rows, TOLD, batch_size=2000)


def _best(entries: Iterable[Entry], taken: set[int]) -> Iterator[Entry]:
    """Of each feature that has no accepted label, the entry with the largest score, the first of equal ones."""
    best: dict[int, Entry] = {}
    for entry in entries:
        held = best.get(entry.feature)
        if entry.feature not in taken and (held is None or (entry.score or 0) > (held.score or 0)):
            best[entry.feature] = entry
    yield from best.values()


@transaction.atomic
def undo_labels(row: ConceptImport) -> int:
    """Take back what an import of labels did: labels it added go, what it changed returns. Returns how many went."""
    gone, _ = row.labels.all().delete()
    _tell(row.replaced)
    row.delete()
    return gone


def labels_of(sae: SAE) -> list[Entry]:
    """Every label of the SAE as files say it, the accepted one of a feature first."""
    rows = Label.objects.filter(sae=sae).order_by("feature", "-accepted", "-pk")
    columns = rows.values_list("feature", "text", "score", "by", "method", "confidence", "notes")
    return [
        Entry(0, i, text, score, by=by, method=method, confidence=confidence, notes=notes)
        for i, text, score, by, method, confidence, notes in columns.iterator(10_000)
    ]


# ------------------------------------------------------------------------------------------------------------- the file


@transaction.atomic
def keep(file: Any, user: Any, sae: SAE, dictionary: ConceptDictionary | None, accept: bool = True) -> ConceptImport:
    """Keep what was sent until it is applied or thrown away. One waits a person and target: a new file takes its place."""
    waiting = ConceptImport.objects.filter(owner=user, sae=sae, dictionary=dictionary, ready_at=None)
    for older in waiting.filter(Q(job=None) | Q(job__kind=ConceptImport.LOOK)).select_related("job"):
        if older.job is not None and older.looking:
            older.job.cancel()
        older.delete()
    name = interchange.shown(Path(str(file.name)).name, 120)
    row = ConceptImport.objects.create(
        name=name, owner=user, sae=sae, dictionary=dictionary, accept=accept, size_bytes=file.size
    )
    try:
        row.sha256 = _store(row, file)
    except BaseException:  # a full disk; the row goes with the transaction
        shutil.rmtree(row.folder, ignore_errors=True)
        raise
    row.save(update_fields=["sha256"])
    return row


def _store(row: ConceptImport, file: Any) -> str:
    """Write what was sent into the row's folder; its SHA-256."""
    row.folder.mkdir(parents=True, exist_ok=True)
    partial, digest = row.folder / "partial", hashlib.sha256()
    with partial.open("wb") as out:
        for chunk in file.chunks():
            digest.update(chunk)
            out.write(chunk)
    os.rename(partial, row.file)
    return digest.hexdigest()


def discard(row: ConceptImport) -> None:
    """Throw away what was sent, its file at once: where the row was made in the transaction that is open and this is
    undone with it, nothing else would remove it."""
    folder = row.folder
    row.delete()
    shutil.rmtree(folder, ignore_errors=True)


def export(form: str, what: ConceptDictionary | SAE) -> Iterator[str]:
    """A dictionary, or the labels of an SAE, as a file of one of interchange.FORMATS."""
    if isinstance(what, ConceptDictionary):
        return file_writer.write(form, entries_of(what), facts_of(what.sae))
    return file_writer.write(form, labels_of(what), facts_of(what))


def losses(what: ConceptDictionary | SAE) -> list[tuple[str, str, list[str]]]:
    """Each format with its words and what it would leave out of this; counted in the database."""
    held = _held(what) if isinstance(what, ConceptDictionary) else _held_by_labels(what)
    return [(form, words, file_writer.losses(form, held)) for form, words in interchange.FORMATS.items()]


def _held(dictionary: ConceptDictionary) -> Held:
    counts = ConceptFeature.objects.filter(concept__dictionary=dictionary).aggregate(
        weights=Count("pk", filter=~Q(weight=1)),
        signs=Count("pk", filter=Q(sign__lt=0)),
        descriptions=Count("pk", filter=~Q(concept__description="")),
        unscored=Count("pk", filter=Q(score=None)),
        second=Count("pk") - Count("feature", distinct=True),
    )
    return Held(**counts)


def _held_by_labels(sae: SAE) -> Held:
    counts = Label.objects.filter(sae=sae).aggregate(
        unscored=Count("pk", filter=Q(score=None)),
        signed=Count("pk", filter=~Q(by="", method="")),
        told=Count("pk", filter=~Q(confidence=None, notes="")),
        second=Count("pk") - Count("feature", distinct=True),
    )
    return Held(**counts)
