"""An SAE on the Hub, looked at without its weights: its config, and its tensors' shapes by requests for a few kilobytes.

*.safetensors   8 bytes give the length of the header, the header is JSON: {name: {dtype, shape, data_offsets}}
*.npz           a zip: its directory stands at the end, each array's shape in the first bytes of its member
*.pt            a pickle: nothing of it is read; its shapes are known once it is downloaded
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from django.utils import timezone

from saehub.jobs.progress import JobError, Progress
from saehub.plain import plain
from saes import hub
from saes.downloads import files_of
from saes.models import SAE
from saes.numerics.formats.files import FormatError
from saes.numerics.formats.yaml_files import parse_yaml
from saes.same_weights import told

LARGEST_HEADER = 16 * 1024 * 1024
LARGEST_CONFIG = 1024 * 1024
LARGEST_ARRAY_HEADER = 16 * 1024  # of a file of an npz; NumPy itself reads headers up to 10,000 characters
MOST_MEMBERS = 256
BLOCK = 64 * 1024
Read = Callable[[int, int], bytes]  # bytes [start, end) of a file

ENCODER = ("W_enc", "w_enc", "W_E", "encoder.weight", "encoder_linear.weight", "model.encoder.weight", "model.W_enc")
ENCODER_BIAS = (
    "b_enc", "b_E", "encoder.bias", "encoder_linear.bias", "b_mag", "mag_bias", "threshold", "log_threshold",
    "log_jumprelu_threshold", "model.encoder.bias", "model.b_enc",
)  # fmt: skip
DECODER = ("W_dec", "w_dec", "W_D", "D", "decoder.weight")
DECODER_BIAS = ("b_dec", "b_D", "b", "bias", "decoder.bias", "decoder_bias")


@dataclass
class Remote:
    """What was read: shapes by tensor, the config files merged, and the bytes a download has."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    size_bytes: int = 0
    unread: list[str] = field(default_factory=list)  # weights whose shapes cannot be read this way
    parts: int = 1  # files that each hold the same tensors, of another layer


def read_remote(progress: Progress, row: SAE, token: str | None = None) -> dict[str, Any]:
    """Fill the row's config, widths, architecture and size from its files on the Hub. Raises HubError and JobError."""
    if row.ready:
        return {"sae": row.pk, "d_in": row.d_in, "d_sae": row.d_sae, "architecture": row.architecture}
    if not row.repo_id:
        raise JobError(f"{row.name} has no repository to read from.", "Import its files instead.")
    progress.start(f"Asking the Hub for {row.repo_id}", unit="files")
    listing = hub.list_repository(row.repo_id, row.revision, token=token)
    files = files_of(row, listing)
    remote = Remote(size_bytes=sum(file.size for file in files))
    for done, file in enumerate(files):
        progress(done, len(files), file.path)
        look(remote, file.path, file.size, partial(_read, row.repo_id, file.path, listing.commit, token))
    fields = described(remote)
    for name, text in contradictions(remote, fields, row):
        progress.log(f"{name}: {text}")
    fields["sha256"] = told(files)
    fields = {name: value for name, value in fields.items() if value not in (None, "")}
    tensors = {name: list(shape) for name, shape in remote.shapes.items()}
    SAE.objects.filter(pk=row.pk, ready_at=None).update(
        **plain(fields),
        config=plain(remote.config) | {"tensors": tensors},
        size_bytes=remote.size_bytes,
        read_at=timezone.now(),
    )
    for path in remote.unread:
        progress.log(f"{path} is a pickle, of which nothing is read before it is downloaded and checked.")
    return {"sae": row.pk, "commit": listing.commit, "bytes": remote.size_bytes, "tensors": len(tensors)} | fields


def _read(repo_id: str, path: str, commit: str, token: str | None, start: int, end: int) -> bytes:
    return hub.read_range(repo_id, path, commit, start, end, token) if end > start else b""


def look(remote: Remote, path: str, size: int, read: Read) -> None:
    """Add what one file says. Raises JobError naming the file and what is wrong with it."""
    if path.endswith(".safetensors"):
        shapes = safetensors_shapes(path, size, read)
        again = {name for name in shapes if name in remote.shapes}  # one file a layer, each with the same names
        remote.parts += bool(again)
        remote.shapes |= {f"{name}_{remote.parts - 1}" if name in again else name: at for name, at in shapes.items()}
    elif path.endswith(".npz"):
        remote.shapes |= npz_shapes(path, size, read)
    elif path.endswith((".pt", ".pth", ".bin", ".th")):
        remote.unread.append(path)
    elif path.endswith((".json", ".yaml", ".yml")) and size <= LARGEST_CONFIG:
        said = _parsed(path, read(0, size))
        remote.config |= {key: value for key, value in said.items() if key not in remote.config}


