"""Documents of files: text, JSON Lines, CSV and Parquet, read as a stream. Without torch."""

import csv
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from training.numerics.documents import CorpusError, Document, Kinds, field_of

MAX_DOCUMENT_CHARS = 1_000_000  # a longer text is read in pieces of this size, so memory stays bounded
MAX_ROW_CHARS = 64 * MAX_DOCUMENT_CHARS  # a longer line of a table is refused: it is no table of documents

Row = tuple[Any, str]  # what the field holds, and where: file and row, for sentences


def read_documents(path: str | Path, *, text_field: str | None = None) -> Iterator[Document]:
    """Documents of a file, or of every file of a folder in name order, read as a stream: texts or conversations.

    .jsonl / .ndjson: one document a line, a string, a list of messages, or an object's `text_field`.
    .csv / .tsv (with a header) and .parquet: one document a row, from the column `text_field`.
    Anything else is plain UTF-8 text: documents are separated by form feeds or by two or more blank lines, so an
    ordinary file with paragraphs is one document. Without `text_field` it is "text", "messages" or "conversations", else
    the only column; "a.b" is the field b of the objects in a.

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
    if suffix == ".json":
        raise CorpusError(f"{file.name} is a JSON document; save it as JSON Lines (.jsonl), one document a line.")
    return {
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
        if isinstance(row, dict):
            names = list(row) if field is None or field in row else list(_paths(row))
            row = inside(row, field_of(file.name, names, field, f"line {number}"))
        yield row, f"{file.name} line {number}"


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
    column = field_of(name, _columns(table.schema_arrow), field, "its columns")
    number = 0
    for batch in table.iter_batches(batch_size=512, columns=[column]):
        top = batch.schema.names[0]
        for value in batch.column(0).to_pylist():
            number += 1
            yield inside({top: value}, column), f"{name} row {number}"


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
