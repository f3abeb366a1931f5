"""A job that only counts: shows that a queue's workers take, report, cancel and finish work."""

from __future__ import annotations

import time
from typing import Any

from saehub.jobs.progress import JobError, Progress

MAX_STEPS = 3000


def probe(progress: Progress, steps: int, seconds: float = 0.1) -> dict[str, Any]:
    """Count to `steps`, waiting `seconds` at each."""
    if not 1 <= steps <= MAX_STEPS:
        raise JobError(
            f"A probe counts between 1 and {MAX_STEPS} steps, not {steps}.", "Choose another number of steps."
        )
    progress.start("counting", total=steps)
    for step in range(1, steps + 1):
        time.sleep(seconds)
        progress(step, steps)
    return {"steps": steps}
