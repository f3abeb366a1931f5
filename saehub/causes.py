"""What an exception comes down to: what led to it, a full disk, memory that ran out. For jobs and numerics alike, so that
nothing is imported here but Python's own."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, the owner's quota, the largest file allowed


def chain_of(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and what led to it, the outermost first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def system_error(error: BaseException) -> int | None:
    """The errno behind an exception; safetensors says it only in its text."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None


def disk_is_full(error: BaseException) -> bool:
    """Whether an exception says that there is no room for what is written."""
    return system_error(error) in FULL or "No space left" in str(error)


def memory_ran_out(error: BaseException) -> bool:
    """Whether Python, numpy or torch says so: torch by a class of its own on a GPU, on a CPU only in its text, and the
    library of its CPU kernels only by what it could not make."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "allocate memory" in str(error) or "could not create a primitive" in str(error)
