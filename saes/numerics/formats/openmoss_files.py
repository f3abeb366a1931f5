"""OpenMOSS' files: which there are, what config.json says that all its kinds share, and the scales of hook points."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from saes.numerics.formats.archives import read_torch
from saes.numerics.formats.files import FormatError, Place, read_json
from saes.numerics.formats.orient import all_tensors, require_floats
from saes.numerics.formats.stated import Stated
from saes.numerics.formats.weights import upcast

CONFIG = "config.json"
WEIGHTS = tuple(
    stem + end for stem in ("sae_weights", "checkpoints/pruned", "checkpoints/final") for end in (".safetensors", ".pt")
)
DISTRIBUTED = "sae_weights.dcp"
NORM = "dataset_average_activation_norm."
LOG_THRESHOLD = "activation_function.log_jumprelu_threshold"
ACTIVATIONS = ("relu", "jumprelu", "topk")


class Stored(NamedTuple):
    """An SAE's files, read: its config, its tensors in float32, and the mean norm of each hook point."""

    stated: Stated
    file: str
    tensors: dict[str, Tensor]
    means: dict[str, float]

    def scale(self, hook: str, d: int) -> float:
        """By what inputs of a hook point were multiplied. Raises FormatError where it depends on the row."""
        how = self.stated.text("norm_activation", "dataset-wise")
        if how == "inference":
            return 1.0
        if how != "dataset-wise":
            raise FormatError(f"{how!r:.40} in {CONFIG} (norm_activation) is not read here for this kind of SAE.")
        if hook not in self.means:
            raise FormatError(f"{self.file} lacks {NORM}{hook}, by which its inputs were scaled.")
        return math.sqrt(d) / self.means[hook]

    def take(self, *names: str) -> list[Tensor]:
        """Tensors by their names. Raises FormatError naming those that are missing."""
        missing = [name for name in names if name not in self.tensors]
        if missing:
            raise FormatError(f"{self.file} lacks {', '.join(missing)}.")
        return [self.tensors[name] for name in names]

    def only(self, names: Iterable[str]) -> None:
        """Raises FormatError when there are tensors beyond these."""
        extra = sorted(set(self.tensors) - set(names))
        if extra:
            raise FormatError(f"{self.file} holds {extra[0]:.60}, which this kind of SAE does not have.")

    @property
    def activation(self) -> str:
        kind = self.stated.text("act_fn", "relu").lower()
        if kind not in ACTIVATIONS:
            raise FormatError(f"act_fn in {CONFIG} is {kind!r:.40}; those read here are {', '.join(ACTIVATIONS)}.")
        return kind


def weights_path(place: Place) -> Path | None:
    """The weights' file, in the order in which the package looks for them."""
    if place.entry and place.entry not in WEIGHTS:
        return None
    names = (place.entry,) if place.entry else WEIGHTS
    return next((place.folder / name for name in names if (place.folder / name).is_file()), None)


def read_stored(place: Place) -> Stored:
    """Raises FormatError."""
    stated = Stated(CONFIG, read_json(place.folder / CONFIG))
    path = weights_path(place)
    if path is None:
        if (place.folder / DISTRIBUTED).is_dir():
            raise FormatError(
                f"{place.said} holds distributed weights ({DISTRIBUTED}); save them as sae_weights.safetensors."
            )
        raise FormatError(f"{place.said} lacks sae_weights.safetensors.")
    tensors = all_tensors(path) if path.suffix == ".safetensors" else _torch_tensors(path)
    require_floats(tensors, path.name)
    means = {name.removeprefix(NORM): _mean(name, t, path.name) for name, t in tensors.items() if name.startswith(NORM)}
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(NORM)}
    said = stated.values.get("dataset_average_activation_norm")
    if isinstance(said, dict):  # older files have them in the config
        means |= {hook: Stated(NORM, said).positive(hook) for hook in said}
    return Stored(stated, path.name, upcast(kept), means)


def _torch_tensors(path: Path) -> dict[str, Tensor]:
    value: Any = read_torch(path)
    value = value.get("sae", value)
    if not isinstance(value, dict) or not all(isinstance(tensor, Tensor) for tensor in value.values()):
        raise FormatError(f"{path.name} must hold tensors by name under 'sae'.")
    return value


def _mean(name: str, tensor: Tensor, file: str) -> float:
    value = float(tensor) if tensor.numel() == 1 else math.nan
    if not (math.isfinite(value) and value > 0):
        raise FormatError(f"{name} in {file} must be one number above 0.")
    return value
