"""Taking an SAE away: what hangs on it is said first, what is in use stays, files and rows go together."""

import json
from pathlib import Path
from typing import Any

import pytest
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from concepts.models import FeatureView
from inference.models import Generation
from saehub.jobs.models import Job, State, enqueue
from saes.checksums import checksums, digest
from saes.dependents import dependents, users
from saes.models import SAE, Release
from saes.removal import in_cache, remove
from tests.sae_rows import a_catalogue_row, a_model, a_trained_sae, write_sae
from training.models import Capture, Corpus, Evaluation, Run

pytestmark = pytest.mark.django_db


@pytest.fixture
def used(user_of: Any) -> SAE:
    """An SAE with a run, an evaluation, a view and two generations."""
    model = a_model()
    corpus = Corpus.objects.create(name="docs", source="text", location="t.txt", ready_at=timezone.now())
    capture = Capture.objects.create(name="cap", model=model, corpus=corpus, ready_at=timezone.now())
    sae = a_trained_sae(model=model, owner=user_of("researcher"), notes="Keep me")
    write_sae(sae.files)
    Run.objects.create(
        name="run", capture=capture, sae=sae, hook_name="h", architecture="topk", ready_at=timezone.now()
    )
    Evaluation.objects.create(name="eval", sae=sae, capture=capture, ready_at=timezone.now())
    FeatureView.objects.create(name="view", sae=sae, capture=capture, ready_at=timezone.now())
    for name in ("one", "two"):
        Generation.objects.create(name=name, model=model, sae=sae, prompt="p", ready_at=timezone.now())
    return sae


def url(sae: SAE) -> str:
    return reverse("saes:sae_delete", args=[sae.pk])


def test_what_depends_on_it_is_counted_and_linked(used: SAE, client_of: Any) -> None:
    found = {group.label: (group.count, group.goes) for group in dependents(used)}
    assert found == {"run": (1, False), "evaluation": (1, True), "feature view": (1, True), "generations": (2, True)}
    page = client_of("researcher").get(url(used)).content.decode()
    for row in (Run.objects.get(), Generation.objects.first()):
        assert row.get_absolute_url() in page
    assert "stays, without its SAE" in page and "Keep me" in page


def test_it_goes_with_its_files_and_what_depends_on_it(used: SAE, client_of: Any) -> None:
    response = client_of("researcher").post(url(used), {"what": "all"})
    assert response.status_code == 302 and response.url == reverse("saes:sae_list")
    assert not SAE.objects.exists() and not Generation.objects.exists() and not FeatureView.objects.exists()
    assert Run.objects.get().sae is None and not used.files.exists()


def test_who_may_delete(used: SAE, client_of: Any) -> None:
    assert Client().post(url(used)).url.startswith("/login/")
    for role in ("stranger", "viewer", "annotator"):
        assert client_of(role).post(url(used), {"what": "all"}).status_code == 403
    SAE.objects.filter(pk=used.pk).update(owner=None)
    assert client_of("researcher").get(url(used)).status_code == 403, "what belongs to nobody is the curators'"
    assert client_of("curator").get(url(used)).status_code == 200
    assert SAE.objects.exists() and used.files.exists()


def test_somebody_elses_is_not_ones_own(user_of: Any, client_of: Any) -> None:
    sae = a_trained_sae(owner=user_of("curator"))
    assert client_of("researcher").post(url(sae), {"what": "all"}).status_code == 403
    assert client_of("admin").post(url(sae), {"what": "all"}).status_code == 302


@pytest.mark.parametrize("what", ["evaluate", "generate"])
def test_what_is_in_use_stays_unless_forced_by_a_curator(what: str, used: SAE, client_of: Any, user_of: Any) -> None:
    if what == "evaluate":
        job = enqueue("evaluate", None, title="Evaluate one", sae=used.pk)
    else:
        row = Generation.objects.create(name="now", model=used.model, sae=used, prompt="p")
        job = enqueue("generate", None, title="Generate", generation=row.pk)
        Generation.objects.filter(pk=row.pk).update(job=job)
    assert users(used)
    for data in ({"what": "all"}, {"what": "all", "force": "1"}):
        response = client_of("researcher").post(url(used), data)
        assert response.status_code == (403 if "force" in data else 409)
    assert "It is in use" in client_of("researcher").post(url(used), {"what": "all"}).content.decode()
    assert client_of("curator").post(url(used), {"what": "all"}).status_code == 409
    assert SAE.objects.exists() and used.files.exists()
    assert client_of("curator").post(url(used), {"what": "all", "force": "1"}).status_code == 302
    job.refresh_from_db()
    assert job.state == State.CANCELLED and not SAE.objects.exists() and not used.files.exists()


