"""SAE files: find out which format a folder is in, load it, save it. One module per format, one line in FORMATS."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from saes.numerics.formats import (
    circuit_tracer,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    llama_scope,
    mi_crow,
    mistudio,
    mistudio_community,
    named_tensors,
    openmoss,
    saelens,
    saelens_legacy,
    saelens_training,
    single_files,
    sparsify,
    temporal_hf,
)
from saes.numerics.formats.files import (
    WEIGHT_FILES,
    FormatError,
    MissingFact,
    NotRepresentable,
    Place,
    TwoFormats,
    UnknownFormat,
    find_place,
)
from saes.numerics.formats.finite import require_finite
from saes.numerics.sae import SAE, SAEError

__all__ = [
    "FORMATS",
    "FormatError",
    "MissingFact",
    "NotRepresentable",
    "TwoFormats",
    "UnknownFormat",
    "detect_format",
    "load_sae",
    "save_sae",
]


class Format(NamedTuple):
    """What a format module offers; `save` is None for formats that are only read."""

    detect: Callable[[Place], bool]
    load: Callable[[Place, Mapping[str, Any], torch.device | str, torch.dtype | None], SAE]
    save: Callable[[SAE, Path], None] | None


FORMATS: dict[str, Format] = {
    "saelens": Format(saelens.detect, saelens.load, saelens.save),
    "saelens_training": Format(saelens_training.detect, saelens_training.load, None),
    "saelens_legacy": Format(saelens_legacy.detect, saelens_legacy.load, None),
    "mistudio_community": Format(mistudio_community.detect, mistudio_community.load, mistudio_community.save),
    "mistudio": Format(mistudio.detect, mistudio.load, None),
    "gemma_scope_1_transcoder": Format(gemma_scope.detect_transcoder, gemma_scope.load, None),
    "gemma_scope_1": Format(gemma_scope.detect, gemma_scope.load, None),
    "gemma_scope_2": Format(gemma_scope_2.detect, gemma_scope_2.load, None),
    "llama_scope": Format(llama_scope.detect, llama_scope.load, None),
    "llama_scope_r1_distill": Format(llama_scope.detect_r1, llama_scope.load_r1, None),
    "dictionary_learning": Format(dictionary_learning.detect, dictionary_learning.load, dictionary_learning.save),
    "sparsify": Format(sparsify.detect, sparsify.load, sparsify.save),
    "openmoss": Format(openmoss.detect, openmoss.load, None),
    "temporal": Format(temporal_hf.detect, temporal_hf.load, None),
    "mwhanna_transcoder": Format(circuit_tracer.detect_transcoder, circuit_tracer.load_transcoder, None),
    "mntss_clt": Format(circuit_tracer.detect_clt, circuit_tracer.load_clt, None),
    "qwen_scope": Format(single_files.detect_qwen, single_files.load_qwen, None),
    "connor_rob_hook_z": Format(single_files.detect_hook_z, single_files.load_hook_z, None),
    # Lone torch files, known only by the names in them.
    "goodfire": Format(single_files.detect_goodfire, single_files.load_goodfire, None),
    "deepseek_r1": Format(single_files.detect_deepseek, single_files.load_deepseek, None),
    "mi_crow": Format(mi_crow.detect, mi_crow.load, mi_crow.save),
    "named_tensors": Format(
        named_tensors.detect, named_tensors.load, None
    ),  # nobody's names: a person says what is what
}

KNOWN = (  # whose files the table reads, for sentences
    "SAELens, Gemma Scope, Llama Scope, OpenMOSS, dictionary_learning, sparsify, Qwen Scope, Goodfire, DeepSeek R1 "
    "(qresearch), the hook_z SAEs, circuit-tracer, temporal SAEs, miStudio and mi_crow"
)

A_FILE = re.compile(r"\.(safetensors|npz|npy|pth?|json|ya?ml)\b")


def detect_format(path: str | Path) -> str:
    """The name in FORMATS of the format a folder is in. Reads names and configs, no weights.

    Raises UnknownFormat, naming what was found; TwoFormats when a folder holds weights of two; FormatError when a
    config cannot be read.
    """
    place = _found(Path(path))
    return _detect(place)


def _found(path: Path) -> Place:
    with _readable(path):
        return find_place(path)


def _detect(place: Place) -> str:
    makers = [] if place.entry else list(dict.fromkeys(WEIGHT_FILES[n] for n in place.names if n in WEIGHT_FILES))
    if len(makers) > 1:
        found = " and ".join(f"{name} of {WEIGHT_FILES[name]}" for name in place.names if name in WEIGHT_FILES)
        raise TwoFormats(f"{place.said} holds weights of two formats ({found}); keep only one of them.")
    for name, format_ in FORMATS.items():
        with _readable(place.folder):
            if format_.detect(place):
                return name
    raise UnknownFormat(_what_was_found(place, makers))


def load_sae(
    path: str | Path,
    *,
    facts: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    checked: bool = False,
) -> SAE:
    """Load an SAE of any known format, of the class of its architecture, with its weights checked.

    `facts` is what the files cannot tell, e.g. {"hook_name": ..., "model_name": ..., "k": ...}; what the files tell
    needs none. `dtype` None keeps the dtype they are stored in. `checked` says that the weights of these files were
    seen to be finite before, which spares reading all of them now. Nothing in the files is ever executed.

    Raises a ValueError with one sentence: UnknownFormat, MissingFact, FormatError (damaged, contradictory, not finite)
    or SAEError (an architecture or option that is not supported).
    """
    place = _found(Path(path))
    format_ = FORMATS[_detect(place)]
    with _readable(place.folder), _naming_files(place):
        sae = format_.load(place, facts or {}, device, dtype)
        if not checked:
            require_finite(sae, place)
    return sae


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


@contextmanager
def _naming_files(place: Place) -> Iterator[None]:
    """Let a fault say where it is: a sentence that names no file gets the SAE's files in front."""
    try:
        yield
    except MissingFact:
        raise
    except (FormatError, SAEError) as error:
        if not A_FILE.search(str(error)):
            names = [name for name in place.names if A_FILE.search(name)] if not place.entry else [place.entry]
            error.args = (f"{' and '.join(names) if 0 < len(names) <= 3 else place.said}: {error}",)
        raise


def _what_was_found(place: Place, makers: list[str]) -> str:
    supported = f"the supported formats are those of {KNOWN}"
    if place.entry and place.entry not in place.names:
        return f"There is no folder or file {place.folder / place.entry}."
    if place.entry:
        return f"{place.entry} is a file of no SAE format that is known here; {supported}."
    if makers == ["SAELens"]:
        return f"{place.said} holds sae_weights.safetensors, but not the cfg.json that belongs to it in a SAELens SAE."
    if makers:
        return f"{place.said} looks like a {makers[0]} SAE, but lacks the config that belongs to it; {supported}."
    below = sorted(child.name for child in place.folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    if not place.names and below:
        return (
            f"{place.said} holds only folders ({', '.join(below[:6]):.300}); give the one that holds the SAE's files."
        )
    if not place.names:
        return f"{place.said} is an empty folder; {supported}."
    found = ", ".join(place.names[:6]) + (f" and {len(place.names) - 6} more" if len(place.names) > 6 else "")
    return f"{place.said} holds no SAE that is known here, only {found:.300}; {supported}."
