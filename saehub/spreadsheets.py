"""Cells of CSV files that people open in a spreadsheet, which would compute whatever looks like a formula."""

from __future__ import annotations

import re

_FORMULA = re.compile(r"'* *[=+\-@\t\r]")  # with the apostrophes that keep it from being one


def neutralised(text: str) -> str:
    """A cell that no spreadsheet computes: an apostrophe goes in front of what begins like a formula."""
    return f"'{text}" if _FORMULA.match(text) else text


def as_written(cell: str) -> str:
    """What was neutralised: `as_written(neutralised(text)) == text`."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell
