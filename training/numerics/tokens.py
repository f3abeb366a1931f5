"""From files to contexts: read documents, tokenise them, cut them into pieces of equal length.

Packed (the default): documents are tokenised without special tokens, joined by the tokenizer's EOS, and cut into
contexts of `context_length` tokens, each beginning with BOS when the policy says so. There is no padding. A context may
hold the end of one document and the start of the next; attention is not masked between them (as in SAELens).

Padded: a context holds one document only, from its start; a longer document goes on in further contexts, each beginning
with BOS again. What is missing to `context_length` is padded at the end. Attention is causal, so padding at the end
changes nothing before it, and its activations are never stored.

With the chat template every document becomes the message of a user in the model's own chat format, before either.
"""

import csv
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saes.numerics.chat import ChatError, chat_text

MAX_DOCUMENT_CHARS = 1_000_000  # a longer text is read in pieces of this size, so memory stays bounded
MAX_ROW_CHARS = 64 * MAX_DOCUMENT_CHARS  # a longer line of a table is refused: it is no table of documents
MAX_CONTEXT_LENGTH = 131_072
_BATCH_CHARS = 200_000  # texts handed to the tokenizer at once


class CorpusError(ValueError):
    """The texts cannot be used as they are; the message is one sentence for the person who chose them."""


@dataclass(frozen=True)
class TokenPolicy:
    """Which tokens the model sees and which activations are kept.

    context_length: tokens in every context, BOS included.
    prepend_bos: every context starts with the tokenizer's BOS.
    store_special: keep the activations of BOS, EOS and other control tokens. Off by default: BOS is an attention sink
        whose norm is tens of times that of ordinary tokens and would dominate every squared error.
    packed: contexts are filled from the stream of documents; else each holds one document and is padded.
    chat_template: every document is put into the model's chat template first, as a user's message.
    """

    context_length: int = 128
    prepend_bos: bool = True
    store_special: bool = False
    packed: bool = True
    chat_template: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.context_length <= MAX_CONTEXT_LENGTH:
            raise CorpusError(
                f"The context length is {self.context_length}; choose a whole number from 2 to {MAX_CONTEXT_LENGTH:,}."
            )


@dataclass(frozen=True)
class Context:
    """One context: `ids` (context_length,) int32, the documents of its first and last text token, and how many of its
    tokens are not padding (None: all)."""

    ids: np.ndarray
    document: int
    last_document: int
    length: int | None = None


# ---------------------------------------------------------------------------------------------------- files


def read_texts(path: str | Path, *, text_field: str | None = None) -> Iterator[str]:
    """Documents of a file, or of every file of a folder in name order, read as a stream.

    .jsonl / .ndjson: one document a line, a string or an object's `text_field` ("text" unless given).
    .csv / .tsv (with a header) and .parquet: one document a row, from the column `text_field`.
    Anything else is plain UTF-8 text: documents are separated by form feeds or by two or more blank lines, so an
    ordinary file with paragraphs is one document. A table with a single column needs no `text_field`.

    A CSV file may be separated by semicolons or tabs where its header has no comma. Half of a surrogate pair, as JSON
    can hold one where a text was cut within an emoji, becomes U+FFFD: no tokenizer takes it.

    Raises CorpusError, naming the file and the row, for a file that is missing, not text, cut or without the field, and
    at the end when there was no text at all.
    """
    path = Path(path)
    if not path.exists():
        raise CorpusError(f"There is no file or folder {path}.")
    found = False
    for file in _files(path):
        for text in _reader(file)(file, text_field):
            for piece in _pieces(text):
                found = True
                yield piece
    if not found:
        raise CorpusError(f"{path.name} holds no text; choose a corpus with at least one document.")


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))


def _reader(file: Path) -> "Callable[[Path, str | None], Iterator[str]]":
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


def _pieces(text: str) -> Iterator[str]:
    for start in range(0, len(text), MAX_DOCUMENT_CHARS):
        piece = text[start : start + MAX_DOCUMENT_CHARS]
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


