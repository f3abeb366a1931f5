"""Which files of a repository belong to one SAE, and which SAEs its file names seem to hold. Names alone; no torch here.

An SAE's `entry` is its folder in the repository, or, where one folder holds several, its weights' file. A file's stem or
a layer's number ("0") in a folder is understood too.

    entries(names)                           -> [("layer_12/width_16k/average_l0_82", "gemma_scope_1"), ...]
    wanted_files("sparsify", "layers.3", names) -> ["config.json", "layers.3/cfg.json", "layers.3/sae.safetensors"]

A format is one line of FOLDERS or FILES. What names cannot tell apart goes by the commoner one: SAELens of all generations
is "saelens", Gemma Scope 1's transcoders are "gemma_scope_1" (only their repository's name differs). `detect_format` looks
into the files and has the last word.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Collection, Iterable, Iterator
from fnmatch import fnmatch
from typing import Any, NamedTuple

from saes.checksums import WEIGHTS

# Big, or not to be opened by anyone who only uses the SAE: other people's pickles and the state of a training.
NEVER = re.compile(
    r"(^|/)(examples\.safetensors|trainer_state\.pt|activations_store_state\.safetensors|optimizer[^/]*|scheduler[^/]*)$"
)
INDEX = ".safetensors.index.json"
NOT_OF_AN_SAE = (
    "examples.safetensors", "optimizer*", "scheduler*", "trainer_state*", "rng_state*", "*.md", "*.png", ".gitattributes",
)  # fmt: skip


class InFolder(NamedTuple):
    """A format whose SAE is a folder of its own."""

    format: str
    weights: tuple[str, ...]  # the first of these that is there, relative to the folder
    needs: tuple[str, ...] = ()  # without these it is not this format
    beside: tuple[str, ...] = ()  # taken along where they are
    above: tuple[str, ...] = ()  # names of configs in the folders above
    parts: re.Pattern[str] | None = None  # files that belong to the weights besides
    called: re.Pattern[str] | None = None  # how the folder is called where files alone do not tell


class AsFile(NamedTuple):
    """A format of which a folder holds several, one weights' file each."""

    format: str
    name: re.Pattern[str]  # of the weights' file; its first group is the layer's number or the stem
    needs: tuple[str, ...] = ()  # beside it, "{}" being the first group; one of them must be there
    beside: tuple[str, ...] = ()
    above: tuple[str, ...] = ()


_SAELENS = InFolder(
    "saelens",
    ("sae_weights.safetensors", "sae_weights" + INDEX),
    ("cfg.json",),
    ("sparsity.safetensors", "activation_scaler.json", "activation_whitening.safetensors", "runner_cfg.json"),
)
_OPENMOSS_WEIGHTS = tuple(
    stem + end for stem in ("sae_weights", "checkpoints/pruned", "checkpoints/final") for end in (".safetensors", ".pt")
)
_LAYER_FILE = re.compile(r"params_layer_(\d+)\.safetensors")
FOLDERS = (
    _SAELENS,
    InFolder("sparsify", ("sae.safetensors", "sae" + INDEX), ("cfg.json",), above=("config.json",)),
    InFolder("gemma_scope_1", ("params.npz",)),
    InFolder("gemma_scope_2", ("params.safetensors",), beside=("config.json",)),
    InFolder(
        "gemma_scope_2",
        ("params_layer_0.safetensors",),
        beside=("config.json",),
        parts=_LAYER_FILE,
        called=re.compile(r"(?:^|/)(?:crosscoder/[^/]+|layer(?:_\d+){2,}_width[^/]*)$"),
    ),
    InFolder("llama_scope", ("checkpoints/final.safetensors", "checkpoints/pruned.safetensors"), ("hyperparams.json",)),
    InFolder("openmoss", _OPENMOSS_WEIGHTS, ("config.json",)),
    InFolder("dictionary_learning", ("ae.pt",), ("config.json",)),
    InFolder("temporal", ("latest_ckpt.safetensors",), ("conf.yaml",)),
    InFolder("mistudio", ("checkpoint.safetensors",), beside=("config.json", "metadata.json")),
)
_CIRCUIT_TRACER = (
    "config.yaml",
    "wandb-config.yaml",
    "wanb-config.yaml",
)  # the last as it is spelt in real repositories
FILES = (
    AsFile("gemma_scope_2", _LAYER_FILE, beside=("config.json",)),
    AsFile(
        "mwhanna_transcoder", re.compile(r"layer_(\d+)\.safetensors"), needs=_CIRCUIT_TRACER, beside=_CIRCUIT_TRACER
    ),
    AsFile("mntss_clt", re.compile(r"W_enc_(\d+)\.safetensors"), ("W_dec_{}.safetensors",), ("config.yaml",)),
    AsFile("qwen_scope", re.compile(r"layer(\d+)\.sae\.pt"), beside=("config.json",), above=("config.json",)),
    AsFile("dictionary_learning", re.compile(r"ae_(\d+)\.pt"), above=("config.json",)),
    AsFile("connor_rob_hook_z", re.compile(r"(.+)\.pt"), needs=("{}_cfg.json",)),
    AsFile("deepseek_r1", re.compile(r"(.*DeepSeek-R1.*-SAE-l\d+)\.pth?", re.I)),
    AsFile("goodfire", re.compile(r"(.*-SAE-l\d+)\.pth?", re.I)),
)
LONE = AsFile("mi_crow", re.compile(r"(.+)\.pth?"))  # a torch file that is nothing else
# Formats with the same files as one of the lines above, told apart by what is in them or by the repository's name.
SAME_FILES = {
    **dict.fromkeys(("saelens_training", "saelens_legacy", "mistudio_community"), "saelens"),
    "gemma_scope_1_transcoder": "gemma_scope_1",
    "llama_scope_r1_distill": "openmoss",
}


