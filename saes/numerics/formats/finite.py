"""Every weight is read once to see that it is a finite number; files that have not changed since are not read again."""

import os
import time

from saes.numerics.formats.files import Place
from saes.numerics.formats.weights import refuse_non_finite
from saes.numerics.sae import SAE

SETTLED = 2.0  # seconds: a file that was written just now may be written again without its times showing it
MOST = 1000  # folders remembered
MANY = 100  # files: of a whole repository in one folder nothing is remembered

File = tuple[str, int, int, int, int, int]
_seen: set[tuple[File, ...]] = set()


def require_finite(sae: SAE, place: Place) -> None:
    """Raises FormatError when a weight is NaN or infinite. Remembers, in this process, the files where none is."""
    files = _files(place)
    if files and files in _seen:
        return
    refuse_non_finite(sae.state_dict())
    now = time.time_ns()
    if files and all(now - changed > SETTLED * 1e9 for *_, changed in files):
        if len(_seen) >= MOST:
            _seen.clear()
        _seen.add(files)


def _files(place: Place) -> tuple[File, ...]:
    """What tells these files from changed ones, if all the weights lie in the folder itself; the last is a time that no
    program can set."""
    with os.scandir(place.folder) as children:
        if len(place.names) > MANY or any(child.is_dir() for child in children):
            return ()
    stats = [(name, os.stat(place.folder / name)) for name in place.names]
    return tuple((name, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in stats)
