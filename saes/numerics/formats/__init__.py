"""SAE files: find out which format a folder is in, load it, save it. One module per format, one line in FORMATS."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from saes.numerics.formats import saelens
from saes.numerics.formats.files import FormatError, NotRepresentable, UnknownFormat
from saes.numerics.sae import SAE

__all__ = ["FORMATS", "FormatError", "NotRepresentable", "UnknownFormat", "detect_format", "load_sae", "save_sae"]


class Format(NamedTuple):
    """What a format module offers; `save` is None for formats that are only read."""

    detect: Callable[[Path], bool]
    load: Callable[[Path, Mapping[str, Any], torch.device | str, torch.dtype], SAE]
    save: Callable[[SAE, Path], None] | None


FORMATS: dict[str, Format] = {
    "saelens": Format(saelens.detect, saelens.load, saelens.save),
}

# Files by which people publish SAEs, so that a folder can be named for what it is, and two formats in one be noticed.
WEIGHT_FILES = {
    "sae_weights.safetensors": "SAELens",
    "sae_weights.safetensors.index.json": "SAELens",
    "params.npz": "Gemma Scope",
    "params.safetensors": "Gemma Scope 2",
    "sae.safetensors": "sparsify",
    "ae.pt": "dictionary_learning",
    "checkpoint.safetensors": "miStudio",
    "latest_ckpt.safetensors": "temporal",
}


def detect_format(path: str | Path) -> str:
    """The name in FORMATS of the format a folder is in. Reads names and configs, no weights.

    Raises UnknownFormat, naming what was found, also when a folder holds weights of two formats; FormatError when a
    config cannot be read.
    """
    folder = Path(path).absolute()  # so that "." has a name
    if not folder.exists():
        raise UnknownFormat(f"There is no folder {folder}.")
    if not folder.is_dir():
        raise UnknownFormat(
            f"{folder.name} is a file; give the folder of an SAE, which holds its config and its weights."
        )
    with _readable(folder):
        names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    makers = list(dict.fromkeys(WEIGHT_FILES[name] for name in names if name in WEIGHT_FILES))
    if len(makers) > 1:
        raise UnknownFormat(
            f"{folder.name} holds weights of two formats ({' and '.join(makers)}); keep only one of them."
        )
    for name, format_ in FORMATS.items():
        with _readable(folder):
            if format_.detect(folder):
                return name
    raise UnknownFormat(_what_was_found(folder.name, names, makers))


def load_sae(
    path: str | Path,
    *,
    facts: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> SAE:
    """Load an SAE of any known format, of the class of its architecture, with its weights checked.

    `facts` is what the files cannot tell, e.g. {"hook_name": ..., "model_name": ..., "k": ...}. Nothing in the files
    is ever executed. Raises a ValueError with one sentence: UnknownFormat, FormatError (damaged, contradictory,
    not finite, a fact missing) or SAEError (an architecture or option that is not supported).
    """
    format_ = FORMATS[detect_format(path)]
    with _readable(Path(path)):
        return format_.load(Path(path), facts or {}, device, dtype)


def save_sae(sae: SAE, path: str | Path, format: str = "saelens") -> None:
    """Write an SAE as a folder, whole or not at all.

    Raises NotRepresentable rather than lose anything, FolderError when the folder cannot be written.
    """
    save = FORMATS[format].save if format in FORMATS else None
    if save is None:
        writable = ", ".join(name for name, format_ in FORMATS.items() if format_.save)
        raise NotRepresentable(f"SAEs cannot be written in the format {format!r}; they can be in {writable}.")
    save(sae, Path(path))


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Turn what the system says about a file it cannot read into a FormatError."""
    try:
        yield
    except OSError as error:
        raise FormatError(f"{error.filename or folder} cannot be read ({error.strerror}).") from error


def _what_was_found(folder: str, names: list[str], makers: list[str]) -> str:
    supported = f"the supported formats are {', '.join(FORMATS)}"
    if makers == ["SAELens"]:
        return f"{folder} holds sae_weights.safetensors, but not the cfg.json that belongs to it in a SAELens SAE."
    if makers:
        return f"{folder} looks like a {makers[0]} SAE, which cannot be read yet; {supported}."
    if not names:
        return f"{folder} is an empty folder; {supported}."
    found = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return f"{folder} holds no SAE that is known here, only {found:.300}; {supported}."
