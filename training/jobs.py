"""Jobs on the way from text to an SAE: read a corpus, train, evaluate. Those of captures are in capture_jobs.py."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from django.db import transaction
from django.utils.text import slugify

from saehub.jobs.models import enqueue
from saehub.jobs.progress import JobError, Progress
from saes.fields import size_of
from saes.hook_places import place_of
from saes.models import SAE, LanguageModel
from saes.numerics.architectures import build_sae
from saes.numerics.folders import whole_folder
from saes.numerics.formats import load_sae, save_sae
from saes.numerics.lm import LM, load_lm, pick_device
from saes.numerics.sae import SAEConfig
from saes.numerics.topk import BatchTopKSAE
from training import hub_dataset
from training.models import Corpus, Evaluation, Run
from training.numerics import evaluate as evaluating
from training.numerics.shards import open_capture
from training.numerics.tokens import CorpusError, read_texts
from training.numerics.train import TrainResult
from training.trainer import SAE_FILES, Trainer, reproduction, trainer_config

SAMPLE_CHARACTERS = 4000
HUB_SAMPLE_DOCUMENTS = 200
CHARACTERS_PER_TOKEN = 4  # only to show how far a capture without a limit is


# ---------------------------------------------------------------------------------------------------- corpora


def read_corpus(progress: Progress, corpus: int) -> dict[str, Any]:
    """Read a corpus once: is it text, how much, which (its hash). A Hub dataset is looked at, not read to its end."""
    row = Corpus.objects.get(pk=corpus)
    found = _read_dataset(progress, row) if row.source == Corpus.Source.HUB else _read_file(progress, row)
    row.finish(**found)
    progress.log(f"{found['n_documents']:,} documents")
    return {"corpus": row.pk, "documents": found["n_documents"], "characters": found["n_characters"]}


def _read_file(progress: Progress, row: Corpus) -> dict[str, Any]:
    size = size_of(row.file) if row.file.exists() else 0
    progress.start(f"Reading {row.location}", unit="characters", total=size or None)
    documents = characters = 0
    sample = ""
    for text in read_texts(row.file, text_field=row.text_field or None):
        documents += 1
        characters += len(text)
        sample += _more(sample, text)
        progress(characters, max(size, characters))
    return {
        "n_documents": documents,
        "n_characters": characters,
        "size_bytes": size,
        "sha256": digest(row.file),
        "sample": sample,
    }


def _read_dataset(progress: Progress, row: Corpus) -> dict[str, Any]:
    progress.start(f"Asking the Hub for {row.location}", unit="documents")
    part = hub_dataset.find_part(row.location, row.revision, row.subset, row.split)
    documents = hub_dataset.count_rows(part)
    progress.start("Reading the first documents", unit="documents", total=min(HUB_SAMPLE_DOCUMENTS, documents))
    sample = ""
    for number, text in enumerate(hub_dataset.stream_texts(part, row.text_field), start=1):
        sample += _more(sample, text)
        progress(number, min(HUB_SAMPLE_DOCUMENTS, documents))
        if number == HUB_SAMPLE_DOCUMENTS:
            break
    if not sample.strip():
        raise CorpusError(f"The first documents of {row.location} are empty; name the field with the text.")
    return {
        "n_documents": documents,
        "n_characters": None,  # not counted: that would download all of it
        "size_bytes": sum(file.size for file in part.files),
        "sha256": part.sha256,
        "sample": sample,
        "revision": part.commit,
        "subset": part.subset,
        "split": part.split,
    }


def _more(sample: str, text: str) -> str:
    """What of `text` still fits into the sample; zero bytes, which the database cannot hold, left out."""
    room = SAMPLE_CHARACTERS - len(sample)
    return ("\n\n" if sample else "") + text[:room].replace("\0", "") if room > 0 else ""


def digest(path: Path) -> str:
    """SHA-256 of a file; of a folder, over the names and contents of its files."""
    total = hashlib.sha256()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        if path.is_dir():
            total.update(str(file.relative_to(path)).encode() + b"\0")
        with file.open("rb") as handle:
            while chunk := handle.read(1 << 20):
                total.update(chunk)
    return total.hexdigest()


def texts_of(row: Corpus) -> Iterator[str]:
    """The corpus as it was when it was read; a file that changed since is refused."""
    if row.source == Corpus.Source.HUB:
        part = hub_dataset.find_part(row.location, row.revision, row.subset, row.split)
        return hub_dataset.stream_texts(part, row.text_field)
    if not row.file.exists() or digest(row.file) != row.sha256:
        raise JobError(
            f"The corpus {row.name} changed on disk since it was read, or is gone.",
            "Add it again under a new name, and capture from that.",
        )
    return read_texts(row.file, text_field=row.text_field or None)


def load_model(progress: Progress, model: LanguageModel) -> LM:
    progress.start(f"Loading {model.name}", unit="steps")
    lm = load_lm(model.load_from, revision=model.revision or None)
    progress.log(f"{model.name} on {lm.device}, {str(lm.dtype).removeprefix('torch.')}")
    return lm


# ---------------------------------------------------------------------------------------------------- training


def train(progress: Progress, run: int) -> dict[str, Any]:
    """Train, register the SAE, and queue what was asked for afterwards. Run again, it continues from its checkpoint."""
    row = Run.objects.select_related("capture__model", "capture__corpus", "sae", "owner").get(pk=run)
    if row.ready and row.sae:
        return _made(row.sae)
    source = open_capture(row.capture.folder)
    config = trainer_config(row)
    sae = build_sae(_sae_config(row, source.d[row.hook_name]), seed=config.seed, device=pick_device())
    result = Trainer(progress, row, config).train(sae, source)
    if isinstance(result.sae, BatchTopKSAE):
        result = replace(result, sae=result.sae.for_inference())
    progress.start("Saving the SAE", unit="steps")
    folder = _save(row, result)
    registered = _register(row, result, folder)
    Trainer.forget_checkpoint(row)
    return _made(registered)


def _made(sae: SAE) -> dict[str, Any]:
    return {"sae_id": sae.pk, "sae_path": str(sae.files), "metadata_path": str(sae.files / "config.json")}


def _sae_config(row: Run, d_in: int) -> SAEConfig:
    model = row.capture.model
    return SAEConfig(
        architecture=row.architecture,
        d_in=d_in,
        d_sae=row.config["d_sae"],
        k=row.config.get("k"),
        options={name: row.config[name] for name in ("matryoshka_widths",) if name in row.config},
        hook_name=row.hook_name,
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
        save_sae(result.sae, partial)
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


@transaction.atomic
def _register(row: Run, result: TrainResult, path: str) -> SAE:
    """The SAE's row, the finished run, and the jobs that follow: all of it or none."""
    files = SAE(path=path).files
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
            "site": place_of(row.hook_name, config.architecture)[0],
            "layer": hook["layer"] if hook else None,
            "architecture": config.architecture,
            "d_in": config.d_in,
            "d_sae": config.d_sae,
            "k": config.k,
            "size_bytes": size_of(files),
            "sha256": digest(files / "sae_weights.safetensors"),
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


