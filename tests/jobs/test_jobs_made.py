"""Rows that jobs make: deleting one removes its files and those of what goes with it, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from concepts.models import FeatureView
from saes.models import SAE, LanguageModel
from training.models import Capture, Corpus

pytestmark = pytest.mark.django_db


def with_files(row: object, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "file").write_text("x")
    return folder


def test_deleting_an_sae_takes_its_views_along_but_not_the_capture() -> None:
    model = LanguageModel.objects.create(name="m", location="m")
    corpus = Corpus.objects.create(name="c", source="text", location="t")
    capture = Capture.objects.create(name="k", model=model, corpus=corpus)
    sae = SAE.objects.create(name="s", source="trained", path="sae/m/run-77", d_in=4, d_sae=8)
    view = FeatureView.objects.create(name="v", sae=sae, capture=capture)
    gone = [with_files(sae, sae.files), with_files(view, view.folder)]
    kept = with_files(capture, capture.folder)
    sae.delete()
    assert not any(folder.exists() for folder in gone)
    assert kept.exists() and not FeatureView.objects.exists()
    capture.delete()
    assert not kept.exists()


def test_files_outside_of_our_folder_are_never_removed(tmp_path: Path) -> None:
    sae = SAE.objects.create(name="s", source="file", path=str(tmp_path / "somebody's"), d_in=4, d_sae=8)
    folder = with_files(sae, sae.files)
    sae.delete()
    assert folder.exists()
