"""CSV files that people open in a spreadsheet, which would compute whatever looks like a formula."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

_FORMULA = re.compile(r"'* *[=+\-@\t\r]")  # with the apostrophes that keep it from being one


def neutralised(text: str) -> str:
    """A cell that no spreadsheet computes: an apostrophe goes in front of what begins like a formula."""
    return f"'{text}" if _FORMULA.match(text) else text


def as_written(cell: str) -> str:
    """What was neutralised: `as_written(neutralised(text)) == text`."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


class _GivenBack:
    """What csv.writer writes to: a line is the answer of its `writerow`."""

    def write(self, line: str) -> str:
        return line


def csv_lines(head: Sequence[str], rows: Iterable[Iterable[Any]]) -> Iterator[str]:
    """The lines of a CSV file, each made when it is asked for; they end as RFC 4180 says."""
    return map(csv.writer(_GivenBack()).writerow, chain([head], rows))
