"""The page of the Hub's cache: what is needed stays, what goes is said first, and only then does it go."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from django.urls import reverse
from django.utils import timezone
from huggingface_hub import constants

from saehub.jobs.models import State
from saes.cache import look, prune
from saes.models import SAE
from tests.mini_hub import COMMIT, MiniHub
from tests.sae_rows import a_catalogue_row, a_model, write_sae

pytestmark = pytest.mark.django_db
OTHER, MODEL = "a" * 40, "b" * 40


def cached(repo_id: str, commit: str, size: int = 1000, kind: str = "model") -> str:
    """A repository in the cache, as the Hub's library lays it out. Returns its key."""
    store = Path(constants.HF_HUB_CACHE) / f"{kind}s--{repo_id.replace('/', '--')}"
    blob = store / "blobs" / commit
    for folder in (store / "blobs", store / "refs", store / "snapshots" / commit):
        folder.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(b"x" * size)
    (store / "snapshots" / commit / "weights.safetensors").symlink_to(
        os.path.relpath(blob, store / "snapshots" / commit)
    )
    (store / "refs" / "main").write_text(commit)
    return f"{kind}/{repo_id}@{commit}"


@pytest.fixture
def stocked(hub: MiniHub, tmp_path: Path, run_job: Any, user_of: Any) -> SAE:
    """An SAE whose files lie in the cache, a model that is needed, and a repository that nothing needs."""
    folder = write_sae(tmp_path / "one")
    hub.repos["models/org/scope"] = {f"res/layer_1/{path.name}": path.read_bytes() for path in folder.iterdir()}
    row = a_catalogue_row("res/layer_1")
    assert run_job(row.start(user_of("researcher"))).state == State.DONE
    cached("org/tiny", MODEL)
    a_model("tiny", source="hub", location="org/tiny", revision=MODEL)
    cached("org/old", OTHER, size=5000)
    row.refresh_from_db()
    return row


def test_what_something_needs_is_told_apart(stocked: SAE) -> None:
    found = {one.repo_id: one for one in look().revisions}
    assert {name: one.free for name, one in found.items()} == {"org/scope": False, "org/tiny": False, "org/old": True}
    assert found["org/scope"].users == (stocked,) and look().prunable == 5000
    stocked.path, stocked.proof = "sae/hub/1", {"source": {}}  # it was converted: its source is needed no more
    stocked.save()
    assert {one.repo_id for one in look().revisions if one.free} == {"org/scope", "org/old"}


def test_what_is_on_its_way_stays(stocked: SAE, user_of: Any) -> None:
    row = a_catalogue_row("x", repo_id="org/old")
    row.start(user_of("researcher"))
    assert [one.busy for one in look().revisions if one.repo_id == "org/old"] == [True]
    assert prune([f"model/org/old@{OTHER}"], dry_run=False).kept == [f"model/org/old@{OTHER}"]
    assert look().size > 5000


def test_the_page_says_first_what_would_go(stocked: SAE, client_of: Any) -> None:
    url, keys = reverse("saes:hub_cache"), [f"model/org/old@{OTHER}", f"model/org/scope@{COMMIT}", "nonsense"]
    page = client_of("viewer").get(url).content.decode()
    assert "org/<wbr>old" in page and stocked.get_absolute_url() in page and 'name="revision"' not in page
    assert client_of("researcher").post(url, {"revision": keys}).status_code == 403
    plan = client_of("curator").post(url, {"revision": keys}).content.decode()
    assert "This would free" in plan and "Nothing was deleted yet" in plan and "2 of the chosen stay" in plan
    assert (Path(constants.HF_HUB_CACHE) / "models--org--old").exists()
    done = client_of("curator").post(url, {"revision": keys, "sure": "1"}, follow=True).content.decode()
    assert "of the Hub&#x27;s cache were freed" in done and "org/<wbr>old" not in done
    assert not (Path(constants.HF_HUB_CACHE) / "models--org--old").exists()
    stocked.refresh_from_db()
    assert stocked.all_here, "what an SAE needs is still there"


def test_old_rests_can_go_and_young_ones_stay(stocked: SAE, client_of: Any) -> None:
    blobs = Path(constants.HF_HUB_CACHE) / "models--org--old" / "blobs"
    for name, age in (("old", 3 * 86400), ("young", 60)):
        (blobs / f"{name}.incomplete").write_bytes(b"rest")
        os.utime(blobs / f"{name}.incomplete", (time.time() - age,) * 2)
    (blobs / "gone.incomplete").symlink_to("nowhere")  # as one that ends while the page looks
    assert "1 unfinished file of old downloads" in client_of("curator").get(reverse("saes:hub_cache")).content.decode()
    client_of("curator").post(reverse("saes:hub_cache"), {"unfinished": "1", "sure": "1"})
    assert sorted(path.name for path in blobs.glob("*.incomplete")) == ["gone.incomplete", "young.incomplete"]


def test_revisions_of_one_name_in_two_repositories_are_not_touched(stocked: SAE, client_of: Any) -> None:
    cached("org/twin", MODEL)
    with pytest.raises(ValueError, match="neither of them is touched"):
        prune([f"model/org/twin@{MODEL}"], dry_run=False)
    said = client_of("curator").post(reverse("saes:hub_cache"), {"revision": [f"model/org/twin@{MODEL}"]}, follow=True)
    assert "neither of them is touched" in said.content.decode()


def test_an_empty_cache_and_an_offline_hub(hub: MiniHub, client_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    page = client_of("viewer").get(reverse("saes:hub_cache")).content.decode()
    assert "The cache is empty" in page and hub.url in page and "the Hub is never asked" not in page
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("saes:hub_cache", "saes:sae_list", "saes:sae_download"):
        assert "HF_HUB_OFFLINE is set" in client_of("researcher").get(reverse(name)).content.decode(), name


@pytest.mark.parametrize("n", [1, 3])
def test_the_page_asks_the_same_few_questions(
    n: int, hub: MiniHub, client_of: Any, django_assert_num_queries: Any
) -> None:
    client = client_of("viewer")
    for i in range(n):
        commit = str(i) * 40
        cached(f"org/r{i}", commit)
        place = Path(constants.HF_HUB_CACHE) / f"models--org--r{i}" / "snapshots" / commit
        a_catalogue_row(f"s{i}", repo_id=f"org/r{i}", revision=commit, path=str(place), ready_at=timezone.now())
    with django_assert_num_queries(9):
        page = client.get(reverse("saes:hub_cache")).content.decode()
    assert page.count('<th scope="row"') == n


def test_the_api_does_the_same(stocked: SAE, api: Any) -> None:
    found = api("viewer", "get", "/cache").json()
    free = [one["key"] for one in found["revisions"] if one["free"]]
    assert free == [f"model/org/old@{OTHER}"] and found["prunable"] == 5000
    assert api("researcher", "post", "/cache/prune", {"revisions": free}).status_code == 403
    assert api("curator", "post", "/cache/prune", {"revisions": free}).json()["bytes"] == 5000
    assert len(api("viewer", "get", "/cache").json()["revisions"]) == 3, "a dry run deletes nothing"
    done = api("curator", "post", "/cache/prune", {"revisions": [*free, "x"], "dry_run": False}).json()
    assert (done["dry_run"], done["kept"]) == (False, ["x"])
    assert len(api("viewer", "get", "/cache").json()["revisions"]) == 2
