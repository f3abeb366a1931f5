"""Jobs of captures: make one (from a model, as a stream, or from a mi_crow store), check its files, write it out again."""

from __future__ import annotations

from typing import Any

from saehub.jobs.models import LIVE, Job
from saehub.jobs.progress import JobError, Progress
from saes.fields import size_of
from saes.numerics.folders import whole_folder
from training.jobs import CHARACTERS_PER_TOKEN, documents_of, load_model
from training.models import Capture, Corpus
from training.numerics.capture import capture as capture_activations
from training.numerics.local_store import read_run, write_run
from training.numerics.shard_writer import verify
from training.numerics.shards import open_capture
from training.numerics.tokens import TokenPolicy

EXPORT = "mi_crow"  # below the capture's folder


def capture(progress: Progress, capture: int, part: int = 0) -> dict[str, Any]:
    """Run the model over the corpus and store activations, or this part of them. Run again, it continues after its last
    whole shard; the last part to finish makes the row ready."""
    row = Capture.objects.select_related("model", "corpus").get(pk=capture)
    if row.location:
        manifest: dict[str, Any] | None = _from_store(progress, row)
    else:
        manifest = _from_model(progress, row, part)
    if manifest is None:
        _hand_over(row, progress.job)
        progress.log("this part is whole; others are not yet")
        return {"capture": row.pk, "part": part}
    row.finish(
        n_tokens=manifest["n_tokens"],
        n_contexts=manifest["n_contexts"],
        n_masked=manifest.get("n_masked") if row.stored else None,
        size_bytes=size_of(row.folder),
        seconds=manifest["seconds"],
        manifest={key: value for key, value in manifest.items() if key != "shards"},
        **(manifest["policy"] if row.location else {}),  # how its texts became tokens was decided by who wrote it
    )
    progress.log(f"{row.n_tokens:,} tokens in {row.n_contexts:,} contexts")
    if row.ended_early:
        progress.log(f"{row.corpus.name} ended before the {row.max_tokens:,} tokens that were asked for")
    return {"capture": row.pk, "tokens": row.n_tokens, "path": str(row.folder)}


def _from_model(progress: Progress, row: Capture, part: int) -> dict[str, Any] | None:
    texts = documents_of(row.corpus)
    lm = load_model(progress, row.model)
    found = (row.corpus.n_characters or 0) // CHARACTERS_PER_TOKEN
    expected = (min(filter(None, (row.max_tokens, found)), default=0) // row.parts) or None
    progress.start(f"Running {row.model.name} over {row.corpus.name}", unit="tokens", total=expected)
    return capture_activations(
        lm,
        texts,
        row.hook_names,
        row.folder,
        policy=policy_of(row),
        dtype=row.dtype,
        max_tokens=row.max_tokens,
        dataset=dataset_of(row.corpus),
        autocast=row.compute_dtype == Capture.Compute.BF16,
        max_norm_ratio=row.max_norm_ratio,
        stored=row.stored,
        part=part,
        parts=row.parts,
        progress=lambda done, _total, step: progress(done, expected and max(expected, done), step),
    )


def policy_of(row: Capture) -> TokenPolicy:
    return TokenPolicy(
        row.context_length,
        row.prepend_bos,
        row.store_special,
        row.packed,
        row.chat_template,
        row.plain_chats,
        tuple(row.roles),
    )


def dataset_of(row: Corpus) -> dict[str, Any]:
    return {
        "corpus": row.pk, "name": row.name, "source": row.source, "location": row.location, "revision": row.revision,
        "subset": row.subset, "split": row.split, "text_field": row.text_field, "sha256": row.sha256,
    }  # fmt: skip


def _hand_over(row: Capture, done: Job) -> None:
    """The row shows a job that is still to finish: one at work, else one that failed and can be retried."""
    others = Job.objects.filter(kind=Capture.KIND, subject_id=row.pk).exclude(pk=done.pk).exclude(state="done")
    row.job = others.filter(state__in=LIVE).order_by("pk").first() or others.order_by("pk").first() or done
    row.save(update_fields=["job"])


# ---------------------------------------------------------------------------------------------------- mi_crow


def _from_store(progress: Progress, row: Capture) -> dict[str, Any]:
    progress.start(f"Reading {row.location}", unit="batches")
    points = [point for point in map(row.model.hook, row.hook_names) if point]
    return read_run(
        row.location,
        row.folder,
        points,
        model={"name": row.model.location, "architecture": row.model.architecture, "revision": row.model.revision},
        texts=documents_of(row.corpus),
        tokenizer=lambda: load_model(progress, row.model).tokenizer,
        dtype=row.dtype,
        dataset=dataset_of(row.corpus),
        progress=lambda done, total: progress(done, total),
    )


def export_capture(progress: Progress, capture: int) -> dict[str, Any]:
    """Write a capture as a run of a mi_crow LocalStore, below its own folder; whole or not at all."""
    row = Capture.objects.select_related("model").get(pk=capture)
    source = open_capture(row.folder)
    target = row.folder / EXPORT
    progress.start("Writing a mi_crow LocalStore", unit="batches", total=len(source.shards) * len(source.hook_names))
    with whole_folder(target, replaces=("runs",)) as partial:
        run = write_run(source, partial, row.model.architecture, progress=lambda done, total: progress(done, total))
    return {"capture": row.pk, "run": run, "path": str(target)}


# ---------------------------------------------------------------------------------------------------- checking


def verify_capture(progress: Progress, capture: int) -> dict[str, Any]:
    """Every shard against the hash in the manifest. Raises JobError naming the damaged ones."""
    row = Capture.objects.get(pk=capture)
    source = open_capture(row.folder)
    progress.start("Reading every shard", unit="shards", total=len(source.shards))
    wrong = []
    for number, (_, said) in enumerate(verify(source.path, source.manifest), start=1):
        if said:
            wrong.append(said)
            progress.log(said)
        progress(number, len(source.shards))
    if wrong:
        raise JobError(
            f"{len(wrong)} of {len(source.shards)} shards are damaged: {wrong[0]}",
            "Capture it again: the same settings give the same shards.",
        )
    progress.log(f"all {len(source.shards)} shards are as they were written")
    return {"capture": row.pk, "shards": len(source.shards), "bytes": size_of(row.folder)}
