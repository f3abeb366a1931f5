"""The right to write a folder, held by one process at a time."""

import fcntl
import os
from pathlib import Path


class Taken(OSError):
    """Somebody else has it."""


class Claim:
    """A lock on a file of its own, until `release` or the end of its process in whatever way. Raises Taken."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file: int | None = os.open(file, os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.release()
            raise Taken(str(file)) from error

    def release(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __del__(self) -> None:
        self.release()
