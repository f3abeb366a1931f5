"""A sweep as its page shows it: the curve of strength against what came of it, and every text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from inference.models import Sweep
from inference.records import record
from inference.sides import perplexity
from saehub.charts import Chart, curves

EFFECT = "mean code of the edited features when the plain model reads the new tokens"


@dataclass(frozen=True)
class Shown:
    """One strength; `error` where the model broke."""

    factor: float
    text: str
    n_tokens: int
    perplexity: float | None
    repetition: float | None
    zlib_ratio: float | None
    effect: float | None
    error: str


def shown_points(row: Sweep) -> list[Shown]:
    return [
        Shown(
            point["factor"], point["text"], len(point["ids"]), perplexity(point["mean_plain_logprob"]),
            point["repetition"], point["zlib_ratio"], point["effect"], point["error"],
        )
        for point in row.points
    ]  # fmt: skip


def charts_of(row: Sweep) -> list[Chart]:
    """Effect, perplexity and repetition against strength; none before there are two points."""
    points = shown_points(row)
    if len(points) < 2:
        return []
    x = [100 * point.factor for point in points]
    n = f"{len(points)} texts of up to {row.generation.max_new_tokens} tokens"

    def chart(title: str, name: str, log_y: bool = False) -> Chart:
        values = [getattr(point, name) for point in points]
        return curves(x, {title: values}, title=title, x_title="strength, % of the edits", n=n, log_y=log_y)

    return [
        chart("Effect on the features", "effect"),
        chart("Perplexity under the plain model", "perplexity", log_y=True),
        chart("Repetition", "repetition"),
    ]


def sweep_record(row: Sweep) -> dict[str, Any]:
    """Everything that was asked for and came out, in JSON types."""
    asked = record(row.generation)
    outcome = ("baseline", "steered", "prompted", "seconds", "state", "versions")
    return {
        "sweep": row.pk,
        "made": row.created_at.isoformat(),
        "by": row.owner.get_username() if row.owner else None,
        "generation": {name: value for name, value in asked.items() if name not in outcome},
        "effect": EFFECT,
        "factors": row.factors,
        "points": row.points,
        "versions": row.versions,
        "seconds": row.seconds,
    }
