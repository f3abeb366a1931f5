"""What people write into addresses and fields, read without a surprise."""

from __future__ import annotations

LONGEST = 12  # digits: more than any row, feature or token has, and little enough for the database and for int()


def whole_number(text: object) -> int | None:
    """The number of a row, feature or token as it was typed; None for what is none."""
    digits = str(text).strip()
    return int(digits) if digits.isdecimal() and len(digits) <= LONGEST else None


def row_number(text: object) -> int:
    """The same of a row, and 0, which no row has, for what is none."""
    return whole_number(text) or 0
