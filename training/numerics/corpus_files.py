"""Documents of files: text, JSON, JSON Lines, CSV and Parquet, read as a stream. Without torch."""

import csv
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from training.numerics.documents import BESIDE, Beside, CorpusError, Document, Kinds, field_of

MAX_DOCUMENT_CHARS = 1_000_000  # a longer text is read in pieces of this size, so memory stays bounded
MAX_ROW_CHARS = 64 * MAX_DOCUMENT_CHARS  # a longer line of a table is refused: it is no table of documents

JSON_PIECE = 2**20  # characters of an array that are read at a time
JSON_TAIL = 16  # a word, number or escape that a piece's end cuts is not longer

Row = tuple[Any, str]  # what the field holds, and where: file and row, for sentences


def read_documents(path: str | Path, *, text_field: str | None = None) -> Iterator[Document]:
    """Documents of a file, or of every file of a folder in name order, read as a stream: texts or conversations.

    .jsonl / .ndjson: one document a line, a string, a list of messages, or an object's `text_field`.
    .json: an array of what lines of .jsonl hold, read item by item; also JSON Lines by that name.
    .csv / .tsv (with a header) and .parquet: one document a row, from the column `text_field`.
    Anything else is plain UTF-8 text: documents are separated by form feeds or by two or more blank lines, so an
    ordinary file with paragraphs is one document. Without `text_field` it is "text", "messages" or "conversations", else
    the only column; "a.b" is the field b of the objects in a. "system" and "tools" beside a field of messages
    belong to the conversation.

    A CSV file may be separated by semicolons or tabs where its header has no comma. Half of a surrogate pair, as JSON
    can hold one where a text was cut within an emoji, becomes U+FFFD: no tokenizer takes it.

    Raises CorpusError, naming the file and the row, for a file that is missing, not text, cut or without the field, for
    rows of both kinds, and at the end when there was no text at all.
    """
    path = Path(path)
    if not path.exists():
        raise CorpusError(f"There is no file or folder {path}.")
    found, kinds = False, Kinds()
    for file in _files(path):
        for value, where in _reader(file)(file, text_field):
            for piece in pieces(kinds.document(value, where)):
                found = True
                yield piece
    if not found:
        raise CorpusError(f"{path.name} holds no text; choose a corpus with at least one document.")


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))


def _reader(file: Path) -> Callable[[Path, str | None], Iterator[Row]]:
    suffix = file.suffix.lower()
    return {
        ".json": _read_json,
        ".jsonl": _read_jsonl,
        ".ndjson": _read_jsonl,
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".parquet": _read_parquet,
    }.get(suffix, _read_plain)


def pieces(document: Document) -> Iterator[Document]:
    """A long text in parts; nothing of an empty one."""
    if not isinstance(document, str):
        yield document
        return
    for start in range(0, len(document), MAX_DOCUMENT_CHARS):
        piece = document[start : start + MAX_DOCUMENT_CHARS]
        if piece.strip():
            yield piece


def _rows(file: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a table."""
    for number, line in _lines(file, MAX_ROW_CHARS):
        if len(line) == MAX_ROW_CHARS:
            raise CorpusError(f"{file.name} line {number} is longer than {MAX_ROW_CHARS:,} characters; split it.")
        yield number, line


def _lines(file: Path, longest: int) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file, a longer one in pieces; refuses bytes that are not text."""
    number = 0
    try:
        with file.open(encoding="utf-8-sig", newline="") as handle:
            while line := handle.readline(longest):
                number += 1
                if "\0" in line:
                    raise CorpusError(f"{file.name} is not a text file: line {number} holds a zero byte.")
                yield number, line
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{file.name} is not UTF-8 text (unreadable byte after line {number}); convert it to UTF-8 or choose a "
            "text, JSON Lines, CSV or Parquet file."
        ) from error
    except OSError as error:
        raise CorpusError(f"{file.name} cannot be read: {error.strerror}.") from error


def _read_plain(file: Path, _field: str | None) -> Iterator[Row]:
    lines: list[str] = []
    size = blank = 0
    for _, raw in _lines(file, MAX_DOCUMENT_CHARS):
        line = raw.replace("\r\n", "\n")
        head, *rest = line.split("\f")
        blank = blank + 1 if not head.strip() else 0
        if blank >= 2 or size + len(head) > MAX_DOCUMENT_CHARS:
            yield "".join(lines).strip("\n"), file.name
            lines, size = [], 0
        lines.append(head)
        size += len(head)
        for part in rest:
            yield "".join(lines).strip("\n"), file.name
            lines, size, blank = [part], len(part), 0
    yield "".join(lines).strip("\n"), file.name


def _read_jsonl(file: Path, field: str | None) -> Iterator[Row]:
    for number, line in _rows(file):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CorpusError(f"{file.name} line {number} is not valid JSON ({error.msg}).") from error
        yield _chosen(row, file, field, f"line {number}"), f"{file.name} line {number}"


def _chosen(row: Any, file: Path, field: str | None, where: str) -> Any:
    """What an object's field holds, with what belongs to it; a row that is no object as it is."""
    if not isinstance(row, dict):
        return row
    names = list(row) if field is None or field in row else list(_paths(row))
    chosen = field_of(file.name, names, field, where)
    return with_beside(inside(row, chosen), {name: inside(row, beside(chosen, name)) for name in BESIDE})


def with_beside(value: Any, columns: Mapping[str, Any]) -> Any:
    """Messages, with what their row's columns of BESIDE hold for them; any other value as it is."""
    there = {name: column for name, column in columns.items() if column}
    return Beside(value, **there) if there and isinstance(value, list) else value


def beside(field: str, name: str) -> str:
    """The field of that name in the object that holds `field`."""
    before, dot, _ = field.rpartition(".")
    return f"{before}{dot}{name}"


def _read_json(file: Path, field: str | None) -> Iterator[Row]:
    """The items of an array, one at a time; memory holds one of them and a piece of the file."""
    pieces = (piece for _, piece in _lines(file, JSON_PIECE))
    text = next((kept for piece in pieces if (kept := piece.lstrip())), "")
    if text.startswith("{"):
        yield from _json_lines(file, field, text)
        return
    if not text:
        return
    if not text.startswith("["):
        raise CorpusError(f"{file.name} is not a JSON array: it begins with {text[:1]!r}, not with [.")
    reader = _Items(file.name, itertools.chain([text], pieces))
    for number, item in enumerate(reader, start=1):
        yield _chosen(item, file, field, f"item {number}"), f"{file.name} item {number}"


def _json_lines(file: Path, field: str | None, start: str) -> Iterator[Row]:
    """A .json file that begins with an object: often it is JSON Lines."""
    try:
        json.loads(start.splitlines()[0] if len(start) < JSON_PIECE else "{}")
    except json.JSONDecodeError:
        raise CorpusError(
            f"{file.name} is one JSON object; save its documents as an array, or as JSON Lines (.jsonl), one a line."
        ) from None
    yield from _read_jsonl(file, field)


