"""Weights in npz and torch files: read with limits, without ever unpickling an object.

The directory of a zip is held against the file before anything in it is touched; what a header claims is held against the
bytes that are there before memory is asked for. Tensors are memory-mapped where they lie so that they can be, and otherwise
read or inflated one at a time, in small steps.
"""

import zipfile
import zlib
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saes.numerics.formats.files import FormatError, refuse_impostors

MAX_PICKLE_BYTES = 16_000_000  # data.pkl describes tensors; their numbers lie beside it
SMALL = 16 << 20  # below this a member may be deflated as far as it goes: a bias of zeros is
MAX_RATIO = 32  # weights hardly shrink at all
CHUNK = 1 << 24
ALIGNED = 8  # bytes: where numbers may begin to be used from a map
LOCAL_HEADER = 30  # bytes of a zip member's own header before its name


class Member(NamedTuple):
    """An array of an npz: where its numbers are and what they are."""

    info: zipfile.ZipInfo
    header: int  # bytes before the numbers
    dtype: np.dtype
    shape: tuple[int, ...]
    fortran: bool


# -- npz ---------------------------------------------------------------------------------------------------------------
def npz_members(path: Path) -> dict[str, Member]:
    """The arrays of an npz by name, from its directory and their headers; no numbers are read.

    Raises FormatError for a file that is missing, cut or no npz, and for members that are not plain arrays, do not have
    the size their header says, or would inflate to more than weights can.
    """
    with _opened(path, "an npz file") as archive:
        members: dict[str, Member] = {}
        for info in archive.infolist():
            name = _plain_name(path, info)
            if name in members:
                raise FormatError(f"{path.name} holds {name!r:.60} twice.")
            _refuse_bomb(path, info)
            members[name] = _member(path, archive, info)
        return members


def read_npz(path: Path) -> dict[str, Tensor]:
    """The arrays of an npz as tensors, memory-mapped where they are stored as they are. Raises FormatError."""
    members = npz_members(path)
    try:
        return {name: _array(path, member) for name, member in members.items()}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, TypeError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{path.name} is damaged or incomplete ({error}).") from error


def _plain_name(path: Path, info: zipfile.ZipInfo) -> str:
    name = info.filename
    if not name.endswith(".npy") or "/" in name or "\\" in name or name.startswith("."):
        raise FormatError(f"{path.name} holds {name!r:.60}, which is not a plain array of an npz file.")
    return name.removesuffix(".npy")


def _refuse_bomb(path: Path, info: zipfile.ZipInfo) -> None:
    if info.flag_bits & 1:
        raise FormatError(f"{info.filename} in {path.name} is encrypted.")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise FormatError(f"{info.filename} in {path.name} is compressed in a way that is not read here.")
    if info.file_size > SMALL and info.file_size > MAX_RATIO * info.compress_size:
        raise FormatError(
            f"{info.filename} in {path.name} would inflate from {info.compress_size:,} to {info.file_size:,} bytes, "
            "which no weights do; it was not unpacked."
        )


def _member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Member:
    try:
        with archive.open(info) as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(file, max_header_size=10_000)
            header = file.tell()
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, TypeError, NotImplementedError) as error:
        raise FormatError(f"{info.filename} in {path.name} is damaged or no array ({error}).") from error
    if dtype.hasobject:
        raise FormatError(f"{info.filename} in {path.name} holds Python objects, not numbers; it was not opened.")
    if dtype.kind not in "fiub":
        raise FormatError(f"{info.filename} in {path.name} holds {dtype}, which are not numbers.")
    if header + prod(shape) * dtype.itemsize != info.file_size:
        raise FormatError(
            f"{info.filename} in {path.name} claims the shape {shape}, but holds {info.file_size - header:,} bytes."
        )
    return Member(info, header, dtype, shape, fortran)


def _array(path: Path, member: Member) -> Tensor:
    start = _start(path, member)
    stored = member.info.compress_type == zipfile.ZIP_STORED and bool(prod(member.shape))
    mappable = stored and (start + member.header) % ALIGNED == 0
    flat = _mapped(path, member, start) if mappable else _streamed(path, member)
    array = flat.reshape(member.shape[::-1]).T if member.fortran else flat.reshape(member.shape)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return torch.from_numpy(array)


def _start(path: Path, member: Member) -> int:
    """Where in the file a member begins, after its own header."""
    with path.open("rb") as file:
        file.seek(member.info.header_offset)
        local = file.read(LOCAL_HEADER)
    names = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    return member.info.header_offset + LOCAL_HEADER + names


def _mapped(path: Path, member: Member, start: int) -> np.ndarray:
    """The numbers of a stored member, from the file itself. Copy-on-write: the file is never changed."""
    if start + member.info.file_size > path.stat().st_size:
        raise FormatError(f"{path.name} is damaged or incomplete: {member.info.filename} reaches beyond its end.")
    whole = np.memmap(path, dtype=np.uint8, mode="c", offset=start, shape=(member.info.file_size,))
    crc = 0
    for place in range(0, len(whole), CHUNK):
        crc = zlib.crc32(whole[place : place + CHUNK].data, crc)
    if crc != member.info.CRC:
        raise FormatError(f"{path.name} is damaged: {member.info.filename} does not have its checksum.")
    return whole[member.header :].view(member.dtype)


