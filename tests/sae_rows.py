"""Rows that the tests of the registry's pages share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from django.utils import timezone

from saes.models import SAE, LanguageModel
from saes.numerics.architectures import build_sae
from saes.numerics.formats import save_sae
from saes.numerics.sae import SAEConfig


def a_model(name: str = "tiny", **fields: Any) -> LanguageModel:
    points = [
        {"name": f"blocks.{i}.hook_resid_{place}", "module": f"model.layers.{i}", "side": side, "d": 32, "layer": i}
        for i in range(2)
        for place, side in (("pre", "in"), ("post", "out"))
    ]
    given = {"source": "folder", "location": "/models/tiny", "hook_points": points, "ready_at": timezone.now()}
    return LanguageModel.objects.create(name=name, **given | fields)


def a_trained_sae(name: str = "one", **fields: Any) -> SAE:
    given = {
        "source": "trained", "model_name": "tiny", "hook_name": "blocks.1.hook_resid_post", "architecture": "topk",
        "d_in": 32, "d_sae": 256, "k": 8, "path": f"sae/tiny/{name}", "size_bytes": 1000, "ready_at": timezone.now(),
    }  # fmt: skip
    return SAE.objects.create(name=name, **given | fields)


def a_catalogue_row(name: str = "res/layer_1", **fields: Any) -> SAE:
    given = {"source": "hub", "repo_id": "org/scope", "repo_path": name, "format": "saelens"}
    return SAE.objects.create(name=name, **given | fields)


def write_sae(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A real SAE in our own form; another seed gives other weights."""
    config = {"architecture": "topk", "d_in": 32, "d_sae": 64, "k": 4, "model_name": "tiny"}
    config |= {"hook_name": "blocks.1.hook_resid_post"} | changes
    save_sae(build_sae(SAEConfig(**config), seed=seed), folder)
    return folder


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
