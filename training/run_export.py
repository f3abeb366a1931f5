"""A run's curve in the form of other tools: TensorBoard's event files, an offline run of Weights & Biases.

Both tools are optional: their packages are imported here, when somebody asks, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from training.models import Run, RunPoint
from training.run_document import of_run


class ExportError(Exception):
    """Why a curve cannot be written, in one sentence."""


def scalars(point: RunPoint) -> dict[str, float]:
    """Every number of a point by name, those of a group as `group/name`."""
    found: dict[str, float] = {"tokens": float(point.tokens)}
    for name, value in point.values.items():
        group = value if isinstance(value, dict) else {"": value}
        for part, number in group.items():
            if isinstance(number, int | float) and not isinstance(number, bool):
                found[f"{name}/{part}" if part else name] = float(number)
    return found


def to_tensorboard(run: Run, folder: Path) -> None:
    """Write the curve under folder/run-<number>, for `tensorboard --logdir folder`. Raises ExportError."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ExportError("The package tensorboard is not installed here: pip install tensorboard.") from error
    with SummaryWriter(str(folder / f"run-{run.pk}")) as writer:
        for point in run.points.all():
            for name, value in scalars(point).items():
                writer.add_scalar(name, value, point.step)


def to_wandb(run: Run, folder: Path) -> None:
    """Write an offline run under folder/wandb, for `wandb sync`; nothing is sent from here. Raises ExportError."""
    try:
        import wandb
    except ImportError as error:
        raise ExportError("The package wandb is not installed here: pip install wandb.") from error
    folder.mkdir(parents=True, exist_ok=True)
    settings: Any = {
        "mode": "offline",
        "dir": str(folder),
        "project": "saehub",
        "name": run.name,
        "id": f"run-{run.pk}",
    }
    with wandb.init(config=of_run(run), **settings) as writer:
        for point in run.points.all():
            writer.log(scalars(point), step=point.step)


WRITERS: dict[str, Callable[[Run, Path], None]] = {"tensorboard": to_tensorboard, "wandb": to_wandb}
