"""/api/v1 of the registry: what the pages can do, under the same permissions, with sentences when it says no."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from inference.models import Generation
from saehub.jobs.models import Job, State, enqueue
from saes.models import SAE, Release
from tests.api_calls import problem
from tests.sae_rows import a_catalogue_row, a_model, a_trained_sae, write_sae

pytestmark = pytest.mark.django_db
SCOPE = "google/gemma-scope-2b-pt-res"


# ------------------------------------------------------------------------------------------------------- the list


def test_the_list_holds_everything_and_is_narrowed_as_the_page_is(api: Any) -> None:
    a_trained_sae("alpha", l0=8.0)
    a_catalogue_row("beta", model_name="gemma-2-2b", published_l0=80.0, layer=12)
    a_catalogue_row("gamma", model_name="gemma-2-2b", layer=13)

    def names(query: str) -> list[str]:
        return [row["name"] for row in api("viewer", "get", f"/saes{query}").json()["items"]]

    assert sorted(names("")) == ["alpha", "beta", "gamma"]
    assert names("?state=here") == ["alpha"] and names("?model=gemma-2-2b&sort=-name") == ["gamma", "beta"]
    assert names("?model_name=gemma-2-2b&layer=12&layer=13&sort=name") == ["beta", "gamma"]
    assert names("?q=bet") == names("?search=bet") == ["beta"]
    assert names("?l0_min=10") == ["beta"] and names("?sort=name&limit=1&offset=1") == ["beta"] == names(
        "?sort=name&limit=1&skip=1"
    )
    body = api("viewer", "get", "/saes?facets=true&source=hub").json()
    assert body["count"] == 2 and body["facets"]["layer"] == {"12": 1, "13": 1}
    assert body["facets"]["source"] == {"trained": 1, "hub": 2}, "counts without its own filter"
    row = next(row for row in body["items"] if row["name"] == "gamma")
    assert (row["state"], row["l0"], row["published_l0"], row["size_bytes"], row["d_sae"]) == (
        "new",
        None,
        None,
        None,
        None,
    )


def test_the_list_asks_as_often_for_three_rows_as_for_one(
    api: Any, user_of: Any, django_assert_num_queries: Any
) -> None:
    def make(name: str) -> None:
        job = Job.objects.create(kind="download", queue="io", title=name)
        a_catalogue_row(
            name,
            owner=user_of("curator"),
            job=job,
            release=Release.objects.create(name=name, repo_id="o/r", format="x"),
        )

    api("viewer", "get", "/saes")
    for names in (("first",), ("second", "third")):
        for name in names:
            make(name)
        with django_assert_num_queries(
            10
        ):  # new token, token, its use, two of permissions, three of counts, keys, rows
            found = api("viewer", "get", "/saes").json()
    assert len(found["items"]) == 3


def test_one_sae_with_all_that_is_known(api: Any) -> None:
    sae = a_trained_sae(
        model=a_model(), config={"d_in": 32}, metrics={"l0": {"value": 8.0}}, hook_name_out="blocks.1.hook_mlp_out"
    )
    body = api("viewer", "get", f"/saes/{sae.pk}", scope="read").json()
    assert (body["id"], body["d_sae"], body["metrics"]["l0"]["value"]) == (sae.pk, 256, 8.0)
    assert "A transcoder predicts" in body["cannot"]["steer"] and "harvest" not in body["cannot"]
    assert api("viewer", "get", f"/saes/{sae.pk}/config").json() == {"d_in": 32}
    problem(api("viewer", "get", "/saes/99999"), 404)
    problem(api("viewer", "get", "/saes/99999/config"), 404)
    problem(api("stranger", "get", f"/saes/{sae.pk}"), 403)
    problem(Client().get(f"/api/v1/saes/{sae.pk}"), 401)


# ------------------------------------------------------------------------------------------------------- downloads


def test_a_place_on_the_hub_is_queued(api: Any, user_of: Any) -> None:
    body = {"repo_id": "org/saes", "path": "layer_3", "revision": "main", "name": "Mine", "model_name": "gpt2"}
    answer = api("researcher", "post", "/saes/download-hf", body)
    assert answer.status_code == 202, answer.content
    row = SAE.objects.get()
    assert (row.repo_id, row.repo_path, row.revision, row.name, row.model_name) == (
        "org/saes",
        "layer_3",
        "main",
        "Mine",
        "gpt2",
    )
    assert row.owner == user_of("researcher") and row.job.kind == "download"
    assert answer.json()["sae"] == row.pk and answer.json()["job"]["id"] == row.job_id
    again = api("researcher", "post", "/saes/download-hf", body)
    assert again.status_code == 202 and again.json()["job"]["id"] == row.job_id and SAE.objects.count() == 1


@pytest.mark.parametrize("name", ["path", "filepath", "filename", "hf_filepath"])
def test_the_peers_field_names_are_taken(name: str, api: Any) -> None:
    body = {"hf_repo_id" if name.startswith("hf") else "repo_id": "org/saes", name: "layer_3", "description": "words"}
    assert api("researcher", "post", "/saes/download-hf", body).status_code == 202
    assert (SAE.objects.get().repo_path, SAE.objects.get().notes) == ("layer_3", "words")


def scope_rows() -> None:
    for layer in (0, 1):
        for l0 in (10, 80, 150):
            path = f"layer_{layer}/width_16k/average_l0_{l0}"
            a_catalogue_row(
                path, repo_id=SCOPE, published_l0=l0, layer=layer, format="gemma_scope_1", model_name="gemma-2-2b"
            )


def test_variants_of_gemma_scope(api: Any) -> None:
    scope_rows()
    assert api("viewer", "get", "/saes/gemma-scope/variants").json() == {"repositories": [SCOPE]}
    body = api("viewer", "get", f"/saes/gemma-scope/variants?repo_id={SCOPE}&layer=1").json()
    assert body["count"] == 3 and body["origin"] == "the catalogue" and body["facets"]["layer"] == {"0": 3, "1": 3}
    first = body["items"][0]
    assert (first["layer"], first["width"], first["hook_name"]) == (1, "16k", "blocks.1.hook_resid_post")
    nearest = api("viewer", "get", f"/saes/gemma-scope/variants?repo_id={SCOPE}&l0=100").json()["items"]
    assert [one["l0"] for one in nearest] == [80.0, 80.0]
    assert (
        "not a Gemma Scope repository"
        in problem(api("viewer", "get", "/saes/gemma-scope/variants?repo_id=a/b"), 422)["detail"]
    )


def test_a_pick_of_gemma_scope_has_to_be_one(api: Any) -> None:
    scope_rows()
    pick = {"repo_id": SCOPE, "layer": 1, "width": "16k", "l0": 100}
    answer = api("researcher", "post", "/saes/download-hf", {"gemma_scope": pick})
    assert answer.status_code == 202, answer.content
    row = SAE.objects.get(repo_path="layer_1/width_16k/average_l0_80")
    assert answer.json()["sae"] == row.pk and row.job.state == State.QUEUED
    body = problem(api("researcher", "post", "/saes/download-hf", {"gemma_scope": {"repo_id": SCOPE, "layer": 1}}), 422)
    assert body["detail"].startswith("3 variants of") and body["facets"]["layer"] == {"0": 3, "1": 3}
    problem(api("researcher", "post", "/saes/download-hf", {"gemma_scope": {"repo_id": SCOPE, "layer": 9}}), 422)


def test_a_batch_by_wishes(api: Any) -> None:
    scope_rows()
    answer = api(
        "researcher", "post", "/saes/download-hf", {"saes": [{"repo": SCOPE, "layers": "0-1", "l0": "nearest:100"}]}
    )
    assert answer.status_code == 202 and len(answer.json()["saes"]) == 2
    assert Job.objects.filter(kind="download").count() == 2
    body = problem(api("researcher", "post", "/saes/download-hf", {"saes": [{"model": "no-such-model"}]}), 422)
    assert "no-such-model" in body["detail"]


@pytest.mark.parametrize(
    "body, part",
    [
        ({}, "Say one of"),
        ({"repo_id": "a/b", "release": "x"}, "Say one of"),
        ({"repo_id": "nonsense"}, "not a repository id"),
        ({"repo_id": "a/b", "path": "../../etc"}, "not a repository id"),
        ({"repo_id": "a/b", "access_token": "hf_secret"}, "keep it in your account"),
        ({"repo_id": "a/b", "unknown": 1}, "unknown"),
        ({"repo_id": 5}, "repo_id"),
    ],
)
def test_a_bad_request_is_told_why(body: dict[str, Any], part: str, api: Any) -> None:
    answer = problem(api("researcher", "post", "/saes/download-hf", body), 422)
    assert part in answer["detail"] + str(answer.get("errors", "")) and "hf_secret" not in json.dumps(answer)
    assert not SAE.objects.exists()


@pytest.mark.parametrize("kind", ["download", "inspect", "verify"])
def test_jobs_of_one_sae(kind: str, api: Any) -> None:
    row = a_trained_sae() if kind == "verify" else a_catalogue_row()
    path = f"/saes/{row.pk}/{kind}"
    problem(api("viewer", "post", path), 403)
    problem(api("curator", "post", path, scope="read"), 403)
    if kind == "verify":
        problem(api("researcher", "post", path), 403)
    answer = api("curator", "post", path)
    assert answer.status_code == 202 and answer.json()["job"]["kind"] == kind
    refused = a_catalogue_row("other") if kind == "verify" else a_trained_sae("other")
    problem(api("curator", "post", f"/saes/{refused.pk}/{kind}"), 409)


# ------------------------------------------------------------------------------------------------------- imports


def test_files_are_imported(api: Any, tmp_path: Path, run_job: Any) -> None:
    folder = write_sae(tmp_path / "given")
    files = [SimpleUploadedFile(path.name, path.read_bytes()) for path in folder.iterdir()]
    answer = api("researcher", "post", "/saes/import", data={"files": files, "name": "Mine", "model_name": "gpt2"})
    assert answer.status_code == 202, answer.content
    row = SAE.objects.get(pk=answer.json()["sae"])
    assert run_job(row.job).state == State.DONE
    row.refresh_from_db()
    assert row.ready and row.name == "Mine" and row.model_name == "gpt2" and row.d_sae == 64


def test_an_archive_and_a_path_are_imported(api: Any, tmp_path: Path, settings: Any, run_job: Any) -> None:
    folder = write_sae(settings.IMPORT_DIRS[0] / "one")
    answer = api("researcher", "post", "/saes/import", data={"path": str(folder)})
    assert answer.status_code == 202 and run_job(SAE.objects.get().job).state == State.DONE
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for path in write_sae(tmp_path / "two", seed=2).iterdir():
            archive.write(path, f"deep/{path.name}")
    answer = api("researcher", "post", "/saes/import", data={"files": SimpleUploadedFile("a.zip", out.getvalue())})
    assert answer.status_code == 202 and run_job(SAE.objects.latest("pk").job).state == State.DONE


def test_a_bad_import_is_told_why(api: Any) -> None:
    assert "Choose the files" in problem(api("researcher", "post", "/saes/import", data={"name": "x"}), 422)["detail"]
    body = problem(api("researcher", "post", "/saes/import", data={"path": "/etc"}), 422)
    assert "may read only under" in body["errors"]["path"][0]
    problem(api("viewer", "post", "/saes/import", data={"path": "/etc"}), 403)
    assert not SAE.objects.exists()


def test_what_is_asked_can_be_said(api: Any, user_of: Any) -> None:
    row = SAE.objects.create(
        name="mine", source="file", asked=["k", "apply_b_dec_to_input"], owner=user_of("researcher")
    )
    path = f"/saes/{row.pk}/facts"
    assert "k" in problem(api("researcher", "post", path, {"k": "many"}), 422)["errors"]
    assert api("researcher", "post", path, {"k": 4, "apply_b_dec_to_input": False}).status_code == 202
    row.refresh_from_db()
    assert row.facts == {"k": 4, "apply_b_dec_to_input": False} and row.job.kind == "adopt"
    problem(api("researcher", "post", path, {"k": 4}), 409)


# ------------------------------------------------------------------------------------------------------- changing


def test_curation_and_notes(api: Any) -> None:
    sae = a_trained_sae()
    problem(api("researcher", "patch", f"/saes/{sae.pk}", {"curation": "published"}), 403)
    body = api("curator", "patch", f"/saes/{sae.pk}", {"curation": "published", "notes": "Checked."}).json()
    assert (body["curation"], body["notes"]) == ("published", "Checked.")
    assert any(
        "curation" in name
        for name in problem(api("curator", "patch", f"/saes/{sae.pk}", {"curation": "x"}), 422)["errors"]
    )
    problem(api("curator", "patch", f"/saes/{sae.pk}", {"d_sae": 1}), 422)
    sae.refresh_from_db()
    assert sae.curation == "published" and sae.d_sae == 256


def test_deleting_is_refused_while_it_is_in_use(api: Any, user_of: Any) -> None:
    sae = a_trained_sae(owner=user_of("researcher"))
    write_sae(sae.files)
    job = enqueue("evaluate", None, title="Evaluate one", sae=sae.pk)
    for role in ("viewer", "annotator"):
        problem(api(role, "delete", f"/saes/{sae.pk}"), 403)
    body = problem(api("researcher", "delete", f"/saes/{sae.pk}"), 409)
    assert body["users"] == [f"Evaluate one (job {job.pk}) is waiting."] and body["dependents"] == []
    problem(api("researcher", "delete", f"/saes/{sae.pk}?force=true"), 403)
    problem(api("curator", "delete", f"/saes/{sae.pk}?force=true", scope="read"), 403)
    assert sae.files.exists()
    done = api("curator", "delete", f"/saes/{sae.pk}?force=true")
    assert done.status_code == 200 and done.json()["deleted"] and not SAE.objects.exists() and not sae.files.exists()
    job.refresh_from_db()
    assert job.state == State.CANCELLED


def test_deleting_is_refused_while_results_of_it_are_here(api: Any, user_of: Any) -> None:
    """Nobody is at work on it, but somebody's generation would go with it: that has to be said once more."""
    sae = a_trained_sae(owner=user_of("researcher"), model=a_model())
    write_sae(sae.files)
    Generation.objects.create(name="g", model=sae.model, sae=sae, prompt="p", ready_at=timezone.now())
    problem(api("viewer", "delete", f"/saes/{sae.pk}"), 403)
    problem(api("annotator", "delete", f"/saes/{sae.pk}"), 403)
    body = problem(api("researcher", "delete", f"/saes/{sae.pk}"), 409, "1 generation, deleted with it")
    assert body["dependents"] == [{"what": "generation", "count": 1, "goes": True}] and body["users"] == []
    assert sae.files.exists() and Generation.objects.exists()
    done = api("researcher", "delete", f"/saes/{sae.pk}?force=true")
    assert done.status_code == 200 and not SAE.objects.exists() and not Generation.objects.exists()
    assert not sae.files.exists()


