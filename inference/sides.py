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
        return perplexity((self.made or {}).get("mean_plain_logprob"))

    @property
    def effect(self) -> float | None:
        """Mean code of the edited features over the new tokens, read by the model without edits."""
        effects = (self.made or {}).get("effects")
        return sum(effects) / len(effects) if effects else None


def perplexity(mean_logprob: float | None) -> float | None:
    """exp(-mean log p); None for what is not known."""
    return None if mean_logprob is None else math.exp(min(-mean_logprob, 700))


def sides(row: Generation) -> list[Side]:
    """Baseline, steered, and the prompt-only text where one was asked for, as far as they are written.

    In the baseline is marked what the steered text has not, in the others what the baseline has not.
    """
    baseline, steered, prompted = (_tokens(stored) for stored in (row.baseline, row.steered, row.prompted))
    finished = "seconds" in row.baseline and "seconds" in row.steered
    mine, other = differing(baseline[0], steered[0])
    if not finished:  # the rest of the baseline is not missing on the other side, only not written yet
        mine = [False] * len(mine)
    found = [
        _side("Baseline", row.baseline, baseline[1], mine),
        _side("Steered", row.steered, steered[1], other),
    ]
    if row.instruction:
        found.append(_side("Prompt only", row.prompted, prompted[1], differing(baseline[0], prompted[0])[1]))
    return found


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
