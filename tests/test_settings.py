"""The key that signs sessions: made once, whole, for its owner alone."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from saehub import settings


def test_the_secret_key_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "DATA_DIR", tmp_path)
    monkeypatch.delenv("SECRET_KEY", raising=False)
    made = settings._secret_key()
    assert len(made) > 50 and settings._secret_key() == made
    assert stat.S_IMODE((tmp_path / "secret_key").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["secret_key"]
    monkeypatch.setenv("SECRET_KEY", "given")
    assert settings._secret_key() == "given"


def test_a_first_start_that_is_killed_leaves_no_empty_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "DATA_DIR", tmp_path)
    monkeypatch.delenv("SECRET_KEY", raising=False)

    def killed(length: int) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("secrets.token_urlsafe", killed)
        settings._secret_key()
    assert list(tmp_path.iterdir()) == [] and settings._secret_key()


def test_of_two_first_starts_both_use_one_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "DATA_DIR", tmp_path)
    monkeypatch.delenv("SECRET_KEY", raising=False)
    begun = []

    def other_is_faster(length: int) -> str:
        if begun:
            return "first"
        begun.append(length)
        assert settings._secret_key() == "first"
        return "second"

    monkeypatch.setattr("secrets.token_urlsafe", other_is_faster)
    assert settings._secret_key() == "first"