# ---------------------------------------------------------------------------------------------------- evaluation


def evaluate(progress: Progress, sae: int, evaluation: int) -> dict[str, Any]:
    """Measure an SAE on a capture's held-out contexts: reconstruction on all of their tokens, CE and KL on some."""
    row = Evaluation.objects.select_related("sae", "capture__model").get(pk=evaluation, sae=sae)
    source = open_capture(row.capture.folder)
    weights = load_sae(row.sae.files, facts=row.sae.facts, device=pick_device(), checked=bool(row.sae.sha256))
    lm = load_model(progress, row.capture.model)
    progress.start("Measuring on held-out tokens", unit="tokens")
    stages: set[str] = set()

    def show(done: int, total: int | None, step: str) -> None:
        if step not in stages:  # each stage counts from nothing
            stages.add(step)
            progress.start(step.capitalize(), unit="contexts" if stages != {step} else "tokens", total=total)
        progress(done, total)

    with torch.inference_mode():
        found = evaluating.evaluate_capture(
            weights, source, row.sae.hook_name, lm=lm, max_contexts=row.max_contexts, progress=show
        )
    metrics = {name: _metric(name, metric) for name, metric in found.items()}
    seconds = progress.job.seconds
    _write_metrics(row.sae, metrics)
    row.sae.metrics = metrics
    row.sae.l0, row.sae.explained_variance = metrics["l0"]["value"], metrics["explained_variance"]["value"]
    with transaction.atomic():
        row.finish(metrics=metrics, seconds=seconds)
        row.sae.save(update_fields=["metrics", "l0", "explained_variance"])
    return {
        "sae_id": row.sae_id,
        "evaluation": row.pk,
        "l0": row.sae.l0,
        "explained_variance": row.sae.explained_variance,
    }


def _metric(name: str, metric: dict[str, Any]) -> dict[str, Any]:
    """With its formula beside it, and null where the number does not exist (the database takes no NaN)."""
    value = metric["value"]
    if isinstance(value, float) and value != value:
        value = None
    return metric | {"value": value, "formula": evaluating.DEFINITIONS[name]}


def _write_metrics(sae: SAE, metrics: dict[str, Any]) -> None:
    """Add what was measured to the metrics.json beside the weights."""
    path = sae.files / "metrics.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(known | {"held_out": metrics}, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