def test_a_job_of_another_sae_does_not_count(used: SAE) -> None:
    other = a_trained_sae("other")
    enqueue("evaluate", None, title="t", sae=other.pk)
    Job.objects.filter(subject_id=other.pk).update(state=State.DONE)
    assert users(used) == [] and users(other) == []


def test_only_the_files_of_what_the_hub_can_bring_again(client_of: Any, user_of: Any, data_folder: Path) -> None:
    row = a_catalogue_row(
        "l1", owner=user_of("researcher"), path="sae/hub/9", ready_at=timezone.now(), sha256="ab" * 32, d_sae=64,
        checksums={"cfg.json": {"sha256": "0", "bytes": 1}}, verified_at=timezone.now(),
        proof={"source_format": "gemma_scope_1", "source": {"l1/params.npz": {"sha256": "ab" * 32, "bytes": 4321}}},
    )  # fmt: skip
    write_sae(row.files)
    response = client_of("researcher").post(url(row), {"what": "files"})
    assert response.status_code == 302 and response.url == row.get_absolute_url()
    row.refresh_from_db()
    assert not row.ready and row.path == "" and row.format == "gemma_scope_1" and row.size_bytes == 4321
    assert row.sha256 == "ab" * 32 and row.d_sae == 64 and row.verified_at is None and row.proof == {}
    assert not (data_folder / "sae" / "hub" / "9").exists()
    assert "Files removed" in client_of("viewer").get(row.get_absolute_url() + "?tab=history").content.decode()


def test_what_somebody_says_while_its_files_are_removed_stays(user_of: Any, data_folder: Path) -> None:
    row = a_catalogue_row("l1", owner=user_of("researcher"), path="sae/hub/9", ready_at=timezone.now())
    SAE.objects.filter(pk=row.pk).update(notes="Fires on cats.")
    remove(row, user_of("researcher"), keep_row=True, from_cache=False)
    row.refresh_from_db()
    assert row.notes == "Fires on cats." and not row.ready


def test_the_files_of_a_trained_sae_are_not_removed_alone(used: SAE, client_of: Any) -> None:
    page = client_of("researcher").get(url(used)).content.decode()
    assert 'value="files"' not in page
    response = client_of("researcher").post(url(used), {"what": "files"})
    assert "nothing could bring it back" in response.content.decode() and used.files.exists()


# ------------------------------------------------------------------------------------------------------- the Hub's cache


@pytest.fixture
def cached(hub: Any, tmp_path: Path, user_of: Any) -> list[SAE]:
    """Two rows of one repository in the real client's cache; config.json is the same content in both folders."""
    from huggingface_hub import snapshot_download

    files = {"README.md": b"words"}
    for layer in (0, 1):
        folder = write_sae(tmp_path / f"given{layer}", seed=layer)
        files |= {f"layer_{layer}/{path.name}": path.read_bytes() for path in folder.iterdir()}
    hub.repos["models/org/scope"] = files
    root = Path(snapshot_download("org/scope"))
    rows = []
    for layer in (0, 1):
        entry = root / f"layer_{layer}"
        sums = checksums(entry, [path.name for path in entry.iterdir()])
        rows.append(
            a_catalogue_row(
                f"layer_{layer}", owner=user_of("researcher"), path=str(entry), revision=root.name, checksums=sums,
                ready_at=timezone.now(),
            )
        )  # fmt: skip
    return rows


def blobs(sae: SAE) -> list[str]:
    folder = Path(sae.path).parents[2] / "blobs"
    return sorted(path.name for path in folder.iterdir())


def test_the_cache_loses_only_what_nothing_else_uses(cached: list[SAE], user_of: Any) -> None:
    first, second = cached
    before = set(blobs(first))
    mine = {entry["sha256"] for entry in first.checksums.values()}
    theirs = {entry["sha256"] for entry in second.checksums.values()}
    assert mine & theirs, "both have the same cfg.json, stored once"
    remove(first, user_of("researcher"))
    assert set(blobs(second)) == before - (mine - theirs)
    assert all(path.read_bytes() for path in second.files.iterdir())
    assert not any(first.files.iterdir())


