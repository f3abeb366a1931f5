"""What a training knows beside weights and Adam's moments, and how it is put into a checkpoint and taken out again."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saes.numerics.sae import SAE
from training.numerics.checkpoint import TrainingError, load_checkpoint, save_checkpoint
from training.numerics.optim import Optimizer
from training.numerics.train_config import TrainConfig

# what a checkpoint keeps as numbers
STATE = ("step", "tokens", "seconds", "scale", "variance", "first_error", "kept_error")


@dataclass(frozen=True)
class StepReport:
    """Where training stands after `step` steps. Loss, parts, l0 and explained_variance are of the last batch, before
    its update; what begins with held_out is of the held-out tensor, after it (None without one; see `live.look`).
    tokens_per_second is since the last report; memory: bytes of the process, or of the GPU's peak."""

    step: int
    tokens: int
    loss: float
    parts: dict[str, float]
    l0: float
    explained_variance: float
    held_out_explained_variance: float | None
    dead: int
    lr: float
    tokens_per_second: float
    seconds: float
    held_out_explained_variance_per_dimension: float | None = None
    held_out_cosine: float | None = None
    memory: int | None = None


@dataclass
class TrainState:
    """What training knows beside weights and Adam's moments.

    step and tokens (rows consumed); seconds spent; scale and variance: mean |x| / sqrt(d_in) and
    mean |x - mean(x)|^2 of the first batch, the units of the loss; first_error: its squared error; kept_error: the least
    of those at which a checkpoint was written (0: none yet); silent: (d_sae,) int64, tokens since each feature fired;
    history: the reports so far.
    """

    silent: Tensor
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    scale: float = 1.0
    variance: float = 1.0
    first_error: float = 0.0
    kept_error: float = 0.0
    history: list[StepReport] = field(default_factory=list)

    def count(self, fired: Tensor, n: int) -> None:
        """Account for a batch of n rows in which each feature fired so often."""
        self.step += 1
        self.tokens += n
        self.silent = torch.where(fired > 0, 0, self.silent + n)


def save(
    folder: Path, config: TrainConfig, state: TrainState, optimizer: Optimizer, seconds: float, units: dict[str, Tensor]
) -> None:
    """Write the checkpoint. units: of a transcoder (Units.tensors), else empty. Raises TrainingError as save_checkpoint."""
    tensors = {f"sae.{name}": tensor for name, tensor in optimizer.tensors.items()} | optimizer.state() | units
    tensors["silent"] = state.silent
    state.seconds = seconds
    facts = {name: getattr(state, name) for name in STATE}
    facts["history"] = [asdict(report) for report in state.history]
    save_checkpoint(folder, tensors, facts | _identity(optimizer.sae, config))


def resume(folder: Path | None, sae: SAE, config: TrainConfig) -> tuple[TrainState, dict[str, Tensor]]:
    """The state and the optimiser's moments to go on from, with the weights put into `sae`; fresh ones without a
    checkpoint."""
    device = sae.W_dec.device
    found = load_checkpoint(folder) if folder is not None else None
    if found is None:
        return TrainState(torch.zeros(sae.config.d_sae, dtype=torch.int64, device=device)), {}
    tensors, facts = found
    changed = [key for key, value in _flat(_identity(sae, config)).items() if _flat(facts).get(key) != value]
    if changed:
        raise TrainingError(
            f"The checkpoint in {folder} was made with another {' and '.join(changed)}; choose a new folder, or the "
            "same settings to continue it."
        )
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            saved = tensors[f"sae.{name}"]
            parameter.copy_(saved.t() if name == "W_enc" else saved)
    history = [StepReport(**report) for report in facts["history"]]
    numbers = {name: facts.get(name, 0.0) for name in STATE}
    return TrainState(tensors["silent"].to(device), history=history, **numbers), tensors


def _identity(sae: SAE, config: TrainConfig) -> dict[str, Any]:
    """What must be equal for a checkpoint to be continued."""
    free = ("log_every", "checkpoint_every")
    settings = {name: value for name, value in asdict(config).items() if name not in free}
    shape = {
        name: getattr(sae.config, name)
        for name in ("architecture", "d_in", "d_sae", "k", "options", "normalize_activations")
    } | ({} if sae.reconstructs else {"d_out": sae.config.d_out})
    return {
        "config": json.loads(json.dumps(settings)),
        "sae": shape | {"apply_b_dec_to_input": sae.config.apply_b_dec_to_input},
    }


def _flat(facts: dict[str, Any]) -> dict[str, Any]:
    return facts["config"] | facts["sae"]
