"""Archives and folders that lie, lead out, are cut or too large: refused before anything is kept."""

from __future__ import annotations

import io
import shutil
import stat
import zipfile
from pathlib import Path
from typing import Any

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile

from saehub.jobs.models import Job, State
from saes import import_forms, uploads
from saes.models import SAE
from tests.sae_rows import files_below, write_sae
from tests.saes.importing import url, zipped

pytestmark = pytest.mark.django_db


def hostile(name: str, data: bytes = b"x", mode: int = 0) -> SimpleUploadedFile:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        archive.writestr(info, data)
    return SimpleUploadedFile("sae.zip", out.getvalue())


@pytest.mark.parametrize(
    "archive, part",
    [
        (hostile("../outside.txt"), "leads out of its folder"),
        (hostile("/etc/outside.txt"), "leads out of its folder"),
        (hostile("a/../../outside.txt"), "leads out of its folder"),
        (hostile("..\\outside.txt"), "leads out of its folder"),
        (hostile("C:/outside.txt"), "leads out of its folder"),
        (hostile("ü" * 150), "not a name files here can have"),
        (hostile("."), "leads out of its folder"),
        (hostile("link", b"/etc/passwd", stat.S_IFLNK | 0o777), "is a link or a device"),
        (hostile("x" * 500), "not a name files here can have"),
        (hostile("a\nb"), "not a name files here can have"),
        (SimpleUploadedFile("sae.zip", b"PK\x03\x04 nothing of the kind"), "cannot be read"),
        (SimpleUploadedFile("sae.zip", b""), "cannot be read"),
    ],
)
def test_hostile_archives_are_refused_before_anything_is_kept(
    archive: SimpleUploadedFile, part: str, client_of: Any, data_folder: Path
) -> None:
    archive.seek(0)
    response = client_of("researcher").post(url(), {"where": "upload", "files": archive})
    assert response.status_code == 422 and part in response.context["form"].errors["files"][0]
    assert not SAE.objects.exists() and not Job.objects.exists() and files_below(data_folder) == []


def test_a_name_that_is_a_file_and_a_folder_is_refused(client_of: Any, data_folder: Path) -> None:
    """Of an archive it would fail in the job, of a folder in the page itself."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("layer_1/cfg.json", b"{}")
        archive.writestr("Layer_1", b"x")
    tree = [SimpleUploadedFile("a", b"x"), SimpleUploadedFile("b", b"x")]
    for data in (
        {"where": "upload", "files": SimpleUploadedFile("sae.zip", out.getvalue())},
        {"where": "folder", "tree": tree, "paths": "top/a\ntop/a/b"},
    ):
        response = client_of("researcher").post(url(), data)
        assert response.status_code == 422 and "is a file and a folder at once" in response.content.decode()
    assert not SAE.objects.exists() and files_below(data_folder) == []


def test_an_archive_whose_unpacking_was_killed_at_its_last_step_is_whole(tmp_path: Path) -> None:
    given = write_sae(tmp_path / "given")
    (tmp_path / "sent").mkdir()
    (tmp_path / "sent" / "archive.zip").write_bytes(zipped(given).read())
    shutil.copy(tmp_path / "sent" / "archive.zip", tmp_path / "again.zip")
    files = uploads.unpack(tmp_path / "sent")
    shutil.copy(tmp_path / "again.zip", tmp_path / "sent" / "archive.zip")  # as if it had not been removed yet
    assert uploads.unpack(tmp_path / "sent") == files and files_below(files) == files_below(given)
    assert not (tmp_path / "sent" / "archive.zip").exists()


def test_nothing_is_left_of_files_that_could_not_be_kept(
    client_of: Any, tmp_path: Path, data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path, placed: Any) -> None:
        uploads.store(folder, placed)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(import_forms, "store", full)
    with pytest.raises(OSError, match="No space left"):
        client_of("researcher").post(url(), {"where": "upload", "files": zipped(write_sae(tmp_path / "given"))})
    assert not SAE.objects.exists() and files_below(data_folder) == []


def test_a_file_that_the_browser_names_as_the_folder_itself_is_refused(client_of: Any, tmp_path: Path) -> None:
    tree = [SimpleUploadedFile("params.npz", b"x"), SimpleUploadedFile("cfg.json", b"{}")]
    response = client_of("researcher").post(url(), {"where": "folder", "tree": tree, "paths": "./\ncfg.json"})
    assert response.status_code == 422 and "leads out of its folder" in response.context["form"].errors["tree"][0]


def test_an_archive_may_list_the_folder_it_was_made_in(bring: Any, tmp_path: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("./", b"")  # as bsdtar writes it
        for file in write_sae(tmp_path / "given").iterdir():
            archive.write(file, f"./{file.name}")
    row, job = bring(where="upload", files=SimpleUploadedFile("sae.zip", out.getvalue()))
    assert job.state == State.DONE and row.ready


def test_an_archive_that_unpacks_too_large_is_refused_by_what_it_declares(client_of: Any, settings: Any) -> None:
    settings.SAE_UPLOAD_LIMIT = 2**20
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("params.npz", b"\0" * 2**21)
    assert len(out.getvalue()) < 10_000
    response = client_of("researcher").post(
        url(), {"where": "upload", "files": SimpleUploadedFile("a.zip", out.getvalue())}
    )
    assert "Unpacked, the archive would be too large" in response.context["form"].errors["files"][0]
    plain = SimpleUploadedFile("params.npz", b"\0" * (2**20 + 1))
    response = client_of("researcher").post(url(), {"where": "upload", "files": plain})
    assert "This is more than 1 MB" in response.context["form"].errors["files"][0]


def test_an_archive_that_lies_about_its_size_unpacks_no_more_than_it_declares(bring: Any, data_folder: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cfg.json", b" " * 100_000)
    data = out.getvalue().replace((100_000).to_bytes(4, "little"), (10).to_bytes(4, "little"))
    _, job = bring(where="upload", files=SimpleUploadedFile("a.zip", data))
    assert job.state == State.FAILED and "cfg.json in the archive is damaged" in job.error
    assert not SAE.objects.exists() and files_below(data_folder) == []


def test_an_archive_of_too_many_files_is_refused(
    client_of: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("saes.uploads.MAX_FILES", 1)
    response = client_of("researcher").post(url(), {"where": "upload", "files": zipped(write_sae(tmp_path / "given"))})
    assert "holds 2 files; an SAE has at most 1" in response.context["form"].errors["files"][0]


def test_two_files_of_one_name_are_refused(client_of: Any) -> None:
    files = [SimpleUploadedFile(name, b"{}") for name in ("cfg.json", "CFG.json")]
    response = client_of("researcher").post(url(), {"where": "upload", "files": files})
    assert "Two files are named CFG.json" in response.context["form"].errors["files"][0]