def wanted_files(format: str, entry: str, names: Iterable[str]) -> list[str]:
    """The paths, of all in a repository, that the SAE at `entry` consists of: weights and configs, sorted.

    Never examples, optimizer states or other layers' weights. `format` "" means what the names look like. Empty where
    `names` hold no such SAE.
    """
    there = set(names)
    place = _find(format, entry, there)
    return sorted(path for path in place.files(there) if not NEVER.search(path)) if place else []


def entries(names: Iterable[str]) -> list[tuple[str, str]]:
    """(entry, format) of every SAE that a repository's file names seem to hold, in natural order ("layer_2" before "layer_10")."""
    there = {name for name in names if not NEVER.search(name)}
    folders: dict[str, set[str]] = {}
    for name in there:
        folder, _, leaf = name.rpartition("/")
        folders.setdefault(folder, set()).add(leaf)
        if folder.rpartition("/")[2] == "checkpoints":  # weights that lie one deeper than the config
            folders.setdefault(folder.rpartition("/")[0], set()).add(f"checkpoints/{leaf}")
    found = [place for folder, leaves in folders.items() for place in _in_folder(folder, leaves)]
    if not found:
        found = [
            p for folder, leaves in folders.items() for leaf in leaves if (p := _as_file(LONE, folder, leaf, leaves))
        ]
    return sorted(((place.entry, place.format) for place in found), key=lambda pair: natural_key(pair[0]))


class _Place(NamedTuple):
    """An SAE that was found: the line it matches, its folder, and its weights' name and number where it is a file."""

    line: InFolder | AsFile
    folder: str
    leaf: str = ""
    stem: str = ""

    @property
    def entry(self) -> str:
        return _join(self.folder, self.leaf) if self.leaf else self.folder

    @property
    def format(self) -> str:
        """R1's Llama Scope has the files of OpenMOSS, but the names of its three data mixtures."""
        return (
            "llama_scope_r1_distill"
            if self.line.format == "openmoss" and "OpenR1-Math" in self.folder
            else self.line.format
        )

    def files(self, there: Collection[str]) -> Iterator[str]:
        line = self.line
        beside = [self.leaf] if isinstance(line, AsFile) else self._weights(line, there)
        beside += [name.format(self.stem) for name in (*line.needs, *line.beside)]
        above = [_join(folder, name) for folder in _parents(self.folder) for name in line.above]
        yield from {path for path in [*(_join(self.folder, name) for name in beside), *above] if path in there}

    def _weights(self, line: InFolder, there: Collection[str]) -> list[str]:
        """The weights' file; of sharded weights the index and what may be its shards, whatever they are called."""
        name = next((name for name in line.weights if _join(self.folder, name) in there), "")
        if not name.endswith(INDEX) and not line.parts:
            return [name]
        start = f"{self.folder}/" if self.folder else ""
        inside = [path.removeprefix(start) for path in there if path.startswith(start)]
        if line.parts:
            return [leaf for leaf in inside if line.parts.fullmatch(leaf)]
        return [name, *(leaf for leaf in inside if "/" not in leaf and leaf.endswith(".safetensors"))]


def _find(format: str, entry: str, there: Collection[str]) -> _Place | None:
    """The SAE at an entry, of a format or, where that finds none, of any."""
    entry = "" if entry in (".", "/") else entry.strip("/").removeprefix("./")
    places = list(_at(entry, there))
    wanted = SAME_FILES.get(format, format)
    return next((place for place in places if place.line.format == wanted), places[0] if places else None)


