"""One file that holds the whole instance: the database, the key that opens its secrets and, where asked for, all files.

A backup is a tar that any tar program opens:

    database.dump      what pg_dump -Fc writes: one snapshot, taken while the site runs
    secret_key         of the data folder; without it sessions end and Hub tokens have to be given again
    data/…             files of the data folder, with `files`; they come after the snapshot, so that every row has its own
    manifest.json      written last: versions, migrations, SHA-256 and size of each entry, and what was left out

Restoring looks at all of it before it touches anything, and replaces the database in one transaction; folders of files
follow by renaming.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import IO, Any

from django.conf import settings
from django.db import connection
from django.db.backends.postgresql.client import DatabaseClient
from django.db.migrations.recorder import MigrationRecorder

import saehub
from saehub.disk import free_bytes
from saehub.figures import bytes_text
from saehub.postgres import program

MANIFEST, DUMP, KEY, FILES = "manifest.json", "database.dump", "secret_key", "data"
MADE_AGAIN = {"postgres", "kernels", "tmp", "static", "exports", "import", KEY}  # or dumped, or not ours
NEW_SETTING = b"SET transaction_timeout = 0;"
# As in a database that was made just now: else the next dump would hold the schema itself, and not restore.
FRESH = (
    "DROP SCHEMA public CASCADE; CREATE SCHEMA public; ALTER SCHEMA public OWNER TO pg_database_owner;"
    " GRANT USAGE ON SCHEMA public TO PUBLIC; COMMENT ON SCHEMA public IS 'standard public schema';"
)
BLOCK = 1 << 20
Tick = Callable[[int], None]  # hears of bytes


class BackupError(Exception):
    """What cannot be backed up or restored, in one sentence."""


@dataclass
class Manifest:
    """What a backup says of itself."""

    made_at: str
    version: str
    postgres: str
    migrations: list[str]
    files: bool
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)  # {name: {bytes, sha256}}
    left_out: dict[str, int] = field(default_factory=dict)  # {folder of the data folder: bytes}, without `files`

    @property
    def size(self) -> int:
        return sum(entry["bytes"] for entry in self.entries.values())

    @property
    def n_files(self) -> int:
        return sum(name.startswith(f"{FILES}/") for name in self.entries)


# -- making one --------------------------------------------------------------------------------------------------------
def back_up(target: Path, *, files: bool = False, tick: Tick = lambda n: None) -> Manifest:
    """Write a backup, whole or not at all. Raises BackupError, also where a file of that name is there."""
    target = target.absolute()
    if target.exists():
        raise BackupError(f"{target} is there already; a backup never replaces a file.")
    if files and target.is_relative_to(settings.DATA_DIR.absolute()):
        raise BackupError(
            f"A backup of all files cannot lie among them; choose a place outside of {settings.DATA_DIR}."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    try:
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:  # it holds secrets
            found = _write(out, target.parent, files, tick)
            os.fsync(out.fileno())
        partial.rename(target)
    except OSError as error:
        raise BackupError(f"{target} cannot be written ({error.strerror}).") from error
    finally:
        partial.unlink(missing_ok=True)
    return found


def _write(out: IO[bytes], beside: Path, files: bool, tick: Tick) -> Manifest:
    found = Manifest(
        datetime.now(UTC).isoformat(timespec="seconds"), saehub.__version__, _server_version(), _applied(), files
    )
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        with tempfile.NamedTemporaryFile(dir=beside, prefix=".dump-") as dump:
            _run("pg_dump", ["-Fc", "--no-owner", "--no-privileges", "-f", dump.name], "The database was not dumped")
            _add(archive, found, DUMP, Path(dump.name), tick)
        key = settings.DATA_DIR / KEY
        if key.is_file():
            _add(archive, found, KEY, key, tick)
        for path in data_files():
            name = path.relative_to(settings.DATA_DIR)
            if files:
                _add(archive, found, f"{FILES}/{name.as_posix()}", path, tick)
            else:
                place = "/".join(name.parts[:2])
                found.left_out[place] = found.left_out.get(place, 0) + path.stat().st_size
        said = json.dumps(vars(found), indent=1).encode()
        info = tarfile.TarInfo(MANIFEST)
        info.size = len(said)
        with tempfile.TemporaryFile() as file:
            file.write(said)
            file.seek(0)
            archive.addfile(info, file)
    return found


def data_files() -> Iterator[Path]:
    """Files of the data folder that cannot be made again from the database or by asking once more."""
    for top in sorted(settings.DATA_DIR.iterdir()):
        if top.is_dir() and top.name not in MADE_AGAIN and not top.name.startswith("."):
            yield from (path for path in sorted(top.rglob("*")) if path.is_file() and not path.is_symlink())


def _add(archive: tarfile.TarFile, found: Manifest, name: str, path: Path, tick: Tick) -> None:
    """Append a file, hashed as it is read. One that went since it was listed is passed over: no row of now needs it."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        info = archive.gettarinfo(arcname=name, fileobj=file)
        reader = _Hashing(file, tick)
        archive.addfile(info, reader)  # type: ignore[arg-type]  # all it does is read
    found.entries[name] = {"bytes": info.size, "sha256": reader.hash.hexdigest()}


class _Hashing:
    """A file whose bytes are hashed as they are read."""

    def __init__(self, file: IO[bytes], tick: Tick) -> None:
        self.file, self.tick, self.hash = file, tick, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        block = self.file.read(size)
        self.hash.update(block)
        self.tick(len(block))
        return block


def _server_version() -> str:
    with connection.cursor() as cursor:
        cursor.execute("SHOW server_version")
        return str(cursor.fetchone()[0])


