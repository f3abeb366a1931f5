"""Somebody else's object: who may make such objects, but not act for others, gets 403 on every way to change one."""

from __future__ import annotations

from typing import Any

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from django.urls import reverse

from concepts import imports
from concepts.models import ConceptConfig, ConceptDictionary, FeatureView, Label, LabelChange
from saehub.jobs.models import Job, State
from tests.api_calls import ask, problem
from tests.conftest import make_user
from tests.sae_rows import a_catalogue_row, a_trained_sae
from tests.training.rows import HOOK, a_capture, a_run
from training.models import Sweep

pytestmark = pytest.mark.django_db
MEMBERS = {"animals": {"description": "", "members": [[3, 1.0, 1, 0.9]]}}


@pytest.fixture
def theirs(user_of: Any) -> dict[str, Any]:
    """Rows of one researcher; another one asks."""
    owner = make_user("owner", "researcher")
    sae, remote = a_trained_sae(owner=owner), a_catalogue_row(owner=owner, asked=["layer"])
    capture = a_capture(owner=owner)
    sae.model, sae.hook_name = capture.model, HOOK
    sae.save()
    run, job = a_run(capture=capture, owner=owner), Job.objects.create(kind="train", queue="gpu", owner=owner)
    Job.objects.filter(pk=job.pk).update(state=State.FAILED)
    sweep = Sweep.objects.create(name="sweep", capture=capture, owner=owner)
    dictionary = ConceptDictionary.objects.create(sae=sae, name="zoo", owner=owner)
    dictionary.change(MEMBERS, owner, "made")
    ConceptConfig.next_version(sae, "calm", [{"feature": 3, "mode": "add", "value": 1.0}], owner)
    Label.objects.name_feature(sae, 3, "cats", owner)
    FeatureView.objects.create(name="view", sae=sae, capture=capture, owner=owner)
    file = SimpleUploadedFile("c.csv", b"neuron_idx,concept_name,score\n5,dogs,1\n")
    mine = SimpleUploadedFile("c.csv", b"neuron_idx,concept_name,score\n5,dogs,1\n")
    return {
        "sae": sae.pk, "remote": remote.pk, "capture": capture.pk, "run": run.pk, "job": job.pk, "sweep": sweep.pk,
        "dictionary": dictionary.pk, "concept": dictionary.concepts.get().pk, "label": LabelChange.objects.get().pk,
        "file": imports.keep(file, owner, sae, dictionary).pk,
        "mine": imports.keep(mine, user_of("researcher"), sae, dictionary).pk,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("post", "/jobs/{job}/cancel", {}),
        ("post", "/jobs/{job}/retry", {}),
        ("delete", "/saes/{sae}", None),
        ("delete", "/saes/{sae}/export/saelens", None),
        ("post", "/saes/{sae}/upload", {"repo_id": "lab/saes"}),
        ("post", "/saes/{remote}/facts", {"layer": 3}),
        ("post", "/saes/{remote}/download", {}),
        ("post", "/saes/download-hf", {"repo_id": "org/scope", "path": "res/layer_1"}),
        ("post", "/train/{run}/stop", {}),
        ("post", "/train/{run}/pause", {}),
        ("post", "/train/{run}/resume", {}),
        ("post", "/train/sweeps/{sweep}/stop", {}),
        ("post", "/train/sweeps/{sweep}/pause", {}),
        ("post", "/train/sweeps/{sweep}/resume", {}),
        ("post", "/activations/{capture}/verify", {}),
        ("post", "/saes/{sae}/harvest", {"activations_id": "{capture}"}),
        ("patch", "/concepts/dictionaries/{dictionary}", {"name": "mine"}),
        ("delete", "/concepts/dictionaries/{dictionary}", None),
        ("post", "/concepts/dictionaries/{dictionary}/concepts", {"name": "dogs", "members": [{"feature": 5}]}),
        ("post", "/concepts/dictionaries/{dictionary}/revert", {"revision": 0}),
        ("patch", "/concepts/concepts/{concept}", {"name": "dogs"}),
        ("delete", "/concepts/concepts/{concept}", None),
        ("post", "/saes/{sae}/features/5/concepts", {"concept": "zoo/animals"}),
        ("post", "/labels/changes/{label}/undo", {}),
        ("post", "/concepts/load/{file}/apply", {}),
        ("post", "/concepts/load/{mine}/apply", {}),
        ("delete", "/concepts/load/{file}", None),
        (
            "post",
            "/concepts/manipulate",
            {"sae_id": "{sae}", "name": "calm", "edits": [{"feature": 3, "mode": "ablate"}]},
        ),
    ],
)
def test_of_the_api(theirs: dict[str, Any], user_of: Any, method: str, path: str, body: Any) -> None:
    answer = ask(user_of("researcher"), method, path.format(**theirs), _filled(body, theirs))
    said = problem(answer, 403)["detail"]
    assert "somebody else" in said or "your own" in said, "the role allows it; that it is another's does not"


def test_a_file_for_somebody_elses_dictionary(theirs: dict[str, Any], user_of: Any) -> None:
    data = {"file": SimpleUploadedFile("c.csv", b"neuron_idx,concept_name,score\n5,dogs,1\n")}
    given = data | {"dictionary_id": theirs["dictionary"]}
    problem(ask(user_of("researcher"), "post", "/concepts/load", data=given), 403, "somebody else")


@pytest.mark.parametrize(
    ("view", "keys", "data"),
    [
        ("jobs:job_cancel", ["job"], {}),
        ("jobs:job_retry", ["job"], {}),
        ("saes:sae_start", ["remote"], {"kind": "download"}),
        ("saes:sae_facts", ["remote"], {"layer": "3"}),
        ("saes:sae_delete", ["sae"], {"what": "row"}),
        ("training:capture_action", ["capture", "verify"], {}),
        ("training:run_stop", ["run"], {}),
        ("training:sweep_stop", ["sweep"], {}),
        ("training:sweep_resume", ["sweep"], {}),
        ("concepts:label_undo", ["label"], {}),
        ("concepts:concept_edit", ["concept"], {"delete": "1"}),
        ("concepts:import_detail", ["file"], {"apply": "1"}),
        ("concepts:import_detail", ["mine"], {"apply": "1"}),
    ],
)
def test_of_the_pages(theirs: dict[str, Any], client_of: Any, view: str, keys: list[str], data: dict[str, str]) -> None:
    address = reverse(view, args=[theirs.get(key, key) for key in keys])
    assert client_of("researcher").post(address, data).status_code == 403


def _filled(body: Any, rows: dict[str, Any]) -> Any:
    """The body with {name} as the number of that row."""
    if isinstance(body, dict):
        return {name: _filled(value, rows) for name, value in body.items()}
    if isinstance(body, list):
        return [_filled(value, rows) for value in body]
    return rows[body[1:-1]] if isinstance(body, str) and body.startswith("{") else body
