"""One evaluation between the database and the numerics: on what it is measured, what is kept of it, and where."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch
from django.db import transaction

from saehub import __version__
from saehub.jobs.progress import JobError, Progress
from saes.abilities import is_transcoder
from saes.models import SAE
from saes.numerics.formats import load_sae
from saes.numerics.lm import LM, pick_device
from saes.numerics.sae import SAE as Weights
from training.models import Evaluation
from training.numerics.definitions import DEFINITIONS
from training.numerics.documents import Document
from training.numerics.evaluate import Measured, measure_capture, measure_texts
from training.numerics.saebench import Facts, core_output
from training.numerics.shards import open_capture
from training.numerics.tokens import TokenPolicy
from training.policies import Policy, policy_of, policy_on

MAX_TOKENS = 100_000  # of a corpus of choice, where nobody said how many


def measure(progress: Progress, row: Evaluation, lm: LM, texts: Iterator[Document] | None) -> dict[str, Any]:
    """Measure the row's SAE on texts or on its capture's held-out contexts; keep the metrics with it and its SAE."""
    sae = load_sae(row.sae.files, facts=row.sae.facts, device=pick_device(), checked=bool(row.sae.sha256))
    show = _Shown(progress)
    policy = policy_on(row.sae, row.corpus) if row.corpus else policy_of(row.sae)
    with torch.inference_mode():
        found = _on_texts(row, sae, lm, texts, policy, show) if texts is not None else _on_capture(row, sae, lm, show)
        metrics = {name: metric | {"formula": DEFINITIONS[name]} for name, metric in found.metrics.items()}
        if not is_transcoder(row.sae):
            _write_saebench(progress, row, sae, lm, found, policy)
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


class _Shown:
    """Progress by stages: each counts from nothing."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.stages: set[str] = set()

    def __call__(self, done: int, total: int | None, step: str) -> None:
        if step not in self.stages:
            self.stages.add(step)
            self.progress.start(step.capitalize(), unit="contexts" if len(self.stages) > 1 else "tokens", total=total)
        self.progress(done, total)


def _on_capture(row: Evaluation, sae: Weights, lm: LM, show: _Shown) -> Measured:
    assert row.capture is not None
    source = open_capture(row.capture.folder)
    goal = row.sae.hook_name_out if is_transcoder(row.sae) else None
    if goal and goal not in source.hook_names:
        raise JobError(
            f"The capture {row.capture.name} does not hold {goal}, which the transcoder predicts.",
            "Evaluate it on a corpus, or on a capture with both hook points.",
        )
    return measure_capture(
        sae, source, row.sae.hook_name, goal_hook=goal, lm=lm, max_contexts=row.max_contexts, progress=show
    )


def _on_texts(
    row: Evaluation, sae: Weights, lm: LM, texts: Iterator[Document], policy: Policy, show: _Shown
) -> Measured:
    assert row.corpus is not None
    return measure_texts(
        sae,
        lm,
        texts,
        TokenPolicy(
            policy.context_length,
            policy.prepend_bos,
            policy.store_special,
            policy.packed,
            policy.chat_template,
            policy.plain_chats,
            policy.roles,
        ),
        hook_name=row.sae.hook_name,
        goal_hook=row.sae.hook_name_out if is_transcoder(row.sae) else None,
        max_tokens=row.max_tokens or MAX_TOKENS,
        max_contexts=row.max_contexts,
        data=f"corpus {row.corpus.name}, {policy}",
        progress=show,
    )


# ---------------------------------------------------------------------------------------------------- what is kept


def _write_saebench(progress: Progress, row: Evaluation, sae: Weights, lm: LM, found: Measured, policy: Policy) -> None:
    """SAEBench's core JSON, beside the row."""
    length = row.capture.context_length if row.capture else policy.context_length
    special = row.capture.store_special if row.capture else policy.store_special
    source = row.capture.corpus if row.capture else row.corpus
    assert source is not None
    predicted = -(-found.metrics["ce_original"]["n"] // (length - 1)) if "ce_original" in found.metrics else 0
    facts = Facts(
        model_name=row.sae.model_name,
        dataset=source.location or source.name,
        context_length=length,
        n_contexts=predicted,
        exclude_special=not special,
        llm_dtype=str(lm.dtype).removeprefix("torch."),
        sae_id=row.sae.sae_id or row.sae.name,
        release=row.sae.release.name if row.sae.release else None,
        made_by=f"SAEHub {__version__}, torch {version('torch')}",
        sae_config=row.sae.config,
    )
    progress.start("Comparing features", unit="features")
    output = core_output(sae, found, facts, lambda done, total: progress(done, total))
    row.folder.mkdir(parents=True, exist_ok=True)
    temporary = row.saebench.with_suffix(".tmp")
    temporary.write_text(json.dumps(output, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(row.saebench)


def _write_metrics(sae: SAE, metrics: dict[str, Any]) -> None:
    """Add what was measured to the metrics.json beside the weights, where they are ours; the Hub's cache is not."""
    if not sae.own_files():
        return
    folder = sae.files if sae.files.is_dir() else sae.files.parent
    path = folder / "metrics.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(known | {"held_out": metrics}, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
