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
        self._file: int | None = None
        while self._file is None:  # a file that its holder took away meanwhile locks nothing
            self._file = os.open(file, os.O_CREAT | os.O_RDWR)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                self.release()
                raise Taken(str(file)) from error
            if not _is(self._file, file):
                self.release()

    def release(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __del__(self) -> None:
        self.release()


def _is(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False
