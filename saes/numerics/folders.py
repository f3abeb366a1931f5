"""Write a folder whole or not at all."""

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from saehub.causes import chain_of, disk_is_full


class FolderError(ValueError):
    """A folder that cannot be written. The message is one sentence for a person."""


@contextmanager
def whole_folder(target: Path, *, replaces: Collection[str] = ()) -> Iterator[Path]:
    """Yields a temporary folder beside `target`, renamed to it when the block ends well and removed when it does not.

    An existing `target` is replaced only if it is empty or holds nothing but files named in `replaces`. Raises
    FolderError when it holds anything else, cannot be written, or the disk is full.
    """
    partial = target.with_name(f".{target.name}-{uuid4().hex}")
    try:
        _refuse_strangers(target, replaces)
        partial.mkdir(parents=True)
        yield partial
        _share(partial)
        _put_in_place(partial, target)
    except Exception as error:  # safetensors and torch have errors of their own for a full disk
        if any(map(disk_is_full, chain_of(error))):  # also where a folder within this one said it in words of its own
            raise FolderError(
                f"The disk is full, so {target} was not written; free some space and try again."
            ) from error
        if isinstance(error, PermissionError | NotADirectoryError):
            raise FolderError(f"{target} cannot be written ({error.strerror}); choose another folder.") from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _refuse_strangers(target: Path, replaces: Collection[str]) -> None:
    if target.is_dir():
        strangers = sorted(path.name for path in target.iterdir() if path.name not in replaces)
        if strangers:
            raise FolderError(f"The folder {target} already holds {strangers[0]}; give a new folder.")
    elif target.exists():
        raise FolderError(f"{target} already exists and is not a folder; give a new folder.")


def _share(folder: Path) -> None:
    """Give every file the folder's own read and write rights: safetensors makes files only their writer can read."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _put_in_place(partial: Path, target: Path) -> None:
    if not target.exists():
        partial.rename(target)
        return
    old = partial.with_name(partial.name + "-old")
    target.rename(old)
    partial.rename(target)
    shutil.rmtree(old)
