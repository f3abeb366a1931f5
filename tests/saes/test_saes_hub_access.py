"""Whether a repository's files may be had: licence and gate as the Hub says them, asked with the token of who asks."""

from __future__ import annotations

from typing import Any

import pytest
from django.urls import reverse

from saehub.accounts.hub_tokens import save
from saehub.jobs.models import Job, State
from saes.models import SAE, HubRepository
from saes.sharing import licence_of
from tests.mini_hub import MiniHub
from tests.sae_rows import a_catalogue_row, a_trained_sae, write_sae

pytestmark = pytest.mark.django_db
KEY = "models/org/scope"


@pytest.fixture
def row(hub: MiniHub, tmp_path: Any) -> SAE:
    folder = write_sae(tmp_path / "one")
    hub.repos[KEY] = {f"res/layer_1/{path.name}": path.read_bytes() for path in folder.iterdir()}
    hub.cards[KEY] = {"license": "cc-by-4.0"}
    return a_catalogue_row("res/layer_1")


def page(client: Any, sae: SAE) -> str:
    return str(client.get(reverse("saes:sae_access", args=[sae.pk])).content.decode())


def test_an_open_repository(row: SAE, hub: MiniHub, client_of: Any) -> None:
    seen = page(client_of("researcher"), row)
    assert "you have access" in seen and "cc-by-4.0" in seen and "without a token" in seen
    assert 'value="download"' in seen and 'value="download"' not in page(client_of("viewer"), row)
    assert licence_of(row) == "cc-by-4.0"
    row.licence = "mit"
    assert licence_of(row) == "mit", "what a person says counts before"
    assert "cc-by-4.0" in client_of("viewer").get(row.get_absolute_url()).content.decode()


def test_a_gated_one_step_by_step(row: SAE, hub: MiniHub, client_of: Any, user_of: Any, run_job: Any) -> None:
    hub.gated.add(KEY)
    hub.tokens["hf_mine12345"] = "me"
    client = client_of("researcher")
    job = run_job(row.start(user_of("researcher")))
    assert job.state == State.FAILED
    assert reverse("saes:sae_access", args=[row.pk]) in client.get(row.get_absolute_url()).content.decode()
    seen = page(client, row)
    assert "no access" in seen and f"{hub.url}/org/scope" in seen and "Keep a" in seen and "accept its terms" in seen
    save(user_of("researcher"), "hf_mine12345")
    seen = page(client, row)
    assert (
        "has not been granted access" in seen and "Your token is kept here" in seen and "with yours token" not in seen
    )
    assert HubRepository.objects.get().gated == "auto"
    hub.granted.add("hf_mine12345")
    seen = page(client, row)
    assert "you have access" in seen and "Go on with the download" in seen
    client.post(reverse("saes:sae_start", args=[row.pk]), {"kind": "download"})
    assert run_job(Job.objects.first()).state == State.DONE
    assert "hf_mine12345" not in page(client, row)


def test_what_the_hub_does_not_answer_is_not_known(row: SAE, hub: MiniHub, client_of: Any) -> None:
    hub.fault("/api/models/org/scope", "status", 503, times=None)
    seen = page(client_of("researcher"), row)
    assert "not known" in seen and "fault of its own" in seen and "Check again" in seen and "no access" not in seen
    assert not HubRepository.objects.exists()


def test_what_is_not_there_is_no_gate(row: SAE, hub: MiniHub, client_of: Any) -> None:
    del hub.repos[KEY]
    seen = page(client_of("researcher"), row)
    assert "There is no repository org/scope" in seen and "accept its terms" not in seen
    assert client_of("viewer").get(reverse("saes:sae_access", args=[a_trained_sae().pk])).status_code == 404


def test_a_download_keeps_the_licence_and_never_fails_for_it(
    row: SAE, hub: MiniHub, user_of: Any, run_job: Any
) -> None:
    hub.cards[KEY] = {"license": "other", "license_name": "our-own"}
    assert run_job(row.start(user_of("researcher"))).state == State.DONE
    assert licence_of(row) == "our-own"
    other = a_catalogue_row("res/layer_1", repo_id="org/two")
    hub.repos["models/org/two"] = hub.repos[KEY]
    hub.cards["models/org/two"] = {"license": ["mit", 3]}
    hub.fault("/api/models/org/two$", "status", 500, times=None)
    assert run_job(other.start(user_of("curator"))).state == State.DONE


def test_the_api_says_the_same(row: SAE, hub: MiniHub, api: Any) -> None:
    found = api("viewer", "get", f"/saes/{row.pk}/access").json()
    assert (found["granted"], found["licence"], found["gated"], found["token"]) == (True, "cc-by-4.0", "", "")
    assert api("viewer", "get", f"/saes/{a_trained_sae().pk}/access").status_code == 404
    assert api("curator", "patch", f"/saes/{row.pk}", {"licence": "mit"}).json()["licence"] == "mit"
    assert api("curator", "patch", f"/saes/{row.pk}", {"notes": "seen"}).json()["licence"] == "mit"
