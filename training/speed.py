"""How fast a run will train: the measured steps of runs made here, carried over to another size.

A run's points hold the tokens a second since the point before. The first point is left out (kernels are compiled and
memory is touched for the first time there), and a run counts when the rest lasted long enough. Its rate is the median, so
that neither a busy minute nor a pause moves it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from django.db.models import Count, Exists, OuterRef

from training.models import Capture, Run, RunPoint

FEWEST_STRETCHES = 4
FEWEST_SECONDS = 2.0
CANDIDATES = 100  # newest runs that are considered
UPDATE_ROWS = 800  # an update of all weights costs as much as so many more rows of the batch (docs/benchmarks.md: TopK)
RELATIVE_COST = {  # of a token, at equal size, by the table of docs/benchmarks.md; transcoders are not in it
    "topk": 1.0, "batchtopk": 1.17, "jumprelu": 1.66, "standard": 1.77, "gated": 2.77,
}  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """What the points of a run say: the median of its stretches, had it trained alone."""

    run: Run
    tokens_per_second: float
    stretches: int
    seconds: float


@dataclass(frozen=True)
class Speed:
    """What a run will reach, and what that rests on. other: the measured one is of another architecture."""

    tokens_per_second: float
    measured: Measured
    other: bool


class Speeds:
    """Of the runs made here that a run on `capture` can be compared with: on stored activations, or streamed from the
    same model, where the model's pass is most of the time."""

    def __init__(self, capture: Capture, processes: int = 1) -> None:
        self.capture, self.processes = capture, processes
        like: dict[str, object] = {"capture__stored": capture.stored}
        if not capture.stored:
            like["capture__model"] = capture.model_id
        rows = Run.objects.filter(Exists(RunPoint.objects.filter(run=OuterRef("pk"))), **like)
        rows = rows.select_related("capture__model").annotate(side_by_side=Count("sweep__runs"))
        self.runs = list(rows.order_by("-pk")[:CANDIDATES])
        self._measured: dict[int, Measured | None] = {}

    def of(self, architecture: str, width: int, d_sae: int, batch_size: int) -> Speed | None:
        """Rests on the newest run within a factor of two in cost, else on the nearest one; of the same architecture and
        number of processes where there is one. None where nothing comparable was measured."""
        cost = token_cost(width, d_sae, batch_size)

        def distance(run: Run) -> tuple[bool, bool, int, int]:
            apart = abs(math.log2(_cost(run) / cost))
            return run.architecture != architecture, run.processes != self.processes, int(apart), -run.pk

        comparable = [run for run in self.runs if _cost(run) and _ratio(architecture, run.architecture)]
        for run in sorted(comparable, key=distance):
            if found := self._measure(run):
                times = cost / _cost(run) * (_ratio(architecture, run.architecture) or 1) if self.capture.stored else 1
                return Speed(found.tokens_per_second / times, found, run.architecture != architecture)
        return None

    def _measure(self, run: Run) -> Measured | None:
        if run.pk not in self._measured:
            self._measured[run.pk] = measure(run)
        return self._measured[run.pk]


def measure(run: Run) -> Measured | None:
    """None for a run too short to tell. One of a sweep shared its time with the others: alone it would have been as many
    times as fast."""
    rows = list(run.points.values_list("tokens", "values__tokens_per_second"))
    pairs = [(after[0] - before[0], after[1]) for before, after in pairwise(rows) if after[1]]
    seconds = sum(tokens / rate for tokens, rate in pairs)
    if len(pairs) < FEWEST_STRETCHES or seconds < FEWEST_SECONDS:
        return None
    together = max(getattr(run, "side_by_side", 0), 1)
    return Measured(run, median(rate for _, rate in pairs) * together, len(pairs), seconds)


def token_cost(width: int, d_sae: int, batch_size: int) -> float:
    """Of a training token, in units of one multiplication for each weight."""
    return width * d_sae * (1 + UPDATE_ROWS / batch_size)


def _cost(run: Run) -> float:
    width = run.capture.d_in(run.hook_name) or 0
    return token_cost(width, run.config.get("d_sae") or 0, run.config.get("batch_size") or 2048)


def _ratio(wanted: str, measured: str) -> float | None:
    """How many times the cost of the one a token of the other is; None where nobody has compared them."""
    if wanted == measured:
        return 1.0
    if wanted not in RELATIVE_COST or measured not in RELATIVE_COST:
        return None
    return RELATIVE_COST[wanted] / RELATIVE_COST[measured]
