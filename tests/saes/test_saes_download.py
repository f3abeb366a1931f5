"""The job that brings an SAE from the Hub: from a row of the catalogue to one that can be used."""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save

from saehub.accounts import hub_tokens
from saehub.jobs.models import Job, State
from saes.abilities import why_not
from saes.layouts import beside
from saes.models import SAE, LanguageModel
from saes.numerics.formats import load_sae
from tests.mini_hub import COMMIT, MiniHub

GOLDEN = Path(__file__).parent.parent / "golden" / "saelens_topk"
REPO = "lab/saes"
PLACE = "layer_1/width_64"
TOKEN = "hf_verySecretOfTheResearcher9876"


def golden(place: str = PLACE) -> dict[str, bytes]:
    """An SAE as its authors published it, and what lies beside it."""
    files = {f"{place}/{name}": (GOLDEN / name).read_bytes() for name in ("cfg.json", "sae_weights.safetensors")}
    return files | {
        "README.md": b"# SAEs",
        f"{place}/README.md": b"# this one",
        "layer_2/sae_weights.safetensors": b"x",
    }


def row_of(owner: Any = None, **fields: Any) -> SAE:
    given = {"name": "sae", "source": SAE.Source.HUB, "repo_id": REPO, "repo_path": PLACE, "owner": owner} | fields
    row: SAE = SAE.objects.create(**given)
    return row


@pytest.fixture
def stocked(hub: MiniHub) -> MiniHub:
    hub.repos[f"models/{REPO}"] = golden()
    return hub


@pytest.fixture
def bring(run_job: Any, user_of: Any) -> Callable[..., tuple[SAE, Job]]:
    def call(row: SAE | None = None, **fields: Any) -> tuple[SAE, Job]:
        user = user_of("researcher")
        row = row or row_of(user, **fields)
        job = run_job(row.start(user))
        if SAE.objects.filter(pk=row.pk).exists():
            row.refresh_from_db()
        return row, job

    return call


@pytest.mark.django_db
def test_a_row_becomes_an_sae_that_can_be_used(stocked: MiniHub, bring: Any) -> None:
    row, job = bring()
    assert job.state == State.DONE, job.traceback
    assert row.ready and row.revision == COMMIT and job.result["commit"] == COMMIT
    assert row.files.is_relative_to(constants.HF_HUB_CACHE), "where the Hub's cache has it: no second copy"
    here, there = load_sae(row.files), load_sae(GOLDEN)
    x = torch.randn(5, there.config.d_in, generator=torch.Generator().manual_seed(0))
    assert torch.equal(here.encode(x), there.encode(x))
    assert (row.d_in, row.d_sae) == (there.config.d_in, there.config.d_sae)


@pytest.mark.django_db
def test_only_its_own_files_are_fetched(stocked: MiniHub, bring: Any) -> None:
    bring()
    fetched = {asked.path.rpartition("/")[2] for asked in stocked.requests if "/resolve/" in asked.path}
    assert fetched == {"cfg.json", "sae_weights.safetensors"}
    assert not [asked for asked in stocked.requests if "layer_2" in asked.path]


@pytest.mark.django_db
def test_a_crosscoder_is_brought_with_all_its_layers(hub: MiniHub, bring: Any) -> None:
    path, d, m = "crosscoder/layer_5_9_width_65k_l0_medium", 6, 20
    hooks = "model.layers.{5,9}.output"
    config = {
        "type": "crosscoder", "architecture": "jump_relu", "width": 2 * m, "model_name": "google/gemma-3-270m-pt",
        "hf_hook_point_in": hooks, "hf_hook_point_out": hooks,
    }  # fmt: skip
    shapes = {"w_enc": (d, m), "b_enc": (m,), "threshold": (m,), "w_dec": (m, 2, d), "b_dec": (d,)}
    files = {f"{path}/config.json": json.dumps(config).encode()} | {
        f"{path}/params_layer_{n}.safetensors": save({name: torch.rand(*shape) for name, shape in shapes.items()})
        for n in range(2)
    }
    hub.repos["models/google/gemma-scope-2-270m-pt"] = files
    row, job = bring(repo_id="google/gemma-scope-2-270m-pt", repo_path=path, format="gemma_scope_2")
    assert (job.state, job.error) == (State.DONE, "")
    assert (row.architecture, row.site, row.layer, row.d_sae) == ("causal_crosscoder", "crosscoder", None, 2 * m)
    assert row.size_bytes == sum(map(len, files.values())) and row.format == "gemma_scope_2"
    assert why_not(row, "steer") == why_not(row, "read") and "several places" in why_not(row, "steer")


