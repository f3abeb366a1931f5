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


NAMES = {  # as SAELens logs the same quantities, so that its dashboards and other runs' curves fit
    "tokens": "details/n_training_samples",
    "loss": "losses/overall_loss",
    "l0": "metrics/l0",
    "explained_variance": "metrics/explained_variance",
    "held_out_explained_variance": "metrics/held_out_explained_variance",
    "held_out_explained_variance_per_dimension": "metrics/held_out_explained_variance_per_dimension",
    "held_out_cosine": "metrics/held_out_cosine",
    "dead": "sparsity/dead_features",
    "lr": "details/current_learning_rate",
    "tokens_per_second": "details/tokens_per_second",
    "seconds": "details/seconds",
    "memory": "details/memory_bytes",
}


def scalars(point: RunPoint) -> dict[str, float]:
    """Every number of a point under its name there; parts of the loss as `losses/<part>`."""
    numbers = {"tokens": point.tokens} | {name: value for name, value in point.values.items() if name != "parts"}
    found = {NAMES.get(name, f"details/{name}"): value for name, value in numbers.items()}
    found |= {f"losses/{part}": value for part, value in point.values.get("parts", {}).items()}
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}


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
