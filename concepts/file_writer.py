"""Writes files that name features, in the formats of concepts.interchange, and says what each cannot hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from concepts.interchange import CSV_HEADER, Entry, Facts
from saehub.spreadsheets import csv_lines, neutralised


def write(form: str, entries: Iterable[Entry], facts: Facts) -> Iterator[str]:
    """The file as pieces of text. What a format cannot hold is left out; `losses` says what that is."""
    return _WRITERS[form](entries, facts)


@dataclass(frozen=True)
class Held:
    """How many rows say what some formats cannot."""

    weights: int = 0  # other than 1
    signs: int = 0  # negative
    descriptions: int = 0
    unscored: int = 0
    signed: int = 0  # say who wrote them or how
    told: int = 0  # have a confidence or notes
    second: int = 0  # are not the first of their feature


def losses(form: str, held: Held) -> list[str]:
    """A sentence for each thing that would be lost."""
    found = []
    if form != "jsonl":
        for what, n in (("Weights", held.weights), ("Signs", held.signs), ("Descriptions", held.descriptions)):
            if n:
                found.append(f"{what} are left out: {_rows_of(n)} would lose theirs.")
        if held.told:
            found.append(f"Confidence and notes are left out: {_rows_of(held.told)} would lose theirs.")
    if form in ("csv", "mi_crow", "mi_crow_lists"):
        if held.unscored:
            found.append(f"mi_crow needs a score: 1 is written for the {_rows_of(held.unscored)} without one.")
        if held.signed:
            found.append(f"Who wrote a name, and how, is left out: {_rows_of(held.signed)} would lose it.")
    if form == "mi_crow" and held.second:
        found.append(f"It holds one name a feature, the one with the largest score: {held.second:,} would be left out.")
    return found


def _rows_of(n: int) -> str:
    return f"{n:,} row{'s' * (n > 1)}"


def _write_csv(entries: Iterable[Entry], facts: Facts) -> Iterator[str]:
    rows = ((entry.feature, neutralised(entry.name), _said_score(entry)) for entry in entries)
    return csv_lines(CSV_HEADER, rows)


def _said_score(entry: Entry) -> float:
    return 1.0 if entry.score is None else entry.score


def _write_mi_crow(entries: Iterable[Entry], facts: Facts) -> Iterator[str]:
    best: dict[int, Entry] = {}
    for entry in entries:
        held = best.get(entry.feature)
        if held is None or _said_score(entry) > _said_score(held):
            best[entry.feature] = entry
    yield _mi_crow_file({i: _mi_crow_concept(best[i]) for i in sorted(best)}, facts)


def _write_lists(entries: Iterable[Entry], facts: Facts) -> Iterator[str]:
    """mi_crow's reader takes the first or the best of a list, so the best comes first."""
    lists: dict[int, list[dict[str, Any]]] = {}
    for entry in sorted(entries, key=lambda entry: (entry.feature, -_said_score(entry))):
        lists.setdefault(entry.feature, []).append(_mi_crow_concept(entry))
    yield _mi_crow_file(lists, facts)


def _mi_crow_concept(entry: Entry) -> dict[str, Any]:
    return {"name": entry.name, "score": _said_score(entry)}


def _mi_crow_file(concepts: dict[int, Any], facts: Facts) -> str:
    return json.dumps({"n_size": facts.n_features, "concepts": concepts}, ensure_ascii=False, indent=2)


def _write_neuronpedia(entries: Iterable[Entry], facts: Facts) -> Iterator[str]:
    model, _, source = facts.neuronpedia_id.partition("/")
    for entry in entries:
        record = {
            "modelId": model,
            "layer": source,
            "index": str(entry.feature),
            "description": entry.name,
            "explanationModelName": entry.by,
            "typeName": entry.method,
            "scores": [] if entry.score is None else [{"value": entry.score}],
        }
        yield json.dumps(record, ensure_ascii=False) + "\n"


def _write_ours(entries: Iterable[Entry], facts: Facts) -> Iterator[str]:
    for entry in entries:
        told = {"feature": entry.feature, "name": entry.name, "score": entry.score, "weight": entry.weight}
        told |= {"sign": entry.sign, "description": entry.description, "by": entry.by, "method": entry.method}
        told |= {"confidence": entry.confidence, "notes": entry.notes}
        kept = {key: value for key, value in told.items() if value not in (None, "")}
        yield json.dumps(kept, ensure_ascii=False) + "\n"


_WRITERS: dict[str, Callable[[Iterable[Entry], Facts], Iterator[str]]] = {
    "csv": _write_csv,
    "mi_crow": _write_mi_crow,
    "mi_crow_lists": _write_lists,
    "neuronpedia": _write_neuronpedia,
    "jsonl": _write_ours,
}
