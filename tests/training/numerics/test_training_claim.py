"""A folder has one writer at a time, also where the lock's file comes and goes."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import Any

import pytest

from training.numerics.claim import Claim, Taken


def test_one_at_a_time(tmp_path: Path) -> None:
    file = tmp_path / "folder" / ".lock"
    first = Claim(file)
    with pytest.raises(Taken):
        Claim(file)
    first.release()
    Claim(file).release()


def test_a_lock_whose_file_was_taken_away_meanwhile_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder removes the file between our opening it and our locking it: what we lock then is nobody's."""
    file = tmp_path / ".lock"
    lock, removed = fcntl.flock, []

    def flock(descriptor: int, operation: int) -> Any:
        if not removed:
            removed.append(file.unlink())
        return lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    held = Claim(file)
    assert file.exists()
    with pytest.raises(Taken):
        Claim(file)
    held.release()
