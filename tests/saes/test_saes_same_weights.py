"""SAEs with the same weights are named before anything is fetched: by the checksums that the Hub tells, of real files."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from django.core.management import call_command
from django.urls import reverse

from saehub.jobs.models import Job, State, enqueue
from saes import repository
from saes.hub import HubFile
from saes.models import SAE
from saes.numerics.architectures import build_sae
from saes.numerics.formats import save_sae
from saes.numerics.sae import SAEConfig
from saes.same_weights import told
from tests.mini_hub import MiniHub

pytestmark = pytest.mark.django_db
KINDS = ("saelens", "sparsify")  # kept as it comes; converted when it comes


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    repository._asked.clear()
    monkeypatch.setattr(repository.listing_of, "__kwdefaults__", {"wait": 60.0})
    monkeypatch.setattr(repository.variants, "__kwdefaults__", {"live": True, "wait": 60.0})


def files(folder: Path, kind: str, seed: int = 0) -> dict[str, bytes]:
    """A real SAE in a format, as {name: content}."""
    config = SAEConfig("topk", 32, 64, k=4, hook_name="layers.1", model_name="tiny")
    save_sae(build_sae(config, seed=seed), folder, format=kind)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def at(place: str, content: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{place}/{name}": data for name, data in content.items()}


@pytest.fixture
def stocked(hub: MiniHub, tmp_path: Path) -> MiniHub:
    """Two repositories with the same SAEs at other places, and each one of its own."""
    for number, kind in enumerate(KINDS):
        same, other = files(tmp_path / kind, kind), files(tmp_path / f"{kind}-other", kind, seed=5)
        hub.repos.setdefault("models/lab/first", {}).update(at(f"layers.{number}", same))
        hub.repos.setdefault("models/lab/copies", {}).update(at(f"copy_{number}", same) | at(f"other_{number}", other))
    return hub


@pytest.fixture
def bring(run_job: Any, user_of: Any) -> Callable[..., tuple[SAE, Job]]:
    def call(repo: str, path: str, kind: str) -> tuple[SAE, Job]:
        row = SAE.objects.create(
            name=f"{repo}:{path}", source="hub", repo_id=repo, repo_path=path, format=kind,
            facts={"hook_name": "layers.1", "model_name": "tiny"},
        )  # fmt: skip
        job = run_job(row.start(user_of("researcher")))
        row.refresh_from_db()
        assert row.ready, job.traceback
        return row, job

    return call


def look(client: Any, repo: str, **query: Any) -> tuple[dict[str, str], str]:
    answer = client.get(reverse("saes:sae_download"), {"repo": repo} | query)
    twins = {offer.one.path: offer.twin.name for offer in answer.context["rows"] if offer.twin}
    return twins, answer.content.decode()


@pytest.mark.parametrize("number, kind", list(enumerate(KINDS)))
def test_the_download_page_names_what_is_here(
    number: int, kind: str, stocked: MiniHub, bring: Any, client_of: Any
) -> None:
    client = client_of("researcher")
    assert look(client, "lab/copies")[0] == {}
    first, _ = bring("lab/first", f"layers.{number}", kind)
    assert bool(first.proof) == (kind != "saelens"), "one of the two is converted"
    weights = {request.path for request in stocked.requests if "/copies/resolve/" in request.path}
    twins, html = look(client, "lab/copies")
    assert twins == {f"copy_{number}": first.name}
    assert f'same weights as <a href="{first.get_absolute_url()}">' in html and html.count("which is here") == 1
    assert look(client, "lab/first")[0] == {}, "an SAE is not its own double"
    assert {request.path for request in stocked.requests if "/copies/resolve/" in request.path} == weights == set()


def test_the_page_asks_one_question_more_however_many_places(
    stocked: MiniHub, bring: Any, client_of: Any, django_assert_num_queries: Any
) -> None:
    client = client_of("researcher")
    look(client, "lab/copies"), look(client, "lab/first")
    for repo in ("lab/first", "lab/copies"):  # two places, four places
        with django_assert_num_queries(9):
            look(client, repo)


def test_a_config_that_was_read_tells_the_double_and_so_does_the_download(
    stocked: MiniHub, bring: Any, client_of: Any, run_job: Any, user_of: Any
) -> None:
    first, job = bring("lab/first", "layers.0", "saelens")
    assert not job.lines.filter(text__contains="same weights").exists()
    row = SAE.objects.create(name="copy", source="hub", repo_id="lab/copies", repo_path="copy_0", format="saelens")
    note = f'The same weights as <a href="{first.get_absolute_url()}">'
    assert note not in client_of("viewer").get(row.get_absolute_url()).content.decode()
    job = run_job(enqueue("inspect", user_of("researcher"), title="Read", sae=row.pk))
    row.refresh_from_db()
    assert job.state == State.DONE and not row.ready and row.sha256 == first.sha256 != ""
    assert note in client_of("viewer").get(row.get_absolute_url()).content.decode()
    page = client_of("viewer").get(first.get_absolute_url()).content.decode()
    assert f'<a href="{row.get_absolute_url()}">copy</a> (not here)' in page
    job = run_job(row.start(user_of("researcher")))
    row.refresh_from_db()
    said = [line.text for line in job.lines.all()]
    before = next(place for place, text in enumerate(said) if "The same weights are here already, as lab/first" in text)
    assert row.ready and before < next(place for place, text in enumerate(said) if "is in the format" in text)


def test_a_dry_run_names_them_before_anything_is_fetched(
    stocked: MiniHub, bring: Any, tmp_path: Path, user_of: Any
) -> None:
    first, _ = bring("lab/first", "layers.0", "saelens")
    stocked.repos["models/lab/copies"] |= at("other_0b", files(tmp_path / "again", "saelens", seed=5))
    wanted = tmp_path / "list.csv"
    wanted.write_text("repo,path\n" + "".join(f"lab/copies,{name}\n" for name in ("copy_0", "other_0", "other_0b")))
    asked = len([request for request in stocked.requests if "/resolve/" in request.path])

    def call(*words: str) -> str:
        out = io.StringIO()
        call_command("download_saes", "--spec", str(wanted), "--dry-run", *words, stdout=out, stderr=io.StringIO())
        return out.getvalue()

    lines = {line.split()[0]: line for line in call().splitlines() if line.startswith("lab/copies")}
    assert lines["lab/copies:copy_0"].endswith(f"same weights as {first.name} (SAE {first.pk}), which is here")
    assert "same weights" not in lines["lab/copies:other_0"]
    assert lines["lab/copies:other_0b"].endswith("same weights as lab/copies:other_0"), "of two that come, the second"
    told_of = [one["same_weights"] for one in json.loads(call("--json"))["saes"]]
    assert told_of == [{"sae": first.pk, "name": first.name}, None, {"sae": None, "name": "lab/copies:other_0"}]
    assert len([request for request in stocked.requests if "/resolve/" in request.path]) == asked


def test_nothing_is_said_where_the_hub_tells_another_hash() -> None:
    sha = "a" * 64
    large, small = HubFile("x/sae_weights.safetensors", 10, sha), HubFile("x/cfg.json", 2, "b" * 40)
    assert told([large, small]) == sha and told([small]) == told([]) == ""
    assert told([large, HubFile("x/more.safetensors", 10, "b" * 40)]) == "", "one of two is not enough"
    assert told([large, HubFile("x/sparsity.safetensors", 10, "b" * 40)]) == sha, "what is no weights does not count"
    two = [large, HubFile("x/more.safetensors", 10, "c" * 64)]
    assert told(two) == told(two[::-1]) not in ("", sha)