@pytest.mark.django_db
def test_a_second_time_nothing_is_asked(stocked: MiniHub, bring: Any) -> None:
    row, _ = bring()
    stocked.close()
    again, job = bring(row)
    assert job.state == State.DONE and again.ready_at == row.ready_at


@pytest.mark.django_db
def test_files_that_were_cleared_from_the_cache_are_brought_again(stocked: MiniHub, bring: Any) -> None:
    """Also where some are still here: a folder that is there is not yet an SAE that is."""
    row, _ = bring()
    weights = row.files / "sae_weights.safetensors"
    weights.resolve().unlink()
    weights.unlink()
    assert row.files.exists() and not row.all_here
    again, job = bring(row)
    assert job.state == State.DONE and again.all_here and weights.exists() and again.sha256 == row.sha256


@pytest.mark.django_db
def test_an_sae_whose_files_are_cached_is_brought_offline(stocked: MiniHub, bring: Any, monkeypatch: Any) -> None:
    row, _ = bring()
    row.delete()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    row, job = bring()
    assert job.state == State.DONE and row.revision == COMMIT, job.error


@pytest.mark.django_db
@pytest.mark.parametrize(
    "fields, says, hint",
    [
        ({"repo_path": "layer_1/width_65"}, f"{REPO} has no SAE weights at layer_1/width_65.", f"The nearest are: {PLACE}"),
        ({"repo_path": "nowhere/at/all"}, f"{REPO} has no SAE weights at nowhere/at/all.", "Look at its files"),
        ({"repo_id": "lab/none"}, "There is no repository lab/none on the Hub", "Check the name."),
        ({"revision": "v9"}, f"{REPO} has no such revision", "See http"),
        ({"repo_id": "", "repo_path": ""}, "sae has no repository to download it from.", "Import its files"),
        ({"repo_id": "lab/gated"}, "lab/gated is gated: accept its terms on", "Set your Hub token under Account"),
    ],
)  # fmt: skip
def test_each_refusal_has_a_sentence_and_says_what_to_do(
    stocked: MiniHub, bring: Any, fields: dict[str, str], says: str, hint: str
) -> None:
    stocked.repos["models/lab/gated"] = golden()
    stocked.gated.add("models/lab/gated")
    row, job = bring(**fields)
    assert job.state == State.FAILED and not row.ready
    assert job.error.startswith(says) and hint in job.hint, (job.error, job.hint)


@pytest.mark.django_db
def test_a_place_that_holds_nothing_leaves_no_row_but_its_job(stocked: MiniHub, bring: Any, client_of: Any) -> None:
    row, job = bring(repo_path="nowhere")
    assert not SAE.objects.filter(pk=row.pk).exists() and not job.can_retry
    client = client_of("researcher")
    page = client.get(f"/saes/{row.pk}/")
    assert page.url == job.get_absolute_url() and "no SAE weights at nowhere" in client.get(page.url).content.decode()
    for kept in ({"notes": "somebody's words"}, {"curation": "reviewed"}):
        known, job = bring(repo_path="nowhere", **kept)
        assert job.state == State.FAILED and SAE.objects.filter(pk=known.pk).exists(), kept
        known.delete()


@pytest.mark.django_db
def test_a_disk_that_fills_up_is_a_sentence_and_loses_nothing(
    stocked: MiniHub, bring: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from saes.hub_fetch import Transfer

    written = Transfer._write

    def full(self: Any, response: Any, part: Any, *rest: Any) -> None:
        written(self, response, part, *rest)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Transfer, "_write", full)
    row, job = bring()
    assert job.state == State.FAILED and "became full while" in job.error and constants.HF_HUB_CACHE in job.error
    assert "what was brought stays" in job.hint
    monkeypatch.setattr(Transfer, "_write", written)
    row, job = bring(row)
    assert job.state == State.DONE, job.error


