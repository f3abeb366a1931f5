"""Fixtures of the whole suite: real PostgreSQL, real workers, a tiny real language model."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
BROWSER = "tests/e2e/"
# What takes a quarter of a minute or longer begins first, so that no process still works at it when the other has nothing left.
LONG = (
    BROWSER,
    "tests/training/test_training_killed.py",
    "tests/jobs/test_jobs_cluster.py",
    "tests/inference/test_api_schemathesis.py",
    "tests/training/test_training_several.py",
    "tests/saes/test_saes_batch.py",
    "tests/training/test_training_command.py",
    "tests/training/numerics/",
    "tests/saes/numerics/",
    "tests/saes/test_saes_download_killed.py",
    "tests/training/test_training_sweeps.py",
    "tests/concepts/numerics/",
    "tests/saes/test_saes_import.py",
    "tests/saes/test_saes_list.py",
    "tests/saes/test_saes_catalogue.py",
    "tests/concepts/test_concepts_pages.py",
)
# These ask other implementations, in a process that takes longer to import them than to answer: one for all.
PEERS = (
    "tests/saes/numerics/test_saes_peers.py",
    "tests/saes/numerics/test_saes_dictionary_peers.py",
    "tests/saes/test_saes_sharing.py",
    "tests/training/numerics/test_training_evaluate_peer.py",
    "tests/training/numerics/test_training_initial.py",
)
ROLES = ("viewer", "annotator", "researcher", "curator", "admin")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: next((i for i, path in enumerate(LONG) if item.nodeid.startswith(path)), len(LONG)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of several processes (--dist loadfile) one has all browser tests: they share one site, and browsers beside each other
    slow one another down. So have those that ask other implementations."""
    from xdist.scheduler import LoadFileScheduling

    class Together(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            if nodeid.startswith(BROWSER):
                return BROWSER
            return "peers" if nodeid.startswith(PEERS) else super()._split_scope(nodeid)

    return Together(config, log) if config.getvalue("dist") == "loadfile" else None


def make_user(name: str, role: str | None = None) -> Any:
    from django.contrib.auth.models import Group, User

    user = User.objects.create(username=name)  # without a password: hashing one takes longer than most tests
    if role:
        user.groups.add(Group.objects.get(name=role))
    return user


@pytest.fixture(scope="session")
def django_db_setup(
    django_test_environment: None,
    django_db_blocker: Any,
    django_db_keepdb: bool,
    django_db_createdb: bool,
    django_db_modify_db_settings: None,
) -> Iterator[None]:
    """The database, for every test that asks for it. pytest-django's own makes none when all tests that were chosen have
    `committed`, because it looks for `db` or its mark, which put a transaction around a test."""
    from django.db import DEFAULT_DB_ALIAS, connection
    from django.test.utils import setup_databases, teardown_databases

    with django_db_blocker.unblock():
        if "DATABASE_URL" not in os.environ:  # the server is ours, and what tests write need not outlive a power cut
            with connection.cursor() as cursor:
                for setting in ("fsync", "synchronous_commit", "full_page_writes"):
                    cursor.execute(f"ALTER SYSTEM SET {setting} TO off")
                cursor.execute("SELECT pg_reload_conf()")
            connection.close()
        made = setup_databases(
            verbosity=0, interactive=False, aliases={DEFAULT_DB_ALIAS}, serialized_aliases=set(),
            keepdb=django_db_keepdb and not django_db_createdb,
        )  # fmt: skip
    yield
    if not django_db_keepdb:
        with django_db_blocker.unblock():
            teardown_databases(made, verbosity=0)


@pytest.fixture
def committed(django_db_setup: None, django_db_blocker: Any) -> Iterator[None]:
    """A database whose rows other processes see; afterwards all of them are gone but what migrations made."""
    from django.apps import apps
    from django.contrib.auth.models import Group, Permission
    from django.contrib.contenttypes.models import ContentType
    from django.db import connection

    made_by_migrations = {Group, Permission, ContentType}
    tables = [model._meta.db_table for model in apps.get_models() if model not in made_by_migrations]
    with django_db_blocker.unblock():
        yield
        with connection.cursor() as cursor:
            cursor.execute(f"TRUNCATE {', '.join(tables)} CASCADE")
        connection.close()


@pytest.fixture(autouse=True)
def _files_go_with_rows(request: pytest.FixtureRequest) -> Iterator[None]:
    """The transaction around a test is none of ours and is never committed: where no other is open, rows count as gone
    at once, and their files go."""
    if "db" not in request.fixturenames and request.node.get_closest_marker("django_db") is None:
        yield
        return
    from django.db import connection
    from django.db.transaction import on_commit

    def at_once(remove: Callable[[], None]) -> None:
        blocks: Any = connection.atomic_blocks
        remove() if blocks and blocks[-1]._from_testcase else on_commit(remove)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("saehub.jobs.made.on_commit", at_once)
        yield


@pytest.fixture
def user_of(db: None) -> Callable[[str], Any]:
    """`user_of("researcher")`: a user of that role (the same one each time); `user_of("stranger")` has no role."""
    made: dict[str, Any] = {}

    def get(role: str) -> Any:
        if role not in made:
            made[role] = make_user(f"a-{role}", role if role in ROLES else None)
        return made[role]

    return get


@pytest.fixture
def client_of(user_of: Callable[[str], Any]) -> Callable[[str], Any]:
    """`client_of("researcher")`: a browserless client logged in as a user of that role."""
    from django.test import Client

    def get(role: str) -> Any:
        client = Client()
        client.force_login(user_of(role), backend="django.contrib.auth.backends.ModelBackend")
        return client

    return get


@pytest.fixture
def api(user_of: Callable[[str], Any]) -> Callable[..., Any]:
    """`api("researcher", "post", "/infer", {...})`: asked with a token of that role."""
    from tests.api_calls import ask

    return lambda role, *given, **more: ask(user_of(role), *given, **more)


@pytest.fixture
def run_job(db: None) -> Callable[[Any], Any]:
    """Claim a queued job and run its function in this process, the way a worker does; returns the finished row."""

    def run(job: Any) -> Any:
        from saehub.jobs.models import Job
        from saehub.jobs.runner import execute

        claimed = Job.objects.claim(job.pk, "test")
        assert claimed is not None, f"job {job.pk} was not queued"
        execute(claimed)
        job.refresh_from_db()
        return job

    return run


@pytest.fixture(scope="session")
def ask_peers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., None]]:
    """`ask_peers(script, *arguments)`: other implementations do the script's `main`. Skips where they are not installed."""
    from tests.peers import peer, served

    python = peer()
    if python is None:
        pytest.skip("needs the peers: make peers, or SAEHUB_PEERS=their python")
    with served(python, tmp_path_factory.mktemp("peers")) as ask:
        yield ask


