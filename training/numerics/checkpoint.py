"""A training run's checkpoint: one safetensors file, replaced as a whole, with the run's facts as JSON in its header.

One file cannot be half old and half new: a process killed at any moment leaves the previous checkpoint or the next one.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from saehub.causes import disk_is_full
from training.numerics.claim import Claim, Taken
from training.numerics.shards import write_tensors

FILE = "checkpoint.safetensors"


class TrainingError(ValueError):
    """Training cannot start or go on; the message is one sentence. A checkpoint already written stays usable."""


def claim(folder: Path) -> Claim:
    """The right to write a folder's checkpoint. Raises TrainingError where somebody else has it."""
    try:
        return Claim(folder.parent / f".{folder.name}.lock")
    except Taken:
        raise TrainingError(f"Another run is writing to {folder}; wait for its end, or choose a new folder.") from None


def save_checkpoint(folder: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Replace the folder's checkpoint. Raises TrainingError, keeping the old one, for weights that are not finite and
    for a full disk."""
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise TrainingError(f"{broken[0]} became NaN or infinite at step {facts['step']}; lower the learning rate.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_tensors(folder / FILE, stored, {"facts": json.dumps(facts)})
    except OSError as error:
        reason = "the disk is full" if disk_is_full(error) else str(error.strerror)
        raise TrainingError(
            f"The checkpoint of step {facts['step']} could not be written ({reason}); free space and resume: the one "
            "before it is kept."
        ) from error


def load_checkpoint(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """(tensors, facts) of a folder's checkpoint, or None when it has none. Raises TrainingError for a damaged file."""
    file = Path(folder) / FILE
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as handle:
            facts = json.loads((handle.metadata() or {})["facts"])
            return {name: handle.get_tensor(name) for name in handle.keys()}, facts  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise TrainingError(f"The checkpoint {file} is damaged ({error}); remove it to start again.") from error