@pytest.mark.django_db
def test_a_gated_one_is_brought_once_access_was_granted(
    stocked: MiniHub, bring: Any, user_of: Any, run_job: Any, client_of: Any
) -> None:
    stocked.gated.add(f"models/{REPO}")
    stocked.tokens[TOKEN] = "ada"
    hub_tokens.save(user_of("researcher"), TOKEN)
    row, job = bring()
    assert "has not been granted access" in job.error and f"{stocked.url}/{REPO}" in job.hint
    page = client_of("researcher").get(job.get_absolute_url()).content.decode()
    assert f'<a href="{stocked.url}/{REPO}"' in page, "the page to accept the terms on is a click away"
    stocked.granted.add(TOKEN)
    assert job.retry()
    assert run_job(job).state == State.DONE
    row.refresh_from_db()
    assert row.ready


@pytest.mark.django_db
def test_the_token_of_who_asked_is_in_no_row_line_page_or_log(
    stocked: MiniHub, bring: Any, user_of: Any, client_of: Any, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    """After a success and after failures of every kind, also one that no code of ours expects."""
    caplog.set_level(logging.DEBUG)
    stocked.tokens[TOKEN] = "ada"
    hub_tokens.save(user_of("researcher"), TOKEN)
    bring(repo_path="nowhere")
    stocked.gated.add(f"models/{REPO}")
    bring(name="gated", repo_path=PLACE)
    SAE.objects.all().delete()
    stocked.gated.clear()
    stocked.fault("weights", "status", 418)
    bring()
    SAE.objects.all().delete()
    with monkeypatch.context() as broken:
        broken.setattr("saes.hub_fetch._check", lambda response, *_: 1 / 0)
        bring()
    SAE.objects.all().delete()
    stocked.tokens = {"hf_other": "x"}
    bring()
    SAE.objects.all().delete()
    stocked.tokens = {TOKEN: "ada"}
    _, job = bring()
    assert job.state == State.DONE, "what was cut short before is gone on with"
    states = list(Job.objects.values_list("state", flat=True))
    assert states.count("failed") == 5
    assert any("ZeroDivisionError" in text for text in Job.objects.values_list("traceback", flat=True))
    assert {asked.authorization for asked in stocked.gets("weights.safetensors")} == {f"Bearer {TOKEN}"}
    kept = str([list(Job.objects.values()), list(SAE.objects.values())])
    kept += "".join(line.text for job in Job.objects.all() for line in job.lines.all())
    client = client_of("admin")
    kept += "".join(client.get(job.get_absolute_url()).content.decode() for job in Job.objects.all())
    assert len(kept) > 10_000
    for part in (TOKEN, TOKEN[3:-4], "signature=secret"):
        assert part not in kept
    assert TOKEN not in caplog.text


@pytest.mark.django_db
def test_a_token_that_cannot_be_read_any_more_is_a_sentence(
    stocked: MiniHub, bring: Any, user_of: Any, settings: Any
) -> None:
    hub_tokens.save(user_of("researcher"), TOKEN)
    settings.SECRET_KEY = "another"
    _, job = bring()
    assert job.state == State.FAILED
    assert "SECRET_KEY has changed" in job.error and "Account" in job.hint


NAMES = [
    "README.md", "a/cfg.json", "a/w.safetensors", "a/examples.safetensors", "a/optimizer.pt", "a/sub/w.safetensors",
    "b/checkpoints/final.safetensors", "b/hyperparams.json", "ab/w.safetensors",
]  # fmt: skip


@pytest.mark.parametrize(
    "entry, files",
    [
        ("a", {"a/cfg.json", "a/w.safetensors"}),
        ("a/w.safetensors", {"a/cfg.json", "a/w.safetensors"}),
        ("b", {"b/checkpoints/final.safetensors", "b/hyperparams.json"}),
        ("c", set()),
    ],
)
def test_what_lies_beside_weights_of_an_unknown_format(entry: str, files: set[str]) -> None:
    assert set(beside(entry, NAMES)) == files


@pytest.mark.django_db
def test_a_language_model_is_brought_with_the_token_of_who_asked(
    hub: MiniHub, tiny_model_dir: Path, user_of: Any, run_job: Any
) -> None:
    hub.repos["models/lab/private"] = {file.name: file.read_bytes() for file in tiny_model_dir.iterdir()}
    hub.private.add("models/lab/private")
    hub.tokens[TOKEN] = "ada"
    user = user_of("researcher")
    hub_tokens.save(user, TOKEN)
    row = LanguageModel.objects.create(name="m", source="hub", location="lab/private", owner=user)
    assert run_job(row.start(user)).state == State.DONE