TEXT = (
    "The cat sat on the mat while the dog slept by the door. Paris is the capital of France, and Rome is that of Italy. "
    "An exception is raised when the key is missing. Numbers such as 3.14 and 2.71 are floats; 42 is an integer.\n"
)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real Llama of two layers and a byte-level BPE tokenizer trained on a few sentences, saved as a model folder."""
    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny-llama")


def build_tiny_model(folder: Path, **changes: Any) -> Path:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<bos>", "<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    raw.train_from_iterator([TEXT] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"max_position_embeddings": 256, "tie_word_embeddings": True} | changes
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_key_value_heads=2,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# -- real processes beside the tests, on the test database ---------------------------------------------------------------
def child_environment() -> dict[str, str]:
    """Environment in which a `manage.py` process uses this test run's database and data folder."""
    from django.conf import settings
    from django.db import connection

    row = connection.settings_dict
    url = f"postgresql://{row['USER']}@/{row['NAME']}?host={row['HOST']}"
    if row["HOST"] and not str(row["HOST"]).startswith("/"):
        url = f"postgresql://{row['USER']}:{row['PASSWORD']}@{row['HOST']}:{row['PORT']}/{row['NAME']}"
    # A process alone may use all cores; where others run beside it, its threads would mostly wait for each other.
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    inherited = {name: value for name, value in os.environ.items() if not (alone and name == "OMP_NUM_THREADS")}
    return {**inherited, "DATABASE_URL": url, "SAEHUB_DATA": str(settings.DATA_DIR), "SECRET_KEY": settings.SECRET_KEY}


@contextlib.contextmanager
def manage(*call: str, said: Path | None = None, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A `manage.py` process for the length of a test; it and everything it started are gone afterwards. What it says goes
    into the file `said`, where one is given."""
    from saehub.jobs.processes import kill_tree

    with said.open("wb") if said else contextlib.nullcontext() as out:
        child = subprocess.Popen(
            [sys.executable, str(ROOT / "manage.py"), *call, "--with-parent"],
            env=child_environment() | environment,
            cwd=ROOT,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(120)
        except subprocess.TimeoutExpired:
            kill_tree(child.pid)


def wait_for(condition: Callable[[], Any], seconds: float = 60, what: str = "") -> Any:
    """Poll until `condition()` is true and return its value; fail naming what was waited for."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    pytest.fail(f"waited {seconds} s for {what or condition}")


def process_named(name: str) -> psutil.Process:
    """ "job 7" does that job, "for job 7" is the worker that watches it. Of the processes below this one: other tests, on
    other databases, have a job 7 too."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [process] if process.name() == name else []
    assert len(found) == 1, f"exactly one process is {name}"
    return found[0]


def free_port() -> int:
    """A port that stays free until a server of ours takes it: the system gives none below 32768 to whoever asks for any."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            number = random.SystemRandom().randrange(15_000, 30_000)
            probe.bind(("127.0.0.1", number))
            return number


# -- a Hub on this machine ------------------------------------------------------------------------------------------------
@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """The Hub's client library talks to a small Hub of ours, with a cache of its own."""
    from huggingface_hub import HfFileSystem, constants

    from saes import hub_client
    from tests.mini_hub import MiniHub

    made = MiniHub()
    monkeypatch.setattr(hub_client, "FIRST_WAIT", 0.02)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", made.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", made.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    HfFileSystem.clear_instance_cache()
    yield made
    made.close()
