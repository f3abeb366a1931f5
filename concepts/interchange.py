"""Files that name features: what a row of them says, the formats, and the checks of its values.

Formats, told apart by their content when read (concepts.file_reader; concepts.file_writer writes them):
  csv             header neuron_idx,concept_name,score                                       (mi_crow)
  mi_crow         {"n_size": n, "concepts": {"5": {"name", "score"}}}, or that map alone, or lists of such for a feature
  neuronpedia     explanations as a list, or one a line: index, description, explanationModelName, typeName, scores
  jsonl           ours, one a line: feature, name, and what is known of score, weight, sign, description, by, method,
                  confidence, notes
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Any

MOST_BYTES = 256 * 2**20  # of a file, unpacked
MOST_JSON = 32 * 2**20  # of a JSON file that is read whole
MOST_ROWS = 1_000_000
LONGEST_NAME, LONGEST_BY, LONGEST_METHOD = 500, 80, 40  # together they fit an index row, whatever the letters
LONGEST_TEXT = 5000
CSV_HEADER = ["neuron_idx", "concept_name", "score"]
FORMATS = {
    "csv": "CSV of mi_crow",
    "mi_crow": "concepts.json of mi_crow",
    "mi_crow_lists": "concepts.json of mi_crow, lists",
    "neuronpedia": "explanations of Neuronpedia",
    "jsonl": "JSON lines of SAEHub",
}
SUFFIXES = {"csv": "csv", "mi_crow": "json", "mi_crow_lists": "json", "neuronpedia": "jsonl", "jsonl": "jsonl"}
_UNSEEN = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
_DIGITS = re.compile(r"-?[0-9]{1,12}")


class FileRefused(ValueError):
    """Nothing of the file can be read; the message is one sentence."""


class RowRefused(ValueError):
    """One row cannot be used; the message is one sentence."""


@dataclass(frozen=True)
class Entry:
    """A name of a feature as a file says it. None is "not said"."""

    row: int
    feature: int
    name: str
    score: float | None = None
    weight: float | None = None
    sign: int | None = None
    description: str | None = None
    by: str = ""  # who or which model wrote it
    method: str = ""  # how
    confidence: float | None = None  # 0 to 1, as its author puts it
    notes: str = ""


@dataclass(frozen=True)
class Refused:
    row: int
    reason: str


@dataclass(frozen=True)
class Facts:
    """What the file is checked against."""

    n_features: int
    neuronpedia_id: str = ""  # "model/source"


# ---------------------------------------------------------------------------------------------------------------- values


def shown(value: Any, n: int = 60) -> str:
    """A value as a sentence may quote it: short, and without letters that cannot be shown."""
    text = " ".join(_UNSEEN.sub("\N{REPLACEMENT CHARACTER}", str(value)[: n + 1]).split())
    return text if len(text) <= n else f"{text[: n - 1]}…"


def feature(value: Any, n_features: int) -> int:
    """A feature's number, as one or as its digits. Raises RowRefused when the SAE has no such feature."""
    if value is None or value == "":
        raise RowRefused("It does not say which feature.")
    text = str(value).strip()
    if isinstance(value, bool) or not isinstance(value, int | str) or not _DIGITS.fullmatch(text):
        raise RowRefused(f'"{shown(value, 20)}" is not the number of a feature.')
    if not 0 <= int(text) < n_features:
        raise RowRefused(f"There is no feature {text}; this SAE has features 0 to {n_features - 1:,}.")
    return int(text)


def number_or_none(value: Any, what: str) -> float | None:
    """A finite number, None where there is none. Raises RowRefused."""
    if value is None or value == "":
        return None
    try:
        if isinstance(value, bool) or len(str(value)) > 40:
            raise ValueError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise RowRefused(f'The {what} "{shown(value, 20)}" is not a number.') from None
    if not abs(number) < 1e300:  # NaN compares false
        raise RowRefused(f"The {what} is {shown(value, 20)}; it must be a finite number.")
    return number


def share_or_none(value: Any, what: str) -> float | None:
    """A number from 0 to 1, None where there is none. Raises RowRefused."""
    number = number_or_none(value, what)
    if number is not None and not 0 <= number <= 1:
        raise RowRefused(f"The {what} is {shown(value, 20)}; it must lie between 0 and 1.")
    return number


def clean_name(value: Any, longest: int = LONGEST_NAME) -> str:
    """A name on one line, its spaces single and its letters composed. Raises RowRefused."""
    if not isinstance(value, str) or not value.strip():
        raise RowRefused("It has no name.")
    text = _readable(value, "name", longest)
    return " ".join(unicodedata.normalize("NFC", text).split())


def clean_text(value: Any, what: str) -> str:
    """Text of several lines. Raises RowRefused."""
    if not isinstance(value, str):
        raise RowRefused(f"The {what} is not text.")
    return unicodedata.normalize("NFC", _readable(value, what, LONGEST_TEXT)).replace("\r\n", "\n").strip()


def _readable(value: str, what: str, longest: int) -> str:
    if len(value) > longest:
        raise RowRefused(f"The {what} has {len(value):,} characters; at most {longest:,} are kept.")
    odd = _UNSEEN.search(value)
    if odd is None:
        return value
    if "\udc80" <= odd[0] <= "\udcff":
        raise RowRefused(f"The {what} is not UTF-8 text: it has the byte {ord(odd[0]) - 0xDC00:#04x}.")
    raise RowRefused(f"The {what} holds the character U+{ord(odd[0]):04X}, which cannot be shown.")
