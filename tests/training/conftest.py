"""Rows of this app, made by their real jobs in the test's own process."""

from typing import Any

import pytest

from saes.models import LanguageModel
from training.models import Capture, Corpus, Run

HOOK = "blocks.1.hook_resid_post"
TEXT = "An exception is raised when the key is missing. Paris is the capital of France, and Rome is that of Italy.\n"


@pytest.fixture(autouse=True)
def data_folder(settings, tmp_path) -> Any:
    """A data folder for each test: row numbers begin anew with every test database, files would not."""
    settings.DATA_DIR = tmp_path / "data"
    settings.IMPORT_DIRS = [tmp_path / "import"]
    for folder in (settings.DATA_DIR, *settings.IMPORT_DIRS):
        folder.mkdir()
    return settings.DATA_DIR


@pytest.fixture
def model(db, tiny_model_dir, run_job, user_of) -> LanguageModel:
    row, _ = LanguageModel.objects.get_or_create(
        name="tiny", defaults={"source": "folder", "location": str(tiny_model_dir), "owner": user_of("researcher")}
    )
    run_job(row.start(row.owner))
    row.refresh_from_db()
    return row


@pytest.fixture
def make_corpus(db, run_job, user_of) -> Any:
    def make(text: str | bytes, name: str = "sentences") -> Any:
        row = Corpus.objects.create(name=name, source="text", location="text.txt", owner=user_of("researcher"))
        row.folder.mkdir(parents=True)
        row.file.write_bytes(text if isinstance(text, bytes) else text.encode())
        job = run_job(row.start(row.owner))
        row.refresh_from_db()
        return row, job

    return make


@pytest.fixture
def make_capture(model, make_corpus, run_job, user_of) -> Any:
    def make(text: str = TEXT * 60, run: bool = True, **fields: Any) -> Any:
        corpus = Corpus.objects.first() or make_corpus(text)[0]
        given = {"context_length": 32, "max_tokens": 2000, "hook_names": [HOOK]} | fields
        row = Capture.objects.create(name="capture", model=model, corpus=corpus, owner=user_of("researcher"), **given)
        job = row.start(row.owner)
        if run:
            job = run_job(job)
            row.refresh_from_db()
        return row, job

    return make


@pytest.fixture
def make_run(make_capture, run_job, user_of) -> Any:
    def make(**fields: Any) -> Any:
        capture = Capture.objects.ready().first() or make_capture()[0]
        config = {"n_tokens": 1280, "batch_size": 64, "log_every": 2, "checkpoint_every": 4, "lr": 1e-3}
        config |= fields.pop("config", {"d_sae": 64, "k": 4})
        given = {"architecture": "topk", "hook_name": HOOK, "config": config} | fields
        row = Run.objects.create(name="run", capture=capture, owner=user_of("researcher"), **given)
        job = run_job(row.start(row.owner))
        row.refresh_from_db()
        return row, job

    return make
