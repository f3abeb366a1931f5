"""SHA-256 of an SAE's files: what tells two SAEs apart, and what shows that a file is still what it was."""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

WEIGHTS = (".safetensors", ".npz", ".pt", ".pth", ".th", ".bin")
BLOCK = 1 << 20


def digest(path: Path, tick: Callable[[int], None] = lambda n: None) -> str:
    """SHA-256 of a file, in hexadecimal. `tick` hears of every block of bytes."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            found.update(block)
            tick(len(block))
    return found.hexdigest()


def git_digest(path: Path) -> str:
    """The SHA-1 by which git, and with it the Hub, names a small file."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def checksums(
    root: Path, names: Iterable[str], tick: Callable[[int], None] = lambda n: None
) -> dict[str, dict[str, Any]]:
    """{name: {sha256, bytes}} of files below `root`."""
    return {name: {"sha256": digest(root / name, tick), "bytes": (root / name).stat().st_size} for name in names}


def is_weights(name: str) -> bool:
    """Whether a file of an SAE holds its weights, by its name."""
    return name.endswith(WEIGHTS) and not name.endswith("sparsity.safetensors")


def weights_digest(files: Mapping[str, Mapping[str, Any]]) -> str:
    """One digest for an SAE's weights: that of its weight file, or of the sorted digests when there are several."""
    found = sorted(entry["sha256"] for name, entry in files.items() if is_weights(name))
    return found[0] if len(found) == 1 else hashlib.sha256("\n".join(found).encode()).hexdigest() if found else ""


def published(row: Any) -> dict[str, tuple[str, Path | None]]:
    """{name in its repository: (sha256, the file itself where it is the one that is used)} of what an SAE came from."""
    if "source" in row.proof:
        return {name: (entry["sha256"], None) for name, entry in row.proof["source"].items()}
    folder = row.files.is_dir()
    place, anchor = PurePosixPath(row.repo_path), row.files if folder else row.files.parent
    place = place if folder else place.parent
    return {posixpath.normpath(place / name): (entry["sha256"], anchor / name) for name, entry in row.checksums.items()}
