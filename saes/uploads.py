"""What a person sends to be imported: checked before it is unpacked, and kept in one folder until its job is done."""

from __future__ import annotations

import os
import shutil
import stat
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any

from django.conf import settings
from django.core.exceptions import ValidationError
from django.core.files.uploadedfile import TemporaryUploadedFile, UploadedFile

from saehub.disk import free_bytes

MAX_FILES = 10_000
MAX_NAME = 400
LONGEST_PART = 255  # bytes of a folder's or file's name, as file systems have it
BLOCK = 1 << 20
ARCHIVE = "archive.zip"


def safe_name(text: str) -> PurePosixPath:
    """The place of a file inside the folder that is sent, or ValidationError when it would lie outside of it."""
    shown = f"{text!a:.80}"
    path = PurePosixPath(text.replace("\\", "/"))
    longest = max((len(part.encode("utf-8", "surrogatepass")) for part in path.parts), default=0)
    if not text or len(text) > MAX_NAME or longest > LONGEST_PART or any(ord(letter) < 32 for letter in text):
        raise ValidationError(f"A file is named {shown}, which is not a name files here can have.")
    if not path.parts or path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
        raise ValidationError(f"A file is named {shown}, which leads out of its folder; nothing was unpacked.")
    return path


def checked(files: Sequence[UploadedFile], paths: Sequence[str]) -> list[tuple[PurePosixPath, UploadedFile]]:
    """Each file with its place, by what the browser said of a folder, or by its name. Raises ValidationError."""
    total = sum(file.size or 0 for file in files)
    if total > settings.SAE_UPLOAD_LIMIT:
        raise ValidationError(too_large())
    if total > free_bytes():
        raise ValidationError("The server's disk is too full for these files; free some space first.")
    if len(files) > MAX_FILES:
        raise ValidationError(f"These are {len(files):,} files; an SAE has at most {MAX_FILES:,}.")
    told = paths if len(paths) == len(files) else [file.name or "" for file in files]
    placed = [(safe_name(name), file) for name, file in zip(told, files, strict=True)]
    _refuse_clashes([place for place, _ in placed])
    for place, file in placed:
        if place.suffix.lower() == ".zip":
            if len(files) > 1:
                raise ValidationError(f"{place.name} is an archive among other files; send the archive alone.")
            check_zip(file)
    return placed


def too_large() -> str:
    return (
        f"This is more than {settings.SAE_UPLOAD_LIMIT // 2**20:,} MB; put it on the server and give its path, "
        "or ask an admin to raise SAEHUB_SAE_UPLOAD_MB."
    )


def _refuse_clashes(places: Sequence[PurePosixPath]) -> None:
    folders = {str(folder).casefold() for place in places for folder in place.parents}
    seen: set[str] = set()
    for place in places:
        key = str(place).casefold()
        if key in seen:
            raise ValidationError(
                f"Two files are named {place}; send the folder as a zip, which keeps them in their own folders."
            )
        if key in folders:
            raise ValidationError(f"{place} is a file and a folder at once; nothing was unpacked.")
        seen.add(key)


def check_zip(file: IO[bytes] | UploadedFile | Path) -> list[zipfile.ZipInfo]:
    """The members of an archive that are files, once its directory says nothing hostile. Reads no contents.

    Raises ValidationError: not a zip, encrypted, links or devices in it, names that lead out of it, come twice or are a
    file and a folder, more than MAX_FILES members, more than SAE_UPLOAD_LIMIT bytes unpacked.
    """
    try:
        with zipfile.ZipFile(file) as archive:  # type: ignore[arg-type]
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RecursionError) as error:
        raise ValidationError(f"The archive cannot be read ({error}); make the zip again.") from error
    finally:
        if not isinstance(file, Path):
            file.seek(0)
    if len(members) > MAX_FILES:
        raise ValidationError(f"The archive holds {len(members):,} files; an SAE has at most {MAX_FILES:,}.")
    if sum(member.file_size for member in members) > settings.SAE_UPLOAD_LIMIT:
        raise ValidationError(f"Unpacked, the archive would be too large. {too_large()}")
    found = [member for member in members if not member.is_dir()]
    for member in found:
        safe_name(member.filename)
        kind = stat.S_IFMT(member.external_attr >> 16)
        if kind not in (0, stat.S_IFREG):
            raise ValidationError(f"{member.filename} in the archive is a link or a device, not a file.")
        if member.flag_bits & 1:
            raise ValidationError(f"{member.filename} in the archive is encrypted; send it without a password.")
    for member in members:
        if member.is_dir() and PurePosixPath(member.filename).parts:  # "./" is the folder itself, as bsdtar writes it
            safe_name(member.filename.rstrip("/"))
    _refuse_clashes([safe_name(member.filename) for member in found])
    if not found:
        raise ValidationError("The archive is empty.")
    return found


def store(folder: Path, placed: Sequence[tuple[PurePosixPath, UploadedFile]]) -> None:
    """Put what was sent into `folder`: files below files/, an archive beside it, for its job to unpack."""
    shutil.rmtree(folder, ignore_errors=True)  # of a row that a restored database does not know any more
    for place, file in placed:
        target = folder / ARCHIVE if place.suffix.lower() == ".zip" else folder / "files" / place
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(file, TemporaryUploadedFile):
            shutil.move(file.temporary_file_path(), target)  # on the same disk: a rename
            target.chmod(0o644)
            continue
        with target.open("xb") as out:
            for chunk in file.chunks():
                out.write(chunk)


def unpack(folder: Path, tick: Callable[[int, int], Any] = lambda done, total: None) -> Path:
    """The folder of the files that were sent; an archive is unpacked first, whole or not at all.

    Each member is written to a name of ours below files/, never more bytes than its entry declares. Raises
    ValidationError for an archive that lies.
    """
    files, archive = folder / "files", folder / ARCHIVE
    if not archive.exists():
        return files
    if files.exists():  # unpacked whole by an attempt that was killed before its last step
        archive.unlink()
        return files
    members = check_zip(archive)
    total = sum(member.file_size for member in members)
    partial = folder / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    done = 0
    with zipfile.ZipFile(archive) as opened:
        for member in members:
            target = partial / safe_name(member.filename)
            target.parent.mkdir(parents=True, exist_ok=True)
            for size in _inflate(opened, member, target):
                done += size
                tick(done, total)
    os.rename(partial, files)
    archive.unlink()
    return files


def _inflate(opened: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> Iterable[int]:
    written = 0
    try:
        with opened.open(member) as source, target.open("xb") as out:
            while block := source.read(BLOCK):
                written += len(block)
                if written > member.file_size:
                    raise ValidationError(f"{member.filename} in the archive is larger than the archive says.")
                out.write(block)
                yield len(block)
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise ValidationError(f"{member.filename} in the archive is damaged ({error}).") from error
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise ValidationError(f"{member.filename} in the archive is damaged.") from error
        raise


def refuse_links(path: Path, roots: Iterable[Path]) -> None:
    """Raise ValidationError when something below a folder of the server leads out of the folders that may be read."""
    allowed = [root.resolve() for root in roots]
    for found in [path] if path.is_file() else path.rglob("*"):
        if found.is_symlink() and not any(found.resolve().is_relative_to(root) for root in allowed):
            raise ValidationError(f"{found} is a link that leads out of the folders pages may read.")
        if not (found.is_file() or found.is_dir()):
            raise ValidationError(f"{found} is not a file.")