def _read_plain(file: Path, _field: str | None) -> Iterator[str]:
    lines: list[str] = []
    size = blank = 0
    for _, raw in _lines(file, MAX_DOCUMENT_CHARS):
        line = raw.replace("\r\n", "\n")
        head, *rest = line.split("\f")
        blank = blank + 1 if not head.strip() else 0
        if blank >= 2 or size + len(head) > MAX_DOCUMENT_CHARS:
            yield "".join(lines).strip("\n")
            lines, size = [], 0
        lines.append(head)
        size += len(head)
        for part in rest:
            yield "".join(lines).strip("\n")
            lines, size, blank = [part], len(part), 0
    yield "".join(lines).strip("\n")


def _read_jsonl(file: Path, field: str | None) -> Iterator[str]:
    for number, line in _rows(file):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CorpusError(f"{file.name} line {number} is not valid JSON ({error.msg}).") from error
        if isinstance(row, dict):
            row = row.get(_field_of(file, list(row), field, f"line {number}"))
        yield _text_of(row, file, f"line {number}")


def _read_csv(file: Path, field: str | None) -> Iterator[str]:
    csv.field_size_limit(MAX_ROW_CHARS)  # the default of 131,072 characters is less than one long document
    lines = (line for _, line in _rows(file))
    first = next(lines, "")
    # strict: a quote that is never closed would otherwise take in the rest of the file
    rows = csv.reader(itertools.chain([first], lines), delimiter=_delimiter(file, first), strict=True)
    try:
        header = next(rows, None)
        if header is None:
            return
        column = header.index(_field_of(file, header, field, "the header"))
        for row in rows:
            if row and column >= len(row):
                raise CorpusError(
                    f"{file.name} line {rows.line_num} has {len(row)} columns where the header has {len(header)}."
                )
            yield row[column] if row else ""
    except csv.Error as error:
        raise CorpusError(f"{file.name} line {rows.line_num} is not valid CSV ({error}).") from error


def _delimiter(file: Path, header: str) -> str:
    if file.suffix.lower() == ".tsv":
        return "\t"
    return next((mark for mark in ",;\t" if mark in header), ",")


def _read_parquet(file: Path, field: str | None) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            column = _field_of(file, table.schema_arrow.names, field, "its columns")
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=[column]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield _text_of(value, file, f"row {row}")
    except (pyarrow.ArrowException, OSError) as error:
        raise CorpusError(f"{file.name} is not a readable Parquet file; write it again or choose another.") from error


def _field_of(file: Path, names: list[str], field: str | None, where: str) -> str:
    wanted = field or ("text" if "text" in names or len(names) != 1 else names[0])
    if wanted in names:
        return wanted
    listed = ", ".join(names[:12]) or "none"
    raise CorpusError(
        f'{file.name}: no field "{wanted}" in {where} (there are: {listed}); name the field with the text.'
    )