def _at(entry: str, there: Collection[str]) -> Iterator[_Place]:
    """All that the entry may mean: a file, a folder, or a stem or number of a file."""
    start = f"{entry}/" if entry else ""
    inside = {path.removeprefix(start) for path in there if path.startswith(start)}
    if entry in there or not inside:
        folder, _, leaf = entry.rpartition("/")
        above = f"{folder}/" if folder else ""
        leaves = {path.removeprefix(above) for path in there if path.startswith(above)}
        yield from _named(folder, leaf, leaves)
    else:
        yield from _in_folder(entry, inside, several=False)


def _named(folder: str, leaf: str, leaves: Collection[str]) -> Iterator[_Place]:
    """A weights' file by its name, stem or number; of a format in folders the file means its folder."""
    if leaf in leaves:
        yield from (place for line in FILES if (place := _as_file(line, folder, leaf, leaves)))
        yield from (place for line in FOLDERS if leaf in line.weights and (place := _whole(line, folder, leaves)))
        up, _, last = folder.rpartition("/")
        inner = f"{last}/{leaf}"
        within = {f"{last}/{name}" for name in leaves}
        if last == "checkpoints":  # the configs above are not in `leaves`, but `files` looks for them
            yield from (_Place(line, up) for line in FOLDERS if inner in line.weights and inner in within)
        if place := _as_file(LONE, folder, leaf, leaves):
            yield place
        return
    for line in (*FILES, LONE):
        for name in sorted(leaves):
            found = line.name.fullmatch(name)
            if found and (found[1] == leaf or name.rpartition(".")[0] == leaf):
                place = _as_file(line, folder, name, leaves)
                if place:
                    yield place


def _in_folder(folder: str, leaves: Collection[str], several: bool = True) -> Iterator[_Place]:
    """What a folder holds. Without `several`: a folder of many files means none of them."""
    whole = [place for line in FOLDERS if (place := _whole(line, folder, leaves))]
    yield from whole
    if any(isinstance(place.line, InFolder) and place.line.parts for place in whole):
        return  # the files are its parts, not SAEs
    files = [
        place
        for leaf in leaves
        if (place := next((found for line in FILES if (found := _as_file(line, folder, leaf, leaves))), None))
    ]
    if not several and not files:
        files = [place for leaf in leaves if (place := _as_file(LONE, folder, leaf, leaves))]
    if several or len(files) == 1:
        yield from files


def _whole(line: InFolder, folder: str, leaves: Collection[str]) -> _Place | None:
    if line.called and not line.called.search(folder):
        return None
    there = any(name in leaves for name in line.weights) and all(name in leaves for name in line.needs)
    return _Place(line, folder) if there else None


def _as_file(line: AsFile, folder: str, leaf: str, leaves: Collection[str]) -> _Place | None:
    found = None if "/" in leaf or NEVER.search(leaf) else line.name.fullmatch(leaf)
    if not found or (line.needs and not any(name.format(found[1]) in leaves for name in line.needs)):
        return None
    return _Place(line, folder, leaf, found[1])


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _parents(folder: str) -> Iterator[str]:
    """The folders above one, the repository's root last."""
    while folder:
        folder = folder.rpartition("/")[0]
        yield folder


def files_at(form: str, entry: str, files: Iterable[Any]) -> list[Any]:
    """The files of a repository that belong to the SAE at a place of it, by the rules of its format on their names.

    `files` are those of a listing (saes.hub.HubFile).
    """
    there = {file.path: file for file in files}
    wanted = set(wanted_files(form, entry, list(there)) or beside(entry, list(there)))
    return [file for path, file in there.items() if path in wanted]


def beside(entry: str, names: list[str]) -> list[str]:
    """What belongs to an SAE of an unknown format: a file and the configs beside it, or what lies in a folder."""
    if entry in names:
        folder = posixpath.dirname(entry)
        return [name for name in names if name == entry or _config_in(folder, name)]
    inside = [name for name in names if not entry or name.startswith(f"{entry}/")]
    inside = [name for name in inside if not any(fnmatch(posixpath.basename(name), bad) for bad in NOT_OF_AN_SAE)]
    direct = [name for name in inside if posixpath.dirname(name) == entry]
    return direct if any(name.endswith(WEIGHTS) for name in direct) else inside


def _config_in(folder: str, name: str) -> bool:
    return posixpath.dirname(name) == folder and name.endswith((".json", ".yaml", ".yml"))


def natural_key(text: str) -> list[tuple[bool, int, str]]:
    """A sorting key by which layer_2 comes before layer_10."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", text)]