def test_the_cache_may_be_left_alone(cached: list[SAE], user_of: Any) -> None:
    before = blobs(cached[0])
    remove(cached[0], user_of("researcher"), from_cache=False)
    assert blobs(cached[1]) == before


def test_files_that_another_row_came_from_stay(cached: list[SAE], client_of: Any) -> None:
    first = cached[0]
    twin = a_catalogue_row(
        "alias", repo_id="org/scope", revision=first.revision, ready_at=timezone.now(), path="sae/hub/7"
    )
    twin.proof = {"source": {f"layer_0/{name}": entry for name, entry in first.checksums.items()}}
    twin.save()
    found = in_cache(first)
    assert found is not None and found.files == [] and found.shared == 2
    page = client_of("researcher").get(url(first)).content.decode()
    assert "2 of its files stay there: other SAEs use them" in page


def test_deleting_what_the_catalogue_lists_says_that_it_comes_again(client_of: Any) -> None:
    release = Release.objects.create(name="scope", repo_id="org/scope", format="saelens")
    page = client_of("curator").get(url(a_catalogue_row(release=release))).content.decode()
    assert "The next sync of the catalogue lists it anew" in page


# ------------------------------------------------------------------------------------------------------- verify


def test_verifying_finds_what_changed(run_job: Any, user_of: Any, hub: Any, cached: list[SAE]) -> None:
    sae = cached[0]
    job = run_job(enqueue("verify", user_of("curator"), title="v", sae=sae.pk))
    assert job.state == State.DONE, job.error
    assert job.result == {"sae": sae.pk, "files": 2, "hub": 2}
    sae.refresh_from_db()
    assert sae.verified_at is not None
    weights = (sae.files / "sae_weights.safetensors").resolve()
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    job = run_job(enqueue("verify", user_of("curator"), title="v", sae=sae.pk))
    assert job.state == State.FAILED and "sae_weights.safetensors is not what it was" in job.error
    sae.refresh_from_db()
    assert sae.verified_at is None
    weights.write_bytes(data[:-1])
    assert "bytes; it had" in run_job(enqueue("verify", None, title="v", sae=sae.pk)).error
    weights.unlink()
    assert "sae_weights.safetensors is missing." in run_job(enqueue("verify", None, title="v", sae=sae.pk)).error
    (sae.files / "cfg.json").unlink()
    said = run_job(enqueue("verify", None, title="v", sae=sae.pk)).error
    assert said == "cfg.json is missing. sae_weights.safetensors is missing.", "also those that the Hub names by git"


def test_verifying_finds_what_the_hub_does_not_have(run_job: Any, hub: Any, cached: list[SAE]) -> None:
    """A file that was noted as it came, but came wrong: only the Hub's listing of the commit can tell."""
    sae = cached[0]
    config = (sae.files / "cfg.json").resolve()
    config.write_text(json.dumps({"other": 1}))
    sae.checksums = checksums(sae.files, sae.checksums)
    sae.save()
    job = run_job(enqueue("verify", None, title="v", sae=sae.pk))
    assert job.state == State.FAILED and "layer_0/cfg.json is not what org/scope has" in job.error


def test_verifying_without_the_hub_goes_by_what_was_noted(run_job: Any, cached: list[SAE], hub: Any) -> None:
    SAE.objects.filter(pk=cached[0].pk).update(repo_id="org/gone")
    job = run_job(enqueue("verify", None, title="v", sae=cached[0].pk))
    assert job.state == State.DONE and job.result["hub"] == 0
    assert any("The Hub was not asked" in line.text for line in job.lines.all())


def test_a_trained_sae_is_verified_by_its_digest(run_job: Any) -> None:
    sae = a_trained_sae()
    write_sae(sae.files)
    SAE.objects.filter(pk=sae.pk).update(sha256=digest(sae.files / "sae_weights.safetensors"))
    assert run_job(enqueue("verify", None, title="v", sae=sae.pk)).state == State.DONE
    SAE.objects.filter(pk=sae.pk).update(sha256="0" * 64)
    assert run_job(enqueue("verify", None, title="v", sae=sae.pk)).state == State.FAILED
