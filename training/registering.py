"""From a run to its SAE: what it begins with, and how the trained one is saved, registered and followed up."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import Any

from django.db import transaction
from django.utils.text import slugify

from saehub.jobs.models import enqueue
from saes.checksums import checksums
from saes.fields import size_of
from saes.hook_places import place_of
from saes.models import SAE, LanguageModel
from saes.numerics.architectures import build_sae
from saes.numerics.folders import whole_folder
from saes.numerics.formats import save_sae
from saes.numerics.lm import pick_device
from saes.numerics.sae import SAE as SAEWeights
from saes.numerics.sae import SAEConfig
from saes.numerics.topk import BatchTopKSAE
from training.files import digest
from training.models import Evaluation, Run
from training.numerics.shards import Capture as Shards
from training.numerics.train import TrainResult
from training.trainer import SAE_FILES, WEIGHTS, checkpoints, reproduction


def made(sae: SAE) -> dict[str, Any]:
    return {"sae_id": sae.pk, "sae_path": str(sae.files), "metadata_path": str(sae.files / "config.json")}


def new_sae(row: Run, source: Shards, seed: int) -> SAEWeights:
    """The SAE that a run begins with."""
    return build_sae(_sae_config(row, source), seed=seed, device=pick_device())


def keep(row: Run, result: TrainResult) -> SAE:
    """Save what was trained, register it, and let its checkpoint (three times its size) go."""
    if isinstance(result.sae, BatchTopKSAE):
        result = replace(result, sae=result.sae.for_inference())
    registered = _register(row, result, _save(row, result))
    shutil.rmtree(checkpoints(row), ignore_errors=True)
    return registered


def _sae_config(row: Run, source: Shards) -> SAEConfig:
    model = row.capture.model
    return SAEConfig(
        architecture=row.sae_architecture,
        d_in=source.d[row.hook_name],
        d_out=source.d[row.hook_name_out or row.hook_name],
        apply_b_dec_to_input=not row.hook_name_out,
        d_sae=row.config["d_sae"],
        k=row.config.get("k"),
        options={name: row.config[name] for name in ("matryoshka_widths",) if name in row.config},
        hook_name=row.hook_name,
        hook_name_out=row.hook_name_out,
        model_name=model.location if model.source == LanguageModel.Source.HUB else model.name,
        metadata={
            "saehub_run": row.pk,
            "dataset_path": row.capture.corpus.location,
            "context_size": row.capture.context_length,
        },
    )


def _save(row: Run, result: TrainResult) -> str:
    """Write the SAE and what it came from as one folder, whole or not at all; its path below the data folder."""
    path = SAE(path=f"sae/{slugify(row.capture.model.name) or 'model'}/run-{row.pk}").files
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(path, replaces=SAE_FILES) as partial:
        save_sae(result.sae, partial, _format(result.sae))
        for name, content in (
            ("history.json", [vars(report) for report in result.history]),
            ("config.json", reproduction(row)),
            (
                "metrics.json",
                {"training": vars(result.history[-1]) if result.history else {}, "stopped": result.stopped},
            ),
        ):
            (partial / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return f"sae/{path.parent.name}/{path.name}"


def _format(sae: SAEWeights) -> str:
    """SAELens' form, except for what only sparsify has one for."""
    return "sparsify" if "topk" in sae.config.architecture and not sae.reconstructs else "saelens"


@transaction.atomic
def _register(row: Run, result: TrainResult, path: str) -> SAE:
    """The SAE's row, the finished run, and the jobs that follow: all of it or none."""
    files = SAE(path=path).files
    weights = next(files / name for name in WEIGHTS if (files / name).exists())
    config = result.sae.config
    hook = row.capture.model.hook(row.hook_name)
    sae, _ = SAE.objects.update_or_create(
        path=path,
        defaults={
            "name": row.name,
            "owner": row.owner,
            "source": SAE.Source.TRAINED,
            "model": row.capture.model,
            "model_name": row.capture.model.name,
            "hook_name": row.hook_name,
            "hook_name_out": row.hook_name_out,
            "site": place_of(row.hook_name, config.architecture, row.hook_name_out)[0],
            "layer": hook["layer"] if hook else None,
            "architecture": config.architecture,
            "d_in": config.d_in,
            "d_sae": config.d_sae,
            "k": config.k,
            "size_bytes": size_of(files),
            "sha256": digest(weights),
            "checksums": {} if weights.name == WEIGHTS[0] else checksums(files, ("cfg.json", weights.name)),
            "config": json.loads((files / "cfg.json").read_text()),
        },
    )
    sae.finish(job=row.job)
    row.finish(sae=sae, seconds=result.seconds, tokens=result.tokens)
    _follow(row, sae)
    return sae


def _follow(row: Run, sae: SAE) -> None:
    if row.evaluate_after:
        made = Evaluation.objects.create(
            name=f"{sae.name} on {row.capture.name}"[:120], owner=row.owner, sae=sae, capture=row.capture
        )
        made.start(row.owner)
    if row.harvest_after:  # by name: features are the business of an app above this one
        enqueue("harvest", row.owner, title=f"Harvest {sae.name}", sae=sae.pk, capture=row.capture_id)
