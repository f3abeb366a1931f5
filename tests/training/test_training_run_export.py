"""Curves of runs as other tools read them."""

from __future__ import annotations

from pathlib import Path

import pytest
from django.core.management import CommandError, call_command

from saes.models import LanguageModel
from training.models import Capture, Corpus, Run, RunPoint

VALUES = {"loss": 0.5, "l0": 32.0, "dead": 3, "parts": {"aux": 0.25}, "held_out_explained_variance": None}


@pytest.fixture
def run(db: None) -> Run:
    model = LanguageModel.objects.create(name="tiny", source="folder", location="/nowhere")
    corpus = Corpus.objects.create(name="text", source="text", location="text.txt")
    capture = Capture.objects.create(
        name="capture", model=model, corpus=corpus, hook_names=["blocks.1.hook_resid_post"]
    )
    made = Run.objects.create(
        name="one", capture=capture, hook_name="blocks.1.hook_resid_post", architecture="topk",
        config={"d_sae": 64, "k": 8},
    )  # fmt: skip
    for step in (10, 20):
        RunPoint.objects.create(run=made, step=step, tokens=step * 512, values=VALUES | {"loss": 1 / step})
    return made


def test_tensorboard_reads_every_number_at_its_step(run: Run, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    call_command("export_run", str(run.pk), "--out", str(tmp_path))
    read = EventAccumulator(str(tmp_path / f"run-{run.pk}")).Reload()
    assert set(read.Tags()["scalars"]) == {
        "details/n_training_samples", "losses/overall_loss", "metrics/l0", "sparsity/dead_features", "losses/aux",
    }  # fmt: skip
    assert [(event.step, event.value) for event in read.Scalars("losses/overall_loss")] == [
        (10, pytest.approx(0.1)),
        (20, 0.05000000074505806),
    ]
    assert [event.value for event in read.Scalars("losses/aux")] == [0.25, 0.25]


def test_an_offline_run_of_wandb_is_written(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is optional, and not installed here")
    call_command("export_run", str(run.pk), "--to", "wandb", "--out", str(tmp_path))
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))


def test_what_cannot_be_exported_is_said(run: Run, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="There is no run 999"):
        call_command("export_run", "999", "--out", str(tmp_path / "out"))
    run.points.all().delete()
    with pytest.raises(CommandError, match="no points yet"):
        call_command("export_run", str(run.pk), "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
