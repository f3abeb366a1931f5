"""The two texts of a generation side by side, with what differs marked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby
from typing import Any

from inference.models import Generation

ALIGNED_TOKENS = 1000  # longer texts are compared position by position: aligning takes the square of their length


@dataclass(frozen=True)
class Side:
    """One text: runs of it that are on the other side too, or not, and its figures (None while it is written)."""

    name: str
    runs: list[tuple[str, bool]]  # text, differs
    n_tokens: int
    made: dict[str, Any] | None

    @property
    def perplexity(self) -> float | None:
        """exp(-mean log p) of the tokens under the model without edits."""
        mean = (self.made or {}).get("mean_plain_logprob")
        return None if mean is None else math.exp(min(-mean, 700))


def sides(row: Generation) -> list[Side]:
    """Baseline and steered, as far as they are written."""
    baseline, steered = (_tokens(stored) for stored in (row.baseline, row.steered))
    finished = "seconds" in row.baseline and "seconds" in row.steered
    mine, other = differing(baseline[0], steered[0])
    if not finished:  # the rest of the baseline is not missing on the other side, only not written yet
        mine = [False] * len(mine)
    return [
        _side("Baseline", row.baseline, baseline[1], mine),
        _side("Steered", row.steered, steered[1], other),
    ]


def _tokens(stored: dict[str, Any]) -> tuple[list[int], list[str]]:
    return stored.get("ids", []), stored.get("pieces", [])


def _side(name: str, stored: dict[str, Any], pieces: list[str], marks: list[bool]) -> Side:
    marked = zip(pieces, marks, strict=True)
    runs = [("".join(piece for piece, _ in run), differs) for differs, run in groupby(marked, key=lambda pair: pair[1])]
    return Side(name, runs, len(pieces), stored if "seconds" in stored else None)


def differing(a: Sequence[int], b: Sequence[int]) -> tuple[list[bool], list[bool]]:
    """For each token of two texts: is it absent from the other, when the two are aligned?"""
    if max(len(a), len(b)) > ALIGNED_TOKENS:
        return _by_position(a, b), _by_position(b, a)
    in_a, in_b = [True] * len(a), [True] * len(b)
    for i, j, n in SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks():
        in_a[i : i + n] = [False] * n
        in_b[j : j + n] = [False] * n
    return in_a, in_b


def _by_position(a: Sequence[int], b: Sequence[int]) -> list[bool]:
    return [i >= len(b) or b[i] != token for i, token in enumerate(a)]
