"""A file of tensors whose names no format here knows, as people save SAEs of their own: a person says which is which.

    facts["tensors"]   "W_enc = encoder.weight.T, b_enc = encoder.bias, W_dec = decoder.weight.T, b_dec = pre_bias"

Left is our name of a tensor (`SAE.parameter_shapes`), right the file's; one a line, or with commas. ".T" behind a name says
that the file holds it transposed (ours are W_enc (d_in, d_sae) and W_dec (d_sae, d_in)), ".exp()" that it holds the logarithm. A
bias that is not named is zero, one number for a threshold is that of every feature. Nothing else is guessed: architecture,
k, hook point, model, normalisation and whether b_dec is subtracted are asked for. What is wrong with an answer is asked again.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saes.numerics.architectures import sae_class
from saes.numerics.formats.archives import npz_members, read_npz, read_torch
from saes.numerics.formats.files import WEIGHT_FILES, FormatError, MissingFact, Place, read_tensors, tensor_headers
from saes.numerics.formats.orient import require_floats
from saes.numerics.formats.saelens_cfg import positive_number
from saes.numerics.formats.stated import fact_text, fact_whole
from saes.numerics.formats.weights import assemble, fold_scale, upcast
from saes.numerics.sae import PER_ROW_NORMALIZATIONS, SAE, SAEConfig

SUFFIXES = (".safetensors", ".npz", ".pt", ".pth")
KINDS = ("standard", "topk", "jumprelu", "gated")
MOST = 16  # tensors: a language model has more
SHOWN = 6
AVERAGE = "expected_average_only_in"
NORMALIZATIONS = ("none", *PER_ROW_NORMALIZATIONS, AVERAGE)
BIASES = ("b_enc", "b_dec")
LINE = re.compile(r"\s*(\w+)\s*=\s*(.+?)\s*")
Shapes = dict[str, tuple[int, ...]]


def detect(place: Place) -> bool:
    """Whether a file, or the only weights' file of a folder, holds few tensors, two of them matrices of the same sizes.

    Asked after all other formats, so that the names in the file are known to be nobody's. A file that cannot be read has none.
    """
    path = _lone(place)
    if path is None or path.name in WEIGHT_FILES:  # a known format without its config is told so
        return False
    try:
        shapes = _shapes(path)
    except FormatError:
        return False
    sizes = [tuple(sorted(shape)) for shape in shapes.values() if len(shape) == 2 and min(shape) > 1]
    return len(shapes) <= MOST and any(sizes.count(size) > 1 for size in sizes)


def load(place: Place, facts: Mapping[str, Any], device: torch.device | str, dtype: torch.dtype | None) -> SAE:
    """Facts: `tensors`, `architecture`, `hook_name`, `model_name`, `normalize_activations` must be given, with it `k` of a
    TopK SAE, `apply_b_dec_to_input` where there is a b_dec, `norm_scaling_factor` where inputs were scaled by one.

    Raises MissingFact, with what is wrong where an answer cannot be; FormatError.
    """
    path = _lone(place)
    if path is None:
        raise FormatError(f"{place.said} holds no single file of weights.")
    shapes = _shapes(path)
    _ask(path.name, shapes, facts)
    kind = _kind(facts)
    named = _named(fact_text(facts, "tensors"), shapes, kind)
    _ask_more(kind, named, facts)
    tensors = {ours: _turned(tensor, named[ours]) for ours, tensor in _read(path, named).items()}
    require_floats(tensors, path.name)
    config = _completed(kind, tensors, named, facts)
    if config.normalize_activations == AVERAGE:
        tensors = upcast(tensors)
        fold_scale(tensors, positive_number("norm_scaling_factor", facts["norm_scaling_factor"]))
        config = config.with_(normalize_activations="none")
    return assemble(config, tensors, device, dtype)


# -- the file ----------------------------------------------------------------------------------------------------------
def _lone(place: Place) -> Path | None:
    """The weights' file that is meant: the entry, or the only one of the folder."""
    names = [place.entry] if place.entry else [name for name in place.names if name.endswith(SUFFIXES)]
    path = place.folder / names[0] if len(names) == 1 and names[0].endswith(SUFFIXES) else None
    return path if path is not None and path.is_file() else None


def _shapes(path: Path) -> Shapes:
    if path.suffix == ".safetensors":
        return {name: info.shape for name, info in tensor_headers(path).items()}
    if path.suffix == ".npz":
        return {name: member.shape for name, member in npz_members(path).items()}
    return {name: tuple(tensor.shape) for name, tensor in _within(read_torch(path))}


