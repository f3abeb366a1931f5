"""Every weight is read once to see that it is a finite number; files that have not changed since are not read again.

What was seen of large files is remembered beyond the process, as empty files in the user's cache folder
($XDG_CACHE_HOME/saehub/finite, else ~/.cache/saehub/finite), each named by what tells the weights from changed ones.
"""

import contextlib
import hashlib
import os
import time
from pathlib import Path

from saes.numerics.formats.files import Place
from saes.numerics.formats.weights import refuse_non_finite
from saes.numerics.sae import SAE

SETTLED = 2.0  # seconds: a file that was written just now may be written again without its times showing it
MOST = 1000  # folders remembered
MANY = 100  # files: of a whole repository in one folder nothing is remembered
LARGE = 64 * 2**20  # bytes: smaller ones are read faster than looked up

File = tuple[str, int, int, int, int, int]
_seen: set[tuple[File, ...]] = set()


def require_finite(sae: SAE, place: Place) -> None:
    """Raises FormatError when a weight is NaN or infinite. Remembers the files where none is."""
    files = _files(place)
    mark = _mark(files)
    if files and (files in _seen or (mark is not None and mark.exists())):
        return
    _read_ahead(place)
    refuse_non_finite(sae.state_dict())
    now = time.time_ns()
    if files and all(now - changed > SETTLED * 1e9 for *_, changed in files):
        if len(_seen) >= MOST:
            _seen.clear()
        _seen.add(files)
        if mark is not None:
            with contextlib.suppress(OSError):  # a home that cannot be written
                mark.parent.mkdir(parents=True, exist_ok=True)
                mark.touch()


def _files(place: Place) -> tuple[File, ...]:
    """What tells these files from changed ones, if all the weights lie in the folder itself; the last is a time that no
    program can set."""
    with os.scandir(place.folder) as children:
        if len(place.names) > MANY or any(child.is_dir() for child in children):
            return ()
    stats = [(name, os.stat(place.folder / name)) for name in place.names]
    return tuple((name, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in stats)


def _mark(files: tuple[File, ...]) -> Path | None:
    """Where it is remembered that these files are sound; None for those that are too small to be worth it."""
    if sum(size for _, _, _, size, _, _ in files) < LARGE:
        return None
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home, "saehub", "finite", hashlib.sha256(repr(files).encode()).hexdigest()[:40])


def _read_ahead(place: Place) -> None:
    """Tell the system that the files will be read whole: from a disk that is faster than page by page."""
    for name in place.names:
        with contextlib.suppress(OSError), (place.folder / name).open("rb") as file:
            if hasattr(os, "posix_fadvise") and os.fstat(file.fileno()).st_size >= LARGE:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