def _streamed(path: Path, member: Member) -> np.ndarray:
    """The numbers of a member that is deflated, or does not lie where numbers can be used as they are."""
    flat = np.empty(prod(member.shape), dtype=member.dtype)
    rest = flat.view(np.uint8).data if flat.size else memoryview(b"")
    with zipfile.ZipFile(path) as archive, archive.open(member.info) as file:
        file.read(member.header)
        while len(rest):
            part = file.read(min(len(rest), CHUNK))
            if not part:
                raise FormatError(f"{path.name} is damaged or incomplete: {member.info.filename} ends early.")
            rest[: len(part)] = part
            rest = rest[len(part) :]
        file.read(1)  # its end: the checksum is looked at there
    return flat


# -- torch -------------------------------------------------------------------------------------------------------------
def read_torch(path: Path) -> dict[str, Any]:
    """The dict in a file of torch.save: tensors, numbers and dicts of them, the tensors memory-mapped.

    Only torch's weights-only loader ever sees the file, and only after its directory was found to be that of a torch
    file. Raises FormatError, also for a tensor that is larger than the numbers stored for it.
    """
    _check_torch_zip(path)
    try:
        value = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch has no kind of error of its own for a file it does not read
        if "Unsupported" in str(error) or "GLOBAL" in str(error):
            raise FormatError(
                f"{path.name} holds more than tensors: opening it would run code that came with it, so it was not opened."
            ) from error
        raise FormatError(f"{path.name} cannot be read as weights ({_first_line(error)}).") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path.name} must hold a dict of tensors, but holds a {type(value).__name__}.")
    for name, tensor in _tensors_within(value):
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise FormatError(f"{name:.60} in {path.name} is not a plain tensor.")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise FormatError(f"{name:.60} in {path.name} claims more numbers than are stored for it.")
    return value


def read_state(path: Path) -> dict[str, Tensor]:
    """As `read_torch`, for a file that must hold named tensors and nothing else."""
    value = read_torch(path)
    if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items()):
        raise FormatError(f"{path.name} must hold tensors by name, but holds {', '.join(map(str, value))[:120]}.")
    return value


def _check_torch_zip(path: Path) -> None:
    with _opened(path, "a torch file of the zip kind (torch.save since version 1.6)") as archive:
        infos = archive.infolist()
        tops = {info.filename.partition("/")[0] for info in infos}
        pickles = [info for info in infos if info.filename.endswith("/data.pkl") and info.filename.count("/") == 1]
        if len(tops) != 1 or len(pickles) != 1:
            raise FormatError(f"{path.name} is a zip file, but not one of torch: it has no data.pkl.")
        if pickles[0].file_size > MAX_PICKLE_BYTES:
            raise FormatError(f"{path.name} has a data.pkl of {pickles[0].file_size:,} bytes, which no SAE has.")
        for info in infos:
            parts = info.filename.split("/")
            if ".." in parts or "\\" in info.filename or info.filename.startswith("/"):
                raise FormatError(f"{path.name} holds {info.filename!r:.60}, which is not a record of a torch file.")
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.file_size != info.compress_size:
                raise FormatError(f"{path.name} holds a compressed record, which torch does not write.")


def _tensors_within(value: Any, name: str = "it") -> Iterator[tuple[str, Tensor]]:
    level = [(name, value)]
    while level:
        name, value = level.pop()
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, Mapping):
            level += [(str(key), child) for key, child in value.items()]
        elif isinstance(value, list | tuple):
            level += [(name, child) for child in value]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__


class _opened:
    """A zip file that is there and whole, as a context."""

    def __init__(self, path: Path, kind: str) -> None:
        self.path, self.kind = path, kind

    def __enter__(self) -> zipfile.ZipFile:
        name = self.path.name
        if not self.path.is_file():
            raise FormatError(f"{name} is missing.")
        with self.path.open("rb") as file:
            start = file.read(64)
        if not start:
            raise FormatError(f"{name} is empty.")
        refuse_impostors(name, start)
        try:
            self.archive = zipfile.ZipFile(self.path)
        except (zipfile.BadZipFile, ValueError, NotImplementedError, UnicodeDecodeError) as error:
            if start.startswith(b"PK"):
                raise FormatError(f"{name} is damaged or incomplete: it starts as {self.kind}, but was cut.") from error
            raise FormatError(f"{name} is not {self.kind}.") from error
        held = sum(info.compress_size for info in self.archive.infolist())
        if held > self.path.stat().st_size:
            self.archive.close()
            raise FormatError(f"{name} is damaged: its members are larger than the file.")
        return self.archive

    def __exit__(self, *_: object) -> None:
        self.archive.close()