def _applied() -> list[str]:
    return sorted(f"{app}.{name}" for app, name in MigrationRecorder(connection).applied_migrations())


# -- bringing one back ----------------------------------------------------------------------------------------------------
@contextmanager
def opened(path: Path) -> Iterator[tuple[tarfile.TarFile, Manifest]]:
    """A backup and what it says of itself. Raises BackupError for a file that is none, or was cut."""
    with ExitStack() as stack:
        try:
            archive = stack.enter_context(tarfile.open(path, "r:"))
            with _member(archive, MANIFEST) as file:
                found = Manifest(**json.load(file))
        except (OSError, tarfile.TarError, TypeError, ValueError) as error:
            raise BackupError(f"{path} is no whole backup of SAEHub ({str(error)[:120]}).") from error
        yield archive, found


def check(archive: tarfile.TarFile, found: Manifest, known: set[str], tick: Tick = lambda n: None) -> None:
    """Hold every entry against its checksum and the migrations against `known` ones. Raises BackupError."""
    newer = sorted(set(found.migrations) - known)
    if newer:
        raise BackupError(
            f"This backup is of a newer SAEHub than {saehub.__version__}: it has the migration {newer[0]}."
        )
    if DUMP not in found.entries:
        raise BackupError("This backup holds no database.")
    for name, entry in found.entries.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise BackupError(f"{name[:80]} in this backup leads out of the data folder.")
        with _member(archive, name) as file:
            reader = _Hashing(file, tick)
            while reader.read(BLOCK):
                pass
        if reader.hash.hexdigest() != entry["sha256"]:
            raise BackupError(f"{name[:80]} in this backup is damaged: it does not have its checksum.")


@contextmanager
def _member(archive: tarfile.TarFile, name: str) -> Iterator[IO[bytes]]:
    try:
        info = archive.getmember(name)
    except KeyError:
        raise BackupError(f"This backup lacks {name[:80]}.") from None
    file = archive.extractfile(info) if info.isreg() else None
    if file is None:
        raise BackupError(f"{name[:80]} in this backup is no file.")
    with file:
        yield file


def restore(archive: tarfile.TarFile, found: Manifest, tick: Tick = lambda n: None) -> None:
    """Put the database in place of the one that is there, in one transaction; then files and key.

    What was checked by `check`. With files, the folders that the backup holds (`captures`, `sae`, …) take the place of
    those here. Raises BackupError; all is then as it was.
    """
    _require_space(found)
    with tempfile.TemporaryDirectory(dir=settings.DATA_DIR, prefix=".restore-") as folder:
        staged = Path(folder)
        for name in found.entries:
            _unpack(archive, name, staged / name, tick)
        script = staged / "script.sql"
        plain = ["--no-owner", "--no-privileges", "-f", str(script), str(staged / DUMP)]
        _run("pg_restore", plain, "The dump cannot be read", connects=False)
        _for_older_servers(script)
        once = ["-X", "-q", "-v", "ON_ERROR_STOP=1", "--single-transaction", "-o", os.devnull]
        _run("psql", [*once, "-c", FRESH, "-f", str(script)], "The database was not restored, and is as it was")
        if (staged / FILES).is_dir():
            for top in (staged / FILES).iterdir():
                here = settings.DATA_DIR / top.name
                if here.exists():
                    here.rename(staged / f"before-{top.name}")
                top.rename(here)
        if KEY in found.entries:
            (staged / KEY).replace(settings.DATA_DIR / KEY)


def _for_older_servers(script: Path) -> None:
    """Leave out what servers before 17 do not know, and what is as it is by itself."""
    with script.open("r+b") as file:
        head = file.read(8192)
        file.seek(0)
        file.write(head.replace(NEW_SETTING, b"-" * len(NEW_SETTING)))


def _unpack(archive: tarfile.TarFile, name: str, target: Path, tick: Tick) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with _member(archive, name) as file, target.open("wb") as out:
        while block := file.read(BLOCK):
            out.write(block)
            tick(len(block))
    target.chmod(archive.getmember(name).mode & 0o777)


def _require_space(found: Manifest) -> None:
    free = free_bytes()
    if found.size > free:
        raise BackupError(f"This backup holds {bytes_text(found.size)} and the disk has {bytes_text(free)} to spare.")


def others_connected() -> int:
    """How many other connections the database has: of a site and workers that run."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            " AND backend_type = 'client backend'"
        )
        return int(cursor.fetchone()[0])


def holds_something() -> bool:
    """Whether somebody has an account in the database: it is then not the empty one of a new machine."""
    tables = connection.introspection.table_names()
    if "auth_user" not in tables:
        return False
    with connection.cursor() as cursor:
        cursor.execute("SELECT EXISTS (SELECT 1 FROM auth_user)")
        return bool(cursor.fetchone()[0])


def absent(found: Manifest) -> dict[str, int]:
    """Of the folders that were left out of a backup, those that are not here either."""
    return {name: size for name, size in found.left_out.items() if not (settings.DATA_DIR / name).exists()}


def _run(name: str, args: list[str], failed: str, connects: bool = True) -> None:
    """One of PostgreSQL's programs on our database. Raises BackupError with the first line that it says."""
    where, env = DatabaseClient.settings_to_cmd_args_env(connection.settings_dict, [])
    *to, database = where[1:]
    call = [program(name), *to, "-d", database, *args] if connects else [program(name), *args]
    done = subprocess.run(call, env=os.environ | (env or {}), capture_output=True, text=True)
    if done.returncode:
        lines = (
            [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines() or [""]
        )
        raise BackupError(f"{failed}: {lines[0].strip()[:300]}")
