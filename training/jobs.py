"""Jobs on the way from text to an SAE: read a corpus, train, evaluate. Those of captures are in capture_jobs.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from saehub.jobs.progress import JobError, Progress
from saes.fields import size_of
from saes.models import LanguageModel
from saes.numerics.lm import LM, load_lm
from training import hub_dataset
from training.evaluation import measure
from training.files import digest
from training.models import Corpus, Evaluation, Run, Sweep
from training.numerics.corpus_files import read_documents
from training.numerics.documents import CorpusError, Document, characters
from training.numerics.shards import open_capture
from training.registering import keep, made, new_sae
from training.samples import Sample
from training.sweeper import Sweeper
from training.trainer import Paused, Trainer, trainer_config

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
    n_documents = n_characters = 0
    sample = Sample()
    for document in read_documents(row.file, text_field=row.text_field or None):
        n_documents += 1
        n_characters += characters(document)
        sample.add(document)
        progress(n_characters, max(size, n_characters))
    return {
        "n_documents": n_documents,
        "n_characters": n_characters,
        "size_bytes": size,
        "sha256": digest(row.file),
        **sample.finish(),
    }


def _read_dataset(progress: Progress, row: Corpus) -> dict[str, Any]:
    progress.start(f"Asking the Hub for {row.location}", unit="documents")
    part = hub_dataset.find_part(row.location, row.revision, row.subset, row.split)
    documents = hub_dataset.count_rows(part)
    progress.start("Reading the first documents", unit="documents", total=min(HUB_SAMPLE_DOCUMENTS, documents))
    sample = Sample()
    for number, document in enumerate(hub_dataset.stream_documents(part, row.text_field), start=1):
        sample.add(document)
        progress(number, min(HUB_SAMPLE_DOCUMENTS, documents))
        if number == HUB_SAMPLE_DOCUMENTS:
            break
    if not sample.text.strip():
        raise CorpusError(f"The first documents of {row.location} are empty; name the field with the text.")
    return {
        "n_documents": documents,
        "n_characters": None,  # not counted: that would download all of it
        "size_bytes": sum(file.size for file in part.files),
        "sha256": part.sha256,
        "revision": part.commit,
        "subset": part.subset,
        "split": part.split,
        **sample.finish(),
    }


def documents_of(row: Corpus) -> Iterator[Document]:
    """The corpus as it was when it was read; a file that changed since is refused."""
    if row.source == Corpus.Source.HUB:
        part = hub_dataset.find_part(row.location, row.revision, row.subset, row.split)
        return hub_dataset.stream_documents(part, row.text_field)
    if not row.file.exists() or digest(row.file) != row.sha256:
        raise JobError(
            f"The corpus {row.name} changed on disk since it was read, or is gone.",
            "Add it again under a new name, and capture from that.",
        )
    return read_documents(row.file, text_field=row.text_field or None)


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
        return made(row.sae)
    if row.pause_at:
        return {"paused": True}
    source = open_capture(row.capture.folder)
    config = trainer_config(row)
    sae = new_sae(row, source, config.seed)
    try:
        result = Trainer(progress, row, config).train(sae, source)
    except Paused as paused:
        return {"paused": True, "step": paused.step}
    progress(result.tokens, config.total_rows, "Saving the SAE")
    progress.flush()
    return made(keep(row, result)) | ({"ended_early": True} if result.stopped else {})


def train_sweep(progress: Progress, sweep: int) -> dict[str, Any]:
    """Train what a sweep still has to train, side by side. Run again, each goes on from its checkpoint."""
    row = Sweep.objects.select_related("capture__model", "capture__corpus", "owner").get(pk=sweep)
    return Sweeper(progress, row).train()


# ---------------------------------------------------------------------------------------------------- evaluation


def evaluate(progress: Progress, sae: int, evaluation: int) -> dict[str, Any]:
    """Measure an SAE on a capture's held-out contexts or on a corpus of choice: reconstruction on all of the tokens, CE
    and KL on some contexts."""
    rows = Evaluation.objects.select_related(
        "sae__model", "sae__release", "sae__run__capture", "capture__model", "corpus"
    )
    row = rows.get(pk=evaluation, sae=sae)
    model = row.capture.model if row.capture else row.sae.model
    if model is None:
        raise JobError(
            f"The language model of {row.sae.name} is not among the models here.", "Add it, then press Retry."
        )
    documents = documents_of(row.corpus) if row.corpus else None
    return measure(progress, row, load_model(progress, model), documents)
