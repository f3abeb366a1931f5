"""Rows and real files from a tiny model to a harvested view, for the tests of the pages and jobs of features and steering."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_models import RESID

DEAD = 7  # a feature whose bias never lets it fire


@dataclass
class Rows:
    """One ready row of each kind, and the data folder their files lie in."""

    owner: Any
    model: Any
    corpus: Any
    capture: Any
    sae: Any
    data: Path


def build_files(folder: Path, model_dir: Path) -> Path:
    """A capture of the tiny model and an SAE with random weights, made once for all tests: <folder>/capture and /sae."""
    import torch

    from saes.numerics.formats import save_sae
    from saes.numerics.lm import load_lm
    from tests.conftest import TEXT
    from tests.tiny_models import tiny_sae
    from training.numerics.capture import capture
    from training.numerics.tokens import TokenPolicy

    words = TEXT.split()
    texts = [" ".join(words[i:] + words[:i]) for i in range(30)]
    policy = TokenPolicy(context_length=32, prepend_bos=True)
    capture(load_lm(model_dir), texts, [RESID, "blocks.0.attn.hook_z"], folder / "capture", policy=policy)
    sae = tiny_sae("topk", model_name="tiny-llama")
    with torch.no_grad():
        sae.b_enc[DEAD] = -1e6
    save_sae(sae, folder / "sae")
    return folder


def build_rows(files: Path, model_dir: Path, data: Path, owner: Any) -> Rows:
    """The rows, their folders linked into `data` (settings.DATA_DIR of the test)."""
    from django.utils import timezone

    from saes.models import SAE, LanguageModel
    from training.models import Capture, Corpus, Run

    now = timezone.now()
    model = LanguageModel.objects.create(
        name="tiny-llama", source="folder", location=str(model_dir), owner=owner, ready_at=now, n_layers=2, d_model=32,
        context_length=256, hook_points=[
            {"name": RESID, "module": "model.layers.1", "side": "out", "d": 32, "layer": 1},
            {"name": "blocks.0.attn.hook_z", "module": "model.layers.0.self_attn.o_proj", "side": "in", "d": 32, "layer": 0},
            {"name": "blocks.1.mlp.hook_post", "module": "model.layers.1.mlp.down_proj", "side": "in", "d": 64, "layer": 1},
        ],
    )  # fmt: skip
    corpus = Corpus.objects.create(name="sentences", source="text", location="text", owner=owner, ready_at=now)
    manifest = json.loads((files / "capture" / "manifest.json").read_text())
    capture = Capture.objects.create(
        name="sentences, layer 1", model=model, corpus=corpus, hook_names=[RESID, "blocks.0.attn.hook_z"], owner=owner,
        context_length=32, manifest=manifest, n_tokens=manifest["n_tokens"], ready_at=now,
    )  # fmt: skip
    _link(capture.folder, files / "capture")
    sae = SAE.objects.create(
        name="tiny-sae", source="trained", model=model, model_name=model.name, hook_name=RESID, layer=1, k=6,
        architecture="topk", d_in=32, d_sae=96, path="saes/tiny", owner=owner, ready_at=now,
    )  # fmt: skip
    _link(sae.files, files / "sae")
    Run.objects.create(name="run", capture=capture, hook_name=RESID, architecture="topk", sae=sae, ready_at=now)
    return Rows(owner, model, corpus, capture, sae, data)


@contextmanager
def rows_of_the_run(files: Path, model_dir: Path, owner: Any) -> Iterator[Rows]:
    """The rows, their folders linked into the data folder of the test run, where workers find them."""
    from django.conf import settings

    data = Path(settings.DATA_DIR)
    sae = data / "saes" / "tiny"
    sae.unlink(missing_ok=True)
    shutil.rmtree(data / "captures", ignore_errors=True)  # an earlier run's: row numbers begin anew with every database
    rows = build_rows(files, model_dir, data, owner)
    yield rows
    sae.unlink(missing_ok=True)
    rows.capture.folder.unlink(missing_ok=True)


def _link(link: Path, target: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(target)


def harvested(rows: Rows, run_job: Callable[[Any], Any]) -> Any:
    """A view of the SAE's features, made by its job."""
    from concepts.models import FeatureView

    view = FeatureView.objects.create(name="view", sae=rows.sae, capture=rows.capture, owner=rows.owner, k=12)
    job = run_job(view.start(rows.owner))
    assert job.state == "done", job.traceback
    view.refresh_from_db()
    return view


@pytest.fixture(scope="session")
def steering_files(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_files(tmp_path_factory.mktemp("steering"), tiny_model_dir)


@pytest.fixture
def rows(db: None, settings: Any, tmp_path: Path, steering_files: Path, tiny_model_dir: Path, user_of: Any) -> Rows:
    settings.DATA_DIR = tmp_path / "data"
    return build_rows(steering_files, tiny_model_dir, settings.DATA_DIR, user_of("researcher"))


@pytest.fixture
def view(rows: Rows, run_job: Callable[[Any], Any]) -> Any:
    return harvested(rows, run_job)