class _Items:
    """The items of a JSON array that comes in pieces."""

    def __init__(self, name: str, pieces: Iterator[str]) -> None:
        self.name, self.pieces = name, pieces
        self.text, self.at, self.number = "", 0, 0

    def __iter__(self) -> Iterator[Any]:
        self._expect("[")
        if self._next() == "]":
            self.at += 1
        else:
            while True:
                self.number += 1
                yield self._item()
                if self._next() == "]":
                    self.at += 1
                    break
                self._expect(",")
        if self._next():
            raise CorpusError(f"{self.name} goes on after the end of its array; save it as one array.")

    def _next(self) -> str:
        """The next character that is no space; "" at the end of the file."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def _more(self, least: int = 1) -> bool:
        """At least so many more characters, unless the file ends; what was read before is let go."""
        found, size = [self.text[self.at :]], 0
        while size < least and (piece := next(self.pieces, "")):
            found.append(piece)
            size += len(piece)
        self.text, self.at = "".join(found), 0
        return size > 0

    def _expect(self, mark: str) -> None:
        if self._next() != mark:
            found = self._next()
            said = f"{found!r} where {mark} or ] should stand" if found else "the file ends there: it was cut"
            raise CorpusError(f"{self.name} is not a valid JSON array after item {self.number} ({said}).")
        self.at += 1

    def _item(self) -> Any:
        if not self._next():
            self._expect("an item")
        while True:
            try:
                item, self.at = _DECODER.raw_decode(self.text, self.at)
                return item
            except json.JSONDecodeError as error:
                left = len(self.text) - self.at
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - JSON_TAIL
                if left > MAX_ROW_CHARS:
                    longest = f"{MAX_ROW_CHARS:,} characters"
                    raise CorpusError(f"{self.name} item {self.number} is longer than {longest}; split it.") from error
                if not cut or not self._more(left):  # as much again: an item is decoded anew a few times only
                    raise CorpusError(f"{self.name} item {self.number} is not valid JSON ({error.msg}).") from error
            except RecursionError:
                raise CorpusError(f"{self.name} item {self.number} is nested too deeply to be a document.") from None


_DECODER = json.JSONDecoder()


def _paths(row: Mapping[str, Any], before: str = "") -> Iterator[str]:
    """Names of an object's fields, those of objects in it as "a.b"."""
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from _paths(value, f"{before}{name}.")
        else:
            yield before + name


def inside(row: Mapping[str, Any], field: str) -> Any:
    """A field of an object, or of objects in it; None where one of them is null."""
    if field in row:
        return row[field]
    value: Any = row
    for name in field.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _read_csv(file: Path, field: str | None) -> Iterator[Row]:
    csv.field_size_limit(MAX_ROW_CHARS)  # the default of 131,072 characters is less than one long document
    lines = (line for _, line in _rows(file))
    first = next(lines, "")
    # strict: a quote that is never closed would otherwise take in the rest of the file
    rows = csv.reader(itertools.chain([first], lines), delimiter=_delimiter(file, first), strict=True)
    try:
        header = next(rows, None)
        if header is None:
            return
        column = header.index(field_of(file.name, header, field, "the header"))
        for row in rows:
            if row and column >= len(row):
                raise CorpusError(
                    f"{file.name} line {rows.line_num} has {len(row)} columns where the header has {len(header)}."
                )
            yield row[column] if row else "", f"{file.name} line {rows.line_num}"
    except csv.Error as error:
        raise CorpusError(f"{file.name} line {rows.line_num} is not valid CSV ({error}).") from error


def _delimiter(file: Path, header: str) -> str:
    if file.suffix.lower() == ".tsv":
        return "\t"
    return next((mark for mark in ",;\t" if mark in header), ",")


def _read_parquet(file: Path, field: str | None) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            yield from parquet_rows(table, file.name, field)
    except (pyarrow.ArrowException, OSError) as error:
        raise CorpusError(f"{file.name} is not a readable Parquet file; write it again or choose another.") from error


def parquet_rows(table: Any, name: str, field: str | None) -> Iterator[Row]:
    """What the column holds, row by row, of an open pyarrow.parquet.ParquetFile. Raises CorpusError without it."""
    import pyarrow

    names = _columns(table.schema_arrow)
    column = field_of(name, names, field, "its columns")
    kind = table.schema_arrow.field(column).type if column in table.schema_arrow.names else None
    texts = kind is not None and (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind))
    more = {} if texts else {word: found for word in BESIDE if (found := beside(column, word)) in names}
    number = 0
    for batch in table.iter_batches(batch_size=512, columns=[column, *more.values()]):
        for row in batch.to_pylist():
            number += 1
            columns = {word: inside(row, found) for word, found in more.items()}
            yield with_beside(inside(row, column), columns), f"{name} row {number}"


def _columns(schema: Any) -> list[str]:
    """Names of columns; of a column of objects those of its fields, as "a.b", too."""
    import pyarrow

    names: list[str] = []
    for field in schema:
        names.append(field.name)
        if pyarrow.types.is_struct(field.type):
            inner = _columns([field.type.field(i) for i in range(field.type.num_fields)])
            names += [f"{field.name}.{name}" for name in inner]
    return names
