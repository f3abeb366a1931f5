"""What a run's page shows of its points: curves, and the newest figures with what they mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from training.models import Run, RunPoint


@dataclass(frozen=True)
class Curve:
    key: str  # of RunPoint.values
    label: str
    meaning: str


CURVES = (
    Curve("loss", "loss", "Loss of the last batch, before its update"),
    Curve("held_out_explained_variance", "explained variance", "1 − E|x − x̂|² / (E|x|² − |E x|²)"),
)


def curves(points: Sequence[RunPoint]) -> list[str]:
    return []


def now(run: Run, points: Sequence[RunPoint]) -> list[Any]:
    return []
