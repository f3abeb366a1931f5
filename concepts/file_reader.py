"""Reads files that name features, as a stream of entries, each refused by its own row and reason.

Any of them may be gzipped. Nothing is read whole but JSON that is not one record a line, and that up to MOST_JSON bytes.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import IO, Any

from concepts.interchange import (
    CSV_HEADER,
    LONGEST_BY,
    LONGEST_METHOD,
    MOST_BYTES,
    MOST_JSON,
    MOST_ROWS,
    Entry,
    Facts,
    FileRefused,
    Refused,
    RowRefused,
    clean_name,
    clean_text,
    feature,
    number_or_none,
    share_or_none,
    shown,
)
from saehub.spreadsheets import as_written

LONGEST_LINE = 2**20
LONGEST_CELL = 2**17


def read(file: IO[bytes], facts: Facts) -> tuple[str, Iterator[Entry | Refused]]:
    """Format (a key of FORMATS) and what its rows say, in order. Raises FileRefused, also while it is iterated."""
    lines = Lines(file)
    start = lines.first.lstrip("\ufeff \t\r\n")
    if not start:
        raise FileRefused("The file is empty.")
    if start[0] not in "{[":
        return "csv", _rows(_csv(lines), facts, _of_csv)
    first = _record(start)
    if isinstance(first, dict) and not _is_mi_crow(first):
        form = "neuronpedia" if "description" in first and "index" in first else "jsonl"
        return form, _rows(_json_lines(lines), facts, _of_neuronpedia if form == "neuronpedia" else _of_ours)
    return _whole(lines, facts)


def _record(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _is_mi_crow(content: dict[str, Any]) -> bool:
    return isinstance(content.get("concepts"), dict) or all(
        isinstance(value, dict | list) for value in content.values()
    )


class Lines:
    """Lines of a file that may be gzipped, with what is not UTF-8 kept as surrogates.

    A line longer than LONGEST_LINE comes in pieces of that length. `number` counts the lines that are over.
    """

    def __init__(self, file: IO[bytes]) -> None:
        start = file.read(2)
        if start in (b"\xff\xfe", b"\xfe\xff"):
            raise FileRefused("The file is UTF-16 text, as Excel calls Unicode; save it as UTF-8.")
        packed = start == b"\x1f\x8b"
        file.seek(0)
        plain: Any = gzip.GzipFile(fileobj=file) if packed else file
        limited = io.BufferedReader(_Counted(plain))
        self._text = io.TextIOWrapper(limited, encoding="utf-8", errors="surrogateescape", newline="")
        self.number = 0
        self._next = self._line()
        while self._next and not self._next.strip("\ufeff \t\r\n"):
            self.number += 1
            self._next = self._line()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if not self._next:
            raise StopIteration
        line, self._next = self._next, self._line()
        self.number += line.endswith("\n")
        return line

    @property
    def first(self) -> str:
        """The line that comes next."""
        return self._next

    def rest(self) -> str:
        """Everything from the next line on. Raises FileRefused above MOST_JSON."""
        text = self._next + self._guarded(lambda: self._text.read(MOST_JSON + 1))
        if len(text) > MOST_JSON:
            raise FileRefused(f"JSON that is not one record a line may have {MOST_JSON // 2**20} MB; this has more.")
        return text

    def _line(self) -> str:
        return self._guarded(lambda: self._text.readline(LONGEST_LINE))

    @staticmethod
    def _guarded(read: Callable[[], str]) -> str:
        try:
            return read()
        except (OSError, EOFError, zlib.error) as error:
            raise FileRefused(f"The file is not whole gzip ({error}).") from error


class _Counted(io.RawIOBase):
    """Stops a file that unpacks to more than MOST_BYTES."""

    def __init__(self, file: Any) -> None:
        self._file, self._left = file, MOST_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._file.read(len(buffer))
        self._left -= len(block)
        if self._left < 0:
            raise FileRefused(f"The file holds more than {MOST_BYTES // 2**20} MB; split it.")
        buffer[: len(block)] = block
        return len(block)


# ---------------------------------------------------------------------------------------------------- rows of each format


def _rows(
    rows: Iterator[tuple[int, Any]], facts: Facts, reader: Callable[[Any, int, Facts], Entry]
) -> Iterator[Entry | Refused]:
    """Each row read, or refused; a second row for the same name of the same feature is refused too."""
    seen: dict[tuple[int, str, str, str], int] = {}
    for count, (number, row) in enumerate(rows):
        if count >= MOST_ROWS:
            raise FileRefused(f"The file has more than {MOST_ROWS:,} rows; split it.")
        try:
            if isinstance(row, RowRefused):
                raise row
            entry = reader(row, number, facts)
            key = (entry.feature, entry.name, entry.by, entry.method)
            if key in seen:
                raise RowRefused(f"It names feature {entry.feature} as row {seen[key]} does.")
            seen[key] = number
            yield entry
        except RowRefused as refusal:
            yield Refused(number, str(refusal))


def _csv(lines: Lines) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(LONGEST_CELL)  # one limit for the process, which readers of corpora set higher
    before, reader = lines.number, csv.reader(lines)
    try:
        header = [cell.strip().lstrip("\ufeff").lower() for cell in next(reader)]
    except csv.Error as error:
        raise FileRefused(f"The first line is not CSV ({error}).") from error
    if header != CSV_HEADER:
        told = shown(",".join(header)) or "empty"
        raise FileRefused(f"The first line of a CSV must be {','.join(CSV_HEADER)}; here it is {told}.")
    while True:
        number = before + reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, RowRefused(f"It cannot be read as CSV ({error}).")
            continue
        if row:
            yield number, row


def _of_csv(row: list[str], number: int, facts: Facts) -> Entry:
    if len(row) != len(CSV_HEADER):
        raise RowRefused(f"It has {len(row)} column{'s' * (len(row) > 1)}, not {len(CSV_HEADER)}.")
    name = as_written(row[1])
    return Entry(number, feature(row[0], facts.n_features), clean_name(name), number_or_none(row[2], "score"))


def _json_lines(lines: Lines) -> Iterator[tuple[int, Any]]:
    for line in lines:
        number = lines.number + (not line.endswith("\n"))
        if len(line) == LONGEST_LINE:
            while not line.endswith("\n") and lines.first:
                line = next(lines)
            yield number, RowRefused(f"The line is longer than a record may be, {LONGEST_LINE:,} characters.")
        elif line.strip():
            record = _record(line.lstrip("\ufeff"))
            yield number, record if isinstance(record, dict) else RowRefused("The line is not a JSON object.")


def _of_ours(row: Any, number: int, facts: Facts) -> Entry:
    sign = row.get("sign")
    if isinstance(sign, bool) or sign not in (None, 1, -1):
        raise RowRefused("The sign must be 1 or -1.")
    weight = number_or_none(row.get("weight"), "weight")
    if weight is not None and weight < 0:
        raise RowRefused("The weight is negative; give a weight from 0 and the sign -1.")
    return Entry(
        number,
        feature(row.get("feature"), facts.n_features),
        clean_name(row.get("name")),
        number_or_none(row.get("score"), "score"),
        weight,
        None if sign is None else int(sign),
        None if row.get("description") is None else clean_text(row["description"], "description"),
        clean_name(row["by"], LONGEST_BY) if row.get("by") else "",
        clean_name(row["method"], LONGEST_METHOD) if row.get("method") else "",
        share_or_none(row.get("confidence"), "confidence"),
        clean_text(row["notes"], "notes") if row.get("notes") else "",
    )


def _of_neuronpedia(row: Any, number: int, facts: Facts) -> Entry:
    if not isinstance(row, dict):
        raise RowRefused("It is not an explanation.")
    place = f"{row.get('modelId')}/{row.get('layer')}"
    told = row.get("modelId") and row.get("layer")
    if told and facts.neuronpedia_id and place != facts.neuronpedia_id:
        raise RowRefused(f"It explains a feature of {shown(place)}, and this SAE is {facts.neuronpedia_id}.")
    return Entry(
        number,
        feature(row.get("index"), facts.n_features),
        clean_name(row.get("description")),
        _score(row),
        by=clean_name(row["explanationModelName"], LONGEST_BY) if row.get("explanationModelName") else "",
        method=clean_name(row["typeName"], LONGEST_METHOD) if row.get("typeName") else "",
    )


def _score(row: dict[str, Any]) -> float | None:
    """The best of its scores; None where it has none."""
    scores = row.get("scores")
    if not isinstance(scores, list):
        return None
    found = [number_or_none(score.get("value"), "score") for score in scores if isinstance(score, dict)]
    return max((score for score in found if score is not None), default=None)


# ------------------------------------------------------------------------------------------------------ JSON read whole


def _whole(lines: Lines, facts: Facts) -> tuple[str, Iterator[Entry | Refused]]:
    text = lines.rest()
    broken = re.search("[\udc80-\udcff]", text)
    if broken:
        raise FileRefused(
            f"The file is not UTF-8 text: line {text.count(chr(10), 0, broken.start()) + 1} has a broken byte."
        )
    try:
        content = json.loads(text.lstrip("\ufeff"), object_pairs_hook=_once)
    except RecursionError:
        raise FileRefused("The JSON is nested too deeply to be a dictionary of concepts.") from None
    except ValueError as error:
        raise FileRefused(f"The file is not JSON: {error}.") from error
    if isinstance(content, list):
        return "neuronpedia", _rows(enumerate(content, 1), facts, _of_neuronpedia)
    concepts = content.get("concepts", content)
    if not isinstance(concepts, dict) or not all(isinstance(value, dict | list) for value in concepts.values()):
        raise FileRefused(
            'The JSON must map features to concepts, such as {"5": {"name": "family", "score": 0.9}}, or list explanations.'
        )
    size = content.get("n_size") if concepts is not content else None
    if size is not None and size != facts.n_features:
        raise FileRefused(f"The dictionary is for an SAE of {shown(size)} features; this one has {facts.n_features:,}.")
    return "mi_crow", _rows(enumerate(_flat(concepts), 1), facts, _of_mi_crow)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f'the key "{shown(twice)}" is there twice in one object')
    return found


def _flat(concepts: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for index, value in concepts.items():
        for one in value if isinstance(value, list) else [value]:
            yield index, one


def _of_mi_crow(row: tuple[str, Any], number: int, facts: Facts) -> Entry:
    index, concept = row
    if not isinstance(concept, dict):
        raise RowRefused(f"What it says of feature {shown(index)} is not a concept with name and score.")
    score = number_or_none(concept.get("score"), "score")
    return Entry(number, feature(index, facts.n_features), clean_name(concept.get("name")), score)