def _within(value: Mapping[Any, Any], above: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors of a dict and of the dicts in it, such as {"model": {"encoder.weight": …}}, by their dotted names."""
    for name, inner in value.items():
        if isinstance(inner, Tensor):
            yield f"{above}{name}", inner
        elif isinstance(inner, Mapping):
            yield from _within(inner, f"{above}{name}.")


def _read(path: Path, named: Mapping[str, tuple[str, str]]) -> dict[str, Tensor]:
    wanted = {theirs for theirs, _ in named.values()}
    if path.suffix == ".safetensors":
        found = read_tensors(path, sorted(wanted))
    else:
        found = read_npz(path) if path.suffix == ".npz" else dict(_within(read_torch(path)))
    return {ours: found[theirs] for ours, (theirs, _) in named.items()}


# -- what a person says ------------------------------------------------------------------------------------------------
def _ask(file: str, shapes: Shapes, facts: Mapping[str, Any]) -> None:
    """Raises MissingFact with all that is needed of any SAE and was not said."""
    missing = [
        name
        for name in ("tensors", "architecture", "model_name", "hook_name", "normalize_activations")
        if not fact_text(facts, name)
    ]
    if missing:
        raise MissingFact(
            f"{file} is in no format that is known here. It holds {_told(shapes)}; say what they are.", *missing
        )


def _told(shapes: Shapes) -> str:
    said = [f"{name:.32} ({', '.join(map(str, shape))})" for name, shape in list(shapes.items())[:SHOWN]]
    return ", ".join(said) + (f" and {len(shapes) - SHOWN} more" if len(shapes) > SHOWN else "")


def _kind(facts: Mapping[str, Any]) -> str:
    kind = fact_text(facts, "architecture").lower()
    if kind not in KINDS:
        raise MissingFact(
            f"The architecture {kind!r:.40} is not one of {', '.join(KINDS)}; a trained BatchTopK SAE is a jumprelu one.",
            "architecture",
        )
    return kind


def _named(text: str, shapes: Shapes, kind: str) -> dict[str, tuple[str, str]]:
    """{our name: (the file's name, "" | ".T" | ".exp()")}. Raises MissingFact with the first thing that cannot be."""
    ours = set(sae_class(kind).parameter_shapes(SAEConfig(kind, 1, 1, k=1)))
    found: dict[str, tuple[str, str]] = {}
    for part in re.split(r"[,\n]", text):
        if not part.strip():
            continue
        line = LINE.fullmatch(part)
        if line is None:
            raise _wrong(f"“{part.strip():.60}” does not read like W_enc = encoder.weight.T")
        name, theirs = line.groups()
        if name not in ours:
            raise _wrong(f"A {kind} SAE has no tensor {name:.40}, only {', '.join(sorted(ours))}")
        if name in found:
            raise _wrong(f"{name} is said twice")
        found[name] = _of_file(theirs, shapes)
    if missing := sorted(ours - set(found) - set(BIASES)):
        raise _wrong(f"A {kind} SAE needs {' and '.join(missing)} too")
    return found


def _of_file(said: str, shapes: Shapes) -> tuple[str, str]:
    for ending in ("", ".T", ".exp()"):
        name = said.removesuffix(ending)
        if said.endswith(ending) and name in shapes:
            if ending == ".T" and len(shapes[name]) != 2:
                raise _wrong(f"{name:.60} is no matrix, so it cannot be transposed")
            return name, ending
    raise _wrong(f"The file has no tensor {said:.60}; it holds {_told(shapes)}")


def _ask_more(kind: str, named: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Raises MissingFact with what this SAE needs besides, or a normalisation that there is not."""
    normalization = fact_text(facts, "normalize_activations")
    if normalization not in NORMALIZATIONS:
        said = f"The normalisation {normalization!r:.40} is not one of {', '.join(NORMALIZATIONS)}."
        raise MissingFact(said, "normalize_activations")
    needed = {
        "k": kind == "topk",
        "apply_b_dec_to_input": "b_dec" in named,
        "norm_scaling_factor": normalization == AVERAGE,
    }
    missing = [name for name, needs in needed.items() if needs and facts.get(name) is None]
    if missing:
        raise MissingFact(f"An SAE of this kind needs {' and '.join(missing)} too, which no file says.", *missing)


def _turned(tensor: Tensor, said: tuple[str, str]) -> Tensor:
    if said[1] == ".T":
        return tensor.t().contiguous()
    return tensor.float().exp() if said[1] == ".exp()" else tensor


def _completed(
    kind: str, tensors: dict[str, Tensor], named: Mapping[str, tuple[str, str]], facts: Mapping[str, Any]
) -> SAEConfig:
    """The config by the shape of W_enc, with `tensors` made whole: biases of zero, one threshold for all features.

    Raises MissingFact where the shapes do not belong together, as they do not when a ".T" is missing.
    """
    if tensors["W_enc"].dim() != 2:
        raise _wrong(f"{named['W_enc'][0]:.60} is no matrix, so it is not W_enc")
    d_in, d_sae = tensors["W_enc"].shape
    config = SAEConfig(
        kind, d_in, d_sae,
        k=fact_whole(facts, "k") if kind == "topk" else None,
        hook_name=fact_text(facts, "hook_name"),
        model_name=fact_text(facts, "model_name"),
        apply_b_dec_to_input=bool(facts.get("apply_b_dec_to_input")) and "b_dec" in named,
        normalize_activations=fact_text(facts, "normalize_activations"),
    )  # fmt: skip
    if config.k is not None and config.k > d_sae:
        raise MissingFact(f"k is {config.k}, but this SAE has {d_sae} features.", "k")
    for name, shape in sae_class(kind).parameter_shapes(config).items():
        if name not in tensors:
            tensors[name] = torch.zeros(shape, dtype=tensors["W_enc"].dtype)
        elif name == "threshold" and tensors[name].numel() == 1:
            tensors[name] = tensors[name].reshape(1).expand(shape).contiguous()
        elif tuple(tensors[name].shape) != shape:
            raise _wrong(
                f"{name} has the shape {tuple(tensors[name].shape)}, but beside W_enc with d_in {d_in} and d_sae {d_sae} it "
                f"must be {shape}"
            )
    return config


def _wrong(sentence: str) -> MissingFact:
    return MissingFact(f"{sentence}; .T behind a name says that the file holds it transposed.", "tensors")