def _text_of(value: Any, file: Path, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise CorpusError(f"{file.name} {where} holds a value of type {type(value).__name__}, not text.")
    try:
        value.encode()
    except UnicodeEncodeError:
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value


# ---------------------------------------------------------------------------------------------------- tokens


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of control tokens (BOS, EOS, padding, chat marks). An unknown-token id stands for real text and is not one,
    unless the tokenizer uses the same id for BOS or EOS."""
    ids = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    return frozenset(ids | ({tokenizer.bos_token_id, tokenizer.eos_token_id} - {None}))


def padding_id(tokenizer: Any) -> int:
    """The token with which short contexts are filled: the tokenizer's own, else EOS, BOS or token 0."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, 0)
    return int(next(token for token in known if token is not None))


def stored_mask(
    contexts: np.ndarray, policy: TokenPolicy, special: Iterable[int], lengths: np.ndarray | None = None
) -> np.ndarray:
    """True where the activation of a token is stored; same shape as `contexts` (c, t). `lengths` (c,) without padding."""
    real = np.ones(contexts.shape, dtype=bool)
    if lengths is not None:
        real &= np.arange(contexts.shape[1]) < lengths[:, None]
    return real if policy.store_special else real & ~np.isin(contexts, np.fromiter(special, dtype=np.int64))


def iter_documents(texts: Iterable[str], tokenizer: Any, policy: TokenPolicy | None = None) -> Iterator[np.ndarray]:
    """Token ids (m,) int32 of every text, in order, without added special tokens; a text may give an empty array.

    With a policy that asks for it, each text goes through the chat template; a BOS that the template begins with is left
    to `prepend_bos`. Raises CorpusError when the tokenizer has no such template.
    """
    if policy is not None and policy.chat_template:
        texts = _chats(texts, tokenizer, policy)
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARS:
            yield from _tokenise(batch, tokenizer)
            batch, size = [], 0
    if batch:
        yield from _tokenise(batch, tokenizer)


def _chats(texts: Iterable[str], tokenizer: Any, policy: TokenPolicy) -> Iterator[str]:
    if not tokenizer.chat_template:
        raise CorpusError("This model's tokenizer has no chat template; turn off the chat template.")
    for text in texts:
        try:
            chat = chat_text(tokenizer, [{"role": "user", "content": text}])
        except ChatError as error:
            raise CorpusError(str(error)) from error
        yield chat.removeprefix(tokenizer.bos_token or "") if policy.prepend_bos else chat


def _tokenise(batch: list[str], tokenizer: Any) -> Iterator[np.ndarray]:
    encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return (np.asarray(ids, dtype=np.int32) for ids in encoded)


def iter_contexts(texts: Iterable[str], tokenizer: Any, policy: TokenPolicy) -> Iterator[Context]:
    """Contexts of a stream of texts (see the module's text). When packing, the last partial context is dropped.

    A tokenizer without EOS joins documents with nothing between them. Raises CorpusError when BOS or a chat template is
    asked for and the tokenizer has none, and when the texts do not fill one context.
    """
    documents = iter_documents(texts, tokenizer, policy)
    return (_packed if policy.packed else _padded)(documents, tokenizer, policy)


def _packed(documents: Iterator[np.ndarray], tokenizer: Any, policy: TokenPolicy) -> Iterator[Context]:
    bos = _bos(tokenizer, policy)
    length = policy.context_length - len(bos)
    pending = np.empty(0, dtype=np.int32)
    pending_documents = np.empty(0, dtype=np.int32)
    n_tokens, made = 0, False
    for index, ids in enumerate(documents):
        if tokenizer.eos_token_id is not None and len(ids):
            ids = np.append(ids, np.int32(tokenizer.eos_token_id))
        n_tokens += len(ids)
        pending = np.concatenate([pending, ids])
        pending_documents = np.concatenate([pending_documents, np.full(len(ids), index, dtype=np.int32)])
        whole = len(pending) // length * length
        for start in range(0, whole, length):
            made = True
            ids = np.concatenate([bos, pending[start : start + length]])
            yield Context(ids, int(pending_documents[start]), int(pending_documents[start + length - 1]))
        pending, pending_documents = pending[whole:], pending_documents[whole:]
    if not made:
        raise CorpusError(
            f"The texts give {n_tokens:,} tokens, fewer than one context of {policy.context_length}; add text or "
            "choose a shorter context length."
        )


def _padded(documents: Iterator[np.ndarray], tokenizer: Any, policy: TokenPolicy) -> Iterator[Context]:
    bos, padding = _bos(tokenizer, policy), padding_id(tokenizer)
    made = False
    for index, document in enumerate(documents):
        step = policy.context_length - len(bos)
        for start in range(0, len(document), step):
            made = True
            real = np.concatenate([bos, document[start : start + step]])
            ids = np.full(policy.context_length, padding, dtype=np.int32)
            ids[: len(real)] = real
            yield Context(ids, index, index, len(real))
    if not made:
        raise CorpusError("The texts give no tokens; add text.")


def _bos(tokenizer: Any, policy: TokenPolicy) -> np.ndarray:
    if not policy.prepend_bos:
        return np.empty(0, dtype=np.int32)
    if tokenizer.bos_token_id is None:
        raise CorpusError("This model's tokenizer has no beginning-of-sequence token; turn off prepend_bos.")
    return np.array([tokenizer.bos_token_id], dtype=np.int32)