def test_only_the_files_may_go(api: Any) -> None:
    row = a_catalogue_row("l1", path="sae/hub/9", ready_at=timezone.now())
    write_sae(row.files)
    body = api("curator", "delete", f"/saes/{row.pk}?keep_row=true").json()
    row.refresh_from_db()
    assert not body["deleted"] and not row.ready and row.path == ""
    problem(api("curator", "delete", f"/saes/{a_trained_sae().pk}?keep_row=true"), 422)


# ------------------------------------------------------------------------------------------------------- catalogue


def test_the_catalogue(api: Any) -> None:
    release = Release.objects.create(name="scope-res", repo_id="org/scope", format="saelens", model_name="gemma-2-2b")
    row = a_catalogue_row("scope-res/layer_1", release=release, sae_id="layer_1", repo_path="layer_1")
    body = api("viewer", "get", "/catalogue/releases?q=scope").json()
    assert body["count"] == 1 and body["items"][0]["name"] == "scope-res"
    assert api("viewer", "get", "/catalogue/resolve?q=scope-res/layer_1").json()["sae"]["id"] == row.pk
    problem(api("researcher", "post", "/catalogue/sync"), 403)
    assert api("curator", "post", "/catalogue/sync").status_code == 202
    assert Job.objects.get().kind == "sync"


# ------------------------------------------------------------------------------------------------------- its description


def test_the_description_has_examples_and_the_page_needs_a_login(client_of: Any) -> None:
    schema = client_of("viewer").get("/api/v1/openapi.json").json()
    paths = schema["paths"]
    for path in (
        "/saes",
        "/saes/{pk}",
        "/saes/{pk}/config",
        "/saes/download-hf",
        "/saes/gemma-scope/variants",
        "/saes/import",
    ):
        assert f"/api/v1{path}" in paths, path
    assert schema["components"]["schemas"]["DownloadIn"]["examples"][0]["repo_id"] == SCOPE
    url = reverse("api_docs")
    assert Client().get(url).url.startswith("/login/")
    page = client_of("viewer").get(url)
    html = page.content.decode()
    assert "ninja/swagger-ui-bundle.js" in html and "<script>" not in html and "http://" not in html
    assert "script-src 'self'" in page["Content-Security-Policy"]
