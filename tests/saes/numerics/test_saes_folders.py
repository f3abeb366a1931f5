"""A folder is written whole or not at all."""

import stat
from pathlib import Path

import pytest

from saes.numerics.folders import FolderError, whole_folder


def test_folder_appears_only_when_it_is_done(tmp_path):
    target = tmp_path / "a" / "b"
    with whole_folder(target) as partial:
        (partial / "x").write_text("1")
        assert not target.exists()
    assert (target / "x").read_text() == "1"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_nothing_is_left_of_a_folder_that_failed(tmp_path, error):
    with pytest.raises(type(error)), whole_folder(tmp_path / "b") as partial:
        (partial / "x").write_text("1")
        raise error
    assert not list(tmp_path.iterdir())


def test_full_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    with (
        pytest.raises(FolderError, match=r"The disk is full, so .* was not written"),
        whole_folder(tmp_path / "b") as partial,
    ):
        (partial / "x").write_text("1")
        with Path("/dev/full").open("wb", buffering=0) as full:  # a device on which every write says ENOSPC
            full.write(b"x")
    assert not list(tmp_path.iterdir())


def test_a_folder_within_a_folder_is_named_by_the_name_it_was_to_get(tmp_path):
    with (
        pytest.raises(FolderError) as error,
        whole_folder(tmp_path / "outer") as partial,
        whole_folder(partial / "inner") as within,
    ):
        (within / "x").write_text("1")
        with Path("/dev/full").open("wb", buffering=0) as full:
            full.write(b"x")
    assert str(error.value).startswith(f"The disk is full, so {tmp_path / 'outer'} was not written")
    assert not list(tmp_path.iterdir())


def test_path_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FolderError, match="cannot be written"), whole_folder(tmp_path / "file" / "b"):
        pass
    with pytest.raises(FolderError, match="already exists and is not a folder"), whole_folder(tmp_path / "file"):
        pass


def test_files_get_the_rights_of_their_folder(tmp_path):
    with whole_folder(tmp_path / "b") as partial:
        (partial / "x").touch(mode=0o600)
    folder = (tmp_path / "b").stat().st_mode
    assert stat.S_IMODE((tmp_path / "b" / "x").stat().st_mode) == stat.S_IMODE(folder) & 0o666
