"""A backup and what comes back of it: with PostgreSQL's own programs, into another database of the same server."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.db import connection

from saehub import backups
from saehub.backups import BackupError, Manifest, back_up, check, opened
from saehub.postgres import program
from saes.models import SAE
from tests.conftest import ROOT, child_environment, make_user

OTHER = "restored_by_a_test"


@pytest.fixture
def other(committed: None, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a second instance: an empty database, an empty data folder."""
    url = child_environment()["DATABASE_URL"]
    name = connection.settings_dict["NAME"]
    with connection.cursor() as cursor:
        cursor.execute(f"DROP DATABASE IF EXISTS {OTHER}")
        cursor.execute(f"CREATE DATABASE {OTHER}")
    data = tmp_path / "other-data"
    data.mkdir()
    yield child_environment() | {"DATABASE_URL": url.replace(f"/{name}", f"/{OTHER}"), "SAEHUB_DATA": str(data)}
    with connection.cursor() as cursor:
        cursor.execute(f"DROP DATABASE {OTHER} WITH (FORCE)")


def run(environment: dict[str, str], *call: str) -> tuple[int, str]:
    """(exit code, what it said, or else why not) of a `manage.py` process."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "manage.py"), *call], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    return done.returncode, done.stdout if not done.returncode else done.stderr


def rows_of(database: str) -> str:
    """Tables, triggers and rows of a database as SQL, by pg_dump itself. Who waits for jobs in it is left out."""
    row = connection.settings_dict
    call = [program("pg_dump"), "-U", row["USER"], "-h", row["HOST"], "-p", str(row["PORT"]), "--no-owner", database]
    env = os.environ | {"PGPASSWORD": row["PASSWORD"] or ""}
    done = subprocess.run(call, env=env, capture_output=True, text=True, check=True)
    return re.sub(r"^\\(un)?restrict .*$", "", done.stdout, flags=re.M)


@pytest.fixture
def stocked(committed: None, settings: Any, tmp_path: Path) -> Path:
    """An instance with people, SAEs and files; its data folder."""
    settings.DATA_DIR = tmp_path / "data"
    for name, text in {
        "captures/1/manifest.json": "{}",
        "sae/file/2/cfg.json": "weights",
        "kernels/made-again": "x",
        "tmp/upload": "x",
        "secret_key": "sesame",
    }.items():
        path = settings.DATA_DIR / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    user = make_user("ada", "curator")
    for n in range(3):
        SAE.objects.create(name=f"o'clock \\ {n} €\n", source="hub", repo_id=f"org/{n}", owner=user, tags=["a", "ü"])
    return settings.DATA_DIR


def test_all_comes_back_on_another_machine(stocked: Path, other: dict[str, str], tmp_path: Path) -> None:
    target, there = tmp_path / "all.tar", Path(other["SAEHUB_DATA"])
    found = back_up(target, files=True)
    assert target.stat().st_mode & 0o777 == 0o600 and not list(tmp_path.glob(".*")), "secrets are not for everybody"
    assert set(found.entries) == {
        "database.dump",
        "secret_key",
        "data/captures/1/manifest.json",
        "data/sae/file/2/cfg.json",
    }
    code, said = run(other, "restore", str(target), "--dry-run")
    assert code == 0 and "The backup is whole" in said and "2 files beside the database" in said
    assert not (there / "captures").exists(), said
    (there / "captures" / "7").mkdir(parents=True)
    code, said = run(other, "restore", str(target))
    assert code == 0, said
    assert rows_of(OTHER) == rows_of(connection.settings_dict["NAME"])
    assert (there / "secret_key").read_text() == "sesame" and (there / "sae/file/2/cfg.json").read_text() == "weights"
    assert not (there / "captures/7").exists(), "files of rows that are gone are gone"
    assert (there / "captures/1/manifest.json").exists() and not list(there.glob(".restore-*"))
    # what was restored can be used, backed up and restored again
    assert run(other, "shell", "-v0", "-c", "from saes.models import SAE; print(SAE.objects.count())") == (0, "3\n")
    code, said = run(other, "backup", str(tmp_path), "--json")
    assert code == 0, said
    again = Path(json.loads(said)["file"])
    assert re.fullmatch(r"saehub-\d{4}-\d\d-\d\d-\d{6}\.tar", again.name)
    SAE.objects.all().delete()
    assert rows_of(OTHER) != rows_of(connection.settings_dict["NAME"])
    (there / "captures/1/manifest.json").unlink(), (there / "captures/1").rmdir()
    assert run(other, "restore", str(again)) == (
        2, "CommandError: The database here holds something; --replace puts the backup in its place.\n",
    )  # fmt: skip
    code, said = run(other, "restore", str(again), "--replace")
    assert code == 0 and "Not in the backup and not here: captures/1 (2 B)" in said and "sae/file" not in said, said
    assert run(other, "shell", "-v0", "-c", "from saes.models import SAE; print(SAE.objects.count())") == (0, "3\n")


def test_a_database_in_use_and_one_that_cannot_be_restored_stay_as_they_are(
    stocked: Path, other: dict[str, str], tmp_path: Path
) -> None:
    back_up(tmp_path / "good.tar")
    assert run(other, "restore", str(tmp_path / "good.tar"))[0] == 0
    before = rows_of(OTHER)
    with opened(tmp_path / "good.tar") as (archive, found):
        dump = archive.extractfile("database.dump")
        assert dump is not None
        data = bytearray(dump.read())
    data[len(data) // 2 :] = b"\0" * (len(data) - len(data) // 2)
    for name, content in {"cut": bytes(data), "no dump": b"none"}.items():
        crafted(tmp_path / f"{name}.tar", {"database.dump": content, "data/captures/9/x": b"x"}, found.migrations)
        code, said = run(other, "restore", "--replace", str(tmp_path / f"{name}.tar"))
        assert code == 2 and ("The dump cannot be read" in said or "is as it was" in said), said
        assert rows_of(OTHER) == before and not (Path(other["SAEHUB_DATA"]) / "captures").exists()
    row = connection.settings_dict
    held = [program("psql"), "-U", row["USER"], "-h", row["HOST"], "-p", str(row["PORT"]), "-d", OTHER, "-qAt"]
    with subprocess.Popen(held, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdin and client.stdout
        print("SELECT 'connected';", file=client.stdin, flush=True)
        assert client.stdout.readline() == "connected\n"
        code, said = run(other, "restore", "--replace", str(tmp_path / "good.tar"))
    assert code == 2 and "in use (1 connection); stop the site and its workers first" in said
    assert rows_of(OTHER) == before


def crafted(path: Path, content: dict[str, bytes], migrations: list[str], **manifest: Any) -> Path:
    """A backup as somebody might have changed it, with checksums that are right."""
    sums = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in content.items()}
    said = vars(Manifest("2026-11-23T00:00:00+00:00", "0.1.0", "18", migrations, True, sums)) | manifest
    with tarfile.open(path, "w") as archive:
        for name, data in {**content, "manifest.json": json.dumps(said).encode()}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def link(path: Path) -> None:
    """A backup in which an entry is a link to a file of this machine."""
    good = {"database.dump": {"bytes": 1, "sha256": "0" * 64}}
    said = json.dumps(vars(Manifest("", "0.1.0", "18", [], True, good))).encode()
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("database.dump")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)
        info = tarfile.TarInfo("manifest.json")
        info.size = len(said)
        archive.addfile(info, io.BytesIO(said))


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing": (lambda path: None, "is no whole backup"),
    "text": (lambda path: path.write_text("hello"), "is no whole backup"),
    "no manifest": (lambda path: tarfile.open(path, "w").close(), "lacks manifest.json"),
    "other manifest": (lambda path: crafted(path, {}, [], colour="red"), "is no whole backup"),
    "no database": (lambda path: crafted(path, {}, []), "holds no database"),
    "newer": (lambda path: crafted(path, {"database.dump": b"x"}, ["saes.9999_x"]), "newer SAEHub .* saes.9999_x"),
    "leads out": (
        lambda path: crafted(path, {"database.dump": b"x", "data/../../x": b"x"}, []),
        "leads out of the data",
    ),
    "absolute": (lambda path: crafted(path, {"database.dump": b"x", "/etc/x": b"x"}, []), "leads out of the data"),
    "damaged": (
        lambda path: crafted(path, {"database.dump": b"x"}, [], entries={"database.dump": {"bytes": 1, "sha256": "0"}}),
        "database.dump in this backup is damaged",
    ),
    "missing": (
        lambda path: crafted(path, {}, [], entries={"database.dump": {"bytes": 1, "sha256": "0"}}),
        "lacks database.dump",
    ),
    "link": (link, "database.dump in this backup is no file"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_backup_is_refused_before_anything_is_touched(name: str, tmp_path: Path) -> None:
    make, says = BAD[name]
    make(tmp_path / "x.tar")
    with pytest.raises(BackupError, match=says) as caught, opened(tmp_path / "x.tar") as (archive, found):
        check(archive, found, {"saes.0001_x"})
    assert str(caught.value).endswith(".")


@pytest.mark.django_db
def test_a_backup_that_cannot_be_written_leaves_nothing(settings: Any, tmp_path: Path, monkeypatch: Any) -> None:
    settings.DATA_DIR = tmp_path / "data"
    (settings.DATA_DIR / "captures").mkdir(parents=True)
    (tmp_path / "old.tar").write_text("kept")
    for target, flags, says in (
        (tmp_path / "old.tar", [], "never replaces a file"),
        (settings.DATA_DIR / "x.tar", ["--files"], "cannot lie among them"),
    ):
        with pytest.raises(CommandError, match=says) as caught:
            call_command("backup", str(target), *flags)
        assert caught.value.returncode == 2
    assert (tmp_path / "old.tar").read_text() == "kept"
    monkeypatch.setattr(backups, "program", lambda name: "/bin/false")
    with pytest.raises(BackupError, match="The database was not dumped"):
        back_up(tmp_path / "x.tar")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "old.tar"]
