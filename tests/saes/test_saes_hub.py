"""Models from the Hub: the real client library against a small Hub on this machine."""

from pathlib import Path
from typing import Any

import pytest

from saehub.jobs.models import State
from saes.models import LanguageModel
from tests.mini_hub import COMMIT, MiniHub

pytestmark = pytest.mark.django_db
REPO = "lab/tiny-llama"


@pytest.fixture
def add(run_job: Any, user_of: Any) -> Any:
    def call(location: str = REPO, **fields: Any) -> Any:
        row = LanguageModel.objects.create(
            name="m", source="hub", location=location, owner=user_of("researcher"), **fields
        )
        job = run_job(row.start(row.owner))
        row.refresh_from_db()
        return row, job

    return call


def stock(hub: MiniHub, folder: Path, **more: bytes) -> None:
    hub.repos[f"models/{REPO}"] = {file.name: file.read_bytes() for file in folder.iterdir()} | more


def test_a_repository_is_downloaded_and_pinned_to_its_commit(hub: MiniHub, add: Any, tiny_model_dir: Path) -> None:
    stock(
        hub, tiny_model_dir, **{"pytorch_model.bin": b"a pickle", "onnx/model.safetensors": b"x", "README.md": b"# hi"}
    )
    row, job = add()
    assert job.state == State.DONE, job.traceback
    assert row.revision == COMMIT and row.load_from == REPO and row.n_layers == 2
    assert row.size_bytes == (tiny_model_dir / "model.safetensors").stat().st_size
    fetched = {path.rpartition("/")[2] for path in hub.asked if path.startswith("GET /lab")}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= fetched
    assert not fetched & {"pytorch_model.bin", "README.md"} and "onnx" not in " ".join(hub.asked)


def test_what_was_downloaded_loads_without_the_hub(hub: MiniHub, add: Any, tiny_model_dir: Path) -> None:
    import torch

    from saes.numerics.lm import load_lm

    stock(hub, tiny_model_dir)
    row, _ = add()
    asked = len(hub.requests)
    here, there = load_lm(row.load_from, revision=row.revision), load_lm(tiny_model_dir)
    assert len(hub.requests) == asked, "a commit that is here cannot have changed, so nobody is asked"
    ids = torch.arange(8)[None]
    assert torch.equal(here.model(ids).logits, there.model(ids).logits)


def test_the_preview_reads_the_tokenizer_from_the_cache(hub: MiniHub, add: Any, tiny_model_dir: Path) -> None:
    from training.preview import Policy, preview
    from training.samples import Sampled

    stock(hub, tiny_model_dir)
    row, _ = add()
    shown = preview(row, Sampled(("The cat sat on the mat.",)), Policy())
    assert shown is not None and shown.tokens[0].text == "<bos>"


@pytest.mark.parametrize(
    "location, fields, says",
    [
        ("lab/nothing", {}, "There is no repository lab/nothing on the Hub, or it is private"),
        ("lab/gated", {}, "lab/gated is gated: accept its terms on "),
        (REPO, {"revision": "nonesuch"}, f"{REPO} has no such revision"),
        ("lab/pickles", {}, "lab/pickles has no safetensors weights"),
    ],
)
def test_each_refusal_is_its_own_sentence(
    hub: MiniHub, add: Any, tiny_model_dir: Path, location: str, fields: dict[str, str], says: str
) -> None:
    stock(hub, tiny_model_dir)
    hub.gated.add("models/lab/gated")
    hub.repos["models/lab/gated"] = hub.repos[f"models/{REPO}"]
    hub.repos["models/lab/pickles"] = {"config.json": b"{}", "pytorch_model.bin": b"a pickle"}
    row, job = add(location, **fields)
    assert job.state == State.FAILED and not row.ready
    assert job.error.startswith(says), job.error


def test_a_hub_that_does_not_answer_is_one_sentence(hub: MiniHub, add: Any) -> None:
    hub.close()
    _, job = add()
    assert "the Hugging Face Hub cannot be reached" in job.error


def test_a_download_that_does_not_fit_is_refused_before_it_starts(
    hub: MiniHub, add: Any, tiny_model_dir: Path, settings: Any
) -> None:
    stock(hub, tiny_model_dir)
    settings.DISK_RESERVE = 10**18
    _, job = add()
    assert "and the disk of" in job.error and "HF_HOME" in job.hint
    assert not [path for path in hub.asked if path.startswith("GET /lab")]


def test_an_interrupted_download_is_not_begun_again(hub: MiniHub, add: Any, tiny_model_dir: Path) -> None:
    stock(hub, tiny_model_dir)
    row, _ = add()
    hub.asked.clear()
    row.delete()
    _, again = add()
    assert again.state == State.DONE
    assert not [path for path in hub.asked if path.startswith("GET /lab")], "every file was here already"