def safetensors_shapes(path: str, size: int, read: Read) -> dict[str, tuple[int, ...]]:
    """Shapes in a safetensors header; one that claims more than the file holds is refused."""
    begin = read(0, 8)
    length = int.from_bytes(begin, "little") if len(begin) == 8 else 0
    if not 2 <= length <= min(LARGEST_HEADER, size - 8):
        raise JobError(f"{path} does not begin like a safetensors file.")
    try:
        header = json.loads(read(8, 8 + length))
        return {str(name): _shape(path, entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise JobError(f"{path} has a safetensors header that cannot be read.") from None


def npz_shapes(path: str, size: int, read: Read) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays in an npz, from its directory and the first bytes of each member."""
    try:
        with zipfile.ZipFile(io.BufferedReader(_Ranged(read, size), BLOCK)) as archive:
            names = [name for name in archive.namelist() if name.endswith(".npy")]
            if not names or len(names) > MOST_MEMBERS:
                raise JobError(f"{path} holds {len(names)} arrays, which is not what an SAE's npz has.")
            return {name.removesuffix(".npy"): _npy_shape(path, archive, name) for name in names}
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, OSError) as error:
        if isinstance(error, hub.HubError):
            raise
        raise JobError(f"{path} is not an npz whose shapes can be read.") from None


def _npy_shape(path: str, archive: zipfile.ZipFile, name: str) -> tuple[int, ...]:
    with archive.open(name) as member:  # of a header that claims to be longer no more is asked for
        start = io.BytesIO(member.read(LARGEST_ARRAY_HEADER))
    version = np.lib.format.read_magic(start)
    header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if header is None:
        raise JobError(f"{path}: {name} is of a kind of npy file that is not known here.")
    shape, _, dtype = header(start)
    if dtype.hasobject:
        raise JobError(f"{path}: {name} holds Python objects, which are never read.")
    return _shape(path, list(shape))


def _shape(path: str, given: Any) -> tuple[int, ...]:
    if not isinstance(given, list) or not all(type(n) is int and 0 <= n < 2**40 for n in given) or len(given) > 8:
        raise JobError(f"{path} names a shape that no tensor has.")
    return tuple(given)


class _Ranged(io.RawIOBase):
    """A file on the Hub as something that can be read and sought in."""

    def __init__(self, read: Read, size: int) -> None:
        self._read, self._size, self._at = read, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._size)
        data = self._read(self._at, end) if end > self._at else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _parsed(path: str, data: bytes) -> dict[str, Any]:
    """A config file as a mapping; what is none says nothing about an SAE."""
    try:
        said = json.loads(data) if path.endswith(".json") else parse_yaml(path, data)
        json.dumps(said, allow_nan=False)  # it is kept as JSON
    except FormatError as error:
        raise JobError(str(error)) from None
    except (ValueError, RecursionError):
        raise JobError(f"{path} is not a config that can be read.") from None
    return said if isinstance(said, dict) else {}


# -- what shapes and config say ----------------------------------------------------------------------------------------
def described(remote: Remote) -> dict[str, Any]:
    """Fields of the row. Widths come from shapes alone; the rest from the config where it says so."""
    config = _flat(remote.config)
    d_in, d_sae = (size * remote.parts if size else None for size in widths(remote.shapes))
    k = config.get("k")
    return {
        "d_in": d_in,
        "d_sae": d_sae,
        "k": k if type(k) is int and k > 0 else None,
        "architecture": architecture(remote.shapes, config),
        "model_name": _text(config.get("model_name") or config.get("lm_name"), 120),
        "hook_name": _text(config.get("hook_name") or config.get("hook_point"), 200),
    }


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with what SAELens 6 keeps in `metadata` and dictionary_learning in `trainer` on one level."""
    inner = [config.get(key) for key in ("metadata", "trainer", "activation_fn_kwargs")]
    flat = {key: value for part in inner if isinstance(part, dict) for key, value in part.items()}
    return flat | dict(config)


def _text(value: Any, most: int) -> str:
    return value[:most] if isinstance(value, str) else ""


def _find(shapes: Mapping[str, tuple[int, ...]], names: tuple[str, ...], ndim: int) -> tuple[int, ...] | None:
    """Shape of the first of these tensors; a number behind the name (of a layer) does not matter."""
    by_name = {
        name.rpartition("_")[0] if name.rpartition("_")[2].isdecimal() else name: shape
        for name, shape in shapes.items()
    }
    return next((by_name[name] for name in names if len(by_name.get(name, ())) == ndim), None)


def widths(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int | None, int | None]:
    """(d_in, d_sae). Which way a matrix lies differs between formats, so the biases say which of its sides is which."""
    bias, out = _find(shapes, ENCODER_BIAS, 1), _find(shapes, DECODER_BIAS, 1)
    weight = _find(shapes, ENCODER, 2) or _find(shapes, DECODER, 2)
    if weight is None:
        return (out[0] if out else None), (bias[0] if bias else None)
    if bias and bias[0] in weight:
        return weight[1 - weight.index(bias[0])], bias[0]
    if out and out[0] in weight:
        return out[0], weight[1 - weight.index(out[0])]
    return None, None


def architecture(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> str:
    """As the config names it, else as the tensors show it; "" where neither does."""
    said = _text(config.get("architecture"), 40)
    if said == "standard" and str(config.get("activation_fn_str") or config.get("activation_fn")) == "topk":
        return "topk"
    if said and said != "jump_relu":
        return said
    names = set(shapes)
    if names & {"r_mag", "b_mag"}:
        return "gated"
    if config.get("type") == "crosscoder":
        return "causal_crosscoder"
    transcoder = config.get("type") in ("transcoder", "clt")
    jumprelu = any("threshold" in name for name in names)
    if jumprelu and transcoder:
        return "jumprelu_skip_transcoder" if "affine_skip_connection" in names else "jumprelu_transcoder"
    return "jumprelu" if jumprelu else ""


def contradictions(remote: Remote, fields: Mapping[str, Any], row: SAE) -> list[tuple[str, str]]:
    """Where config or name say another width than the shapes, which are the truth."""
    config = _flat(remote.config)
    found = []
    for name in ("d_in", "d_sae"):
        said = config.get(name)
        if isinstance(said, int) and fields[name] is not None and said != fields[name]:
            found.append((name, f"the config says {said}, the tensors have {fields[name]}"))
    if row.d_sae and fields["d_sae"] and row.d_sae != fields["d_sae"]:
        found.append(("d_sae", f"the name says {row.d_sae}, the tensors have {fields['d_sae']}"))
    return found
