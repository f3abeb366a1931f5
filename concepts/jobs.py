"""Jobs of this app: harvest the features of an SAE from a capture, have them named, and apply large imports."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from concepts import imports, interchange
from concepts.featurefile import ViewError
from concepts.models import ConceptImport, Explanation, FeatureView, captures_of
from concepts.numerics.explain import Namer, Silent
from concepts.numerics.explain import explain as explain_features
from concepts.numerics.harvest import harvest as harvest_features
from concepts.numerics.logit_lens import logit_lens, take_lens
from saehub.jobs.progress import JobError, Progress
from saes.models import SAE
from saes.numerics.formats import load_sae
from saes.numerics.lm import LM, load_lm, pick_device
from training.models import Capture
from training.numerics.shards import open_capture

FIRST_LOOK = 2**15  # tokens


def harvest(progress: Progress, sae: int, view: int | None = None, capture: int | None = None) -> dict[str, Any]:
    """Top texts, statistics, logits and neighbours of every feature, written as one view.

    Without `view` the row is the one this SAE has on `capture`, or a new one; without `capture` it is the capture the
    SAE was trained on, else the newest that fits. An older view in the folder is replaced when the new one is complete.
    The first view is there early: of a long capture over FIRST_LOOK tokens, of a short one before its logits. A harvest
    whose worker was killed goes on.
    """
    row = _row(progress, sae, view, capture)
    hook = row.hook
    if hook is None:
        raise JobError(
            f"The capture {row.capture.name} does not hold {row.sae.hook_name} of {row.sae.model_name}.",
            "Capture that hook point, then harvest from the new capture.",
        )
    progress.start("Loading the model and the SAE")
    lm = _lm(row.sae)
    weights = load_sae(row.sae.files, facts=row.sae.facts, device=pick_device(), checked=bool(row.sae.sha256))
    source, n_features = open_capture(row.capture.folder), weights.config.d_sae
    encoding = (f"Encoding every token of {row.capture.name}", "tokens", source.split_rows())
    neighbours, logits = (
        ("Comparing directions", "features", n_features),
        ("Logits of every feature", "features", n_features),
    )

    def passed(folder: Path, limit: int | None, stage: tuple[str, str, int | None]) -> dict[str, Any]:
        stages = _stages(progress, stage, ("Collecting examples", "parts", None))
        return harvest_features(
            weights, source, hook, folder, k=row.k, tokenizer=lm.tokenizer, limit=limit, progress=stages
        )

    first = not row.ready
    if first and source.split_rows() >= 8 * FIRST_LOOK:  # pages to look at while the rest is read
        with _replaced(row.folder) as folder:
            summary = passed(folder, FIRST_LOOK, (f"A first look at {row.capture.name}", "tokens", FIRST_LOOK))
        row.finish(**_found_in(summary))
        logit_lens(weights, lm, row.folder, progress=_stages(progress, neighbours, logits))
    with _replaced(row.folder) as folder:
        summary = passed(folder, None, encoding)
        known = take_lens(row.folder, folder)
        if not (known or first):
            logit_lens(weights, lm, folder, progress=_stages(progress, neighbours, logits))
    row.finish(**_found_in(summary))
    if first and not known:  # the first view of a short capture is there before its logits
        logit_lens(weights, lm, row.folder, progress=_stages(progress, neighbours, logits))
    return {"view": row.pk, "sae": row.sae_id, "features": summary["n_features"], **_found_in(summary)}


def _found_in(summary: dict[str, Any]) -> dict[str, Any]:
    return {name: summary[name] for name in ("n_tokens", "alive", "dead", "seconds")}


def explain(progress: Progress, explanation: int) -> dict[str, Any]:
    """Have a language model name features, and test the names. What it said is kept feature by feature."""
    row = Explanation.objects.select_related("model", "owner", "view__sae__model", "view__capture__model").filter(
        pk=explanation
    ).first()  # fmt: skip
    if row is None:
        raise JobError("What was asked for is not there any more.", "Ask for it again.")
    began, before = time.monotonic(), row.seconds or 0.0
    try:
        columns = row.view.opened()
    except ViewError as error:
        raise JobError(str(error)) from error
    done = {one["feature"] for one in row.found}
    todo = [feature for feature in row.features if feature not in done]
    progress.start(f"Loading {row.model.name}")
    lm = load_lm(row.model.load_from, revision=row.model.revision or None)
    lm.name = row.model.name
    silent = None
    if row.n_tested:
        progress.start("Looking for texts on which they are silent")
        sae, source = row.view.sae, open_capture(row.view.capture.folder)
        weights = load_sae(sae.files, facts=sae.facts, device=pick_device(), checked=bool(sae.sha256))
        silent = Silent(source, row.view.hook or "", weights, todo, columns)
    progress.start("Naming features", unit="features", total=len(row.features))
    shown = {"n_shown": row.n_shown, "n_tested": row.n_tested}
    said = explain_features(
        Namer(lm), columns, todo, silent, **shown, report=lambda: progress(len(row.found), len(row.features))
    )
    for one in said:
        row.seconds = before + time.monotonic() - began
        row.keep(asdict(one))
    progress(len(row.found), len(row.features))
    row.finish(seconds=before + time.monotonic() - began)
    return {"explanation": row.pk, "named": row.named, "accepted": row.accepted, "median_score": row.median}


def look_concepts(progress: Progress, imported: int) -> dict[str, Any]:
    """Look through a long file for its preview. That it cannot be read is a result, which its page shows."""
    row = _sent(imported)
    progress.start(f"Reading {row.name}", unit="rows")
    seen = imports.look(row, lambda n: progress(n, None))
    return {"import": row.pk, **seen.get("counts", {})}


def _sent(imported: int) -> ConceptImport:
    row: ConceptImport | None = ConceptImport.objects.select_related("sae", "dictionary").filter(pk=imported).first()
    if row is None:
        raise JobError("The import is not there any more.", "Send the file again.")
    return row


def import_concepts(progress: Progress, imported: int) -> dict[str, Any]:
    """Apply a file that was looked at before: all of its rows or none."""
    row = _sent(imported)
    if row.ready:
        return {"import": row.pk, **row.counts}
    progress.start(f"Applying {row.name}")  # one transaction, in which a report would lock the job's row
    try:
        return {"import": row.pk, **imports.apply(row, progress.job.owner)}
    except interchange.FileRefused as refusal:
        raise JobError(str(refusal), "Correct the file and send it again.") from refusal


def _row(progress: Progress, sae: int, view: int | None, capture: int | None) -> FeatureView:
    views = FeatureView.objects.select_related("sae__model", "capture__model")
    if view is not None:
        return _found(views.filter(pk=view, sae=sae).first(), "feature view")
    of = _found(SAE.objects.select_related("model", "run__capture").filter(pk=sae).first(), "SAE")
    source = _capture(of, capture)
    row = views.filter(sae=of, capture=source).first()
    if row is None:
        row = FeatureView(sae=of, capture=source, name=f"{of.name} on {source.name}"[:120], owner=progress.job.owner)
    row.job = progress.job
    row.save()
    return row


def _capture(sae: SAE, capture: int | None) -> Capture:
    """The one asked for, else the one it was trained on, else the newest that fits."""
    if capture is not None:
        return _found(Capture.objects.ready().select_related("model").filter(pk=capture).first(), "capture")
    run = getattr(sae, "run", None)
    fitting = [run.capture] if run is not None else captures_of(sae)
    if not fitting:
        raise JobError(f"No finished capture holds {sae.hook_name} of {sae.model_name}.", "Capture it, then harvest.")
    return fitting[0]


def _found(row: Any, what: str) -> Any:
    if row is None:
        raise JobError(f"The {what} to harvest is not there any more.", "It may have been deleted; choose another one.")
    return row


def _lm(sae: SAE) -> LM:
    if sae.model is None:
        raise JobError(
            f"The SAE {sae.name} is not tied to a language model of this instance.",
            f"Add {sae.model_name or 'its model'} and choose it for the SAE.",
        )
    lm = load_lm(sae.model.load_from, revision=sae.model.revision or None)
    lm.name = sae.model.name  # sentences name it as people here do, not by its folder
    return lm


def _stages(progress: Progress, *stages: tuple[str, str, int | None]) -> Callable[[int, int | None, str], None]:
    """One bar for each of several stages (text, unit, size) that are reported as one count; None: what the rest leaves."""
    waiting = list(stages)
    begun, end, size = 0, 0, 0

    def report(done: int, total: int | None, step: str) -> None:
        nonlocal begun, end, size
        while waiting and done > end:
            text, unit, wanted = waiting.pop(0)
            begun, size = end, wanted if wanted is not None else max((total or 0) - end, 0)
            end = begun + size
            progress.start(text, unit=unit, total=size)
        progress(min(done - begun, size), size)

    return report


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that takes its place once everything in it is written, or vanishes."""
    new, old = folder.with_name(f"{folder.name}.new"), folder.with_name(f"{folder.name}.old")
    try:
        yield new
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)  # open pages keep their memory maps of it
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
