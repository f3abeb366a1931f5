"""Importing what a person sends or puts on the server: every door, every golden file, every broken and hostile one."""

import glob
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from django.test import Client
from django.urls import reverse

from saehub.jobs.models import State
from saes import imports
from saes.import_forms import NORMALIZATIONS
from saes.models import SAE, LanguageModel
from saes.numerics.formats import load_sae
from saes.one_sae import resume
from tests.api_calls import ask
from tests.sae_rows import files_below, write_sae
from tests.saes.importing import sent, url, zipped

pytestmark = pytest.mark.django_db
SHARED = Path(__file__).resolve().parents[3] / "shared" / "golden"
BAD = sorted((SHARED / "bad").glob("*/expect.json"))
PUBLIC = sorted((SHARED / "public").glob("*/golden.json"))
GIVEN = (
    "repo_id", "model_name", "hook_name", "hook_name_out", "k", "norm_scaling_factor", "normalize_activations",
    "apply_b_dec_to_input",
)  # fmt: skip
HEALTHY = (
    "malicious_trainer_state",
    "sparsity_wrong_length",
    "inf_threshold",
)  # may also be imported, without the fault


# ------------------------------------------------------------------------------------------------------- the doors


def test_a_zip_with_a_folder_in_it(bring: Any, tmp_path: Path, data_folder: Path, user_of: Any) -> None:
    folder = write_sae(tmp_path / "given")
    row, job = bring(where="upload", files=zipped(folder, "mine/layer_1/"))
    assert job.state == State.DONE, job.error
    assert row.ready and row.owner == user_of("researcher") and (row.d_in, row.d_sae, row.k) == (32, 64, 4)
    assert row.name == "sae" and row.path == f"sae/file/{row.pk}/mine/layer_1"
    assert load_sae(row.files).config.hook_name == "blocks.1.hook_resid_post"
    assert set(files_below(data_folder)) == {f"{row.path}/cfg.json", f"{row.path}/sae_weights.safetensors"}


def test_single_files(bring: Any, tmp_path: Path) -> None:
    row, job = bring(
        where="upload", files=sent(write_sae(tmp_path / "given")), name="Mine", hook_name="blocks.0.hook_mlp_out"
    )
    assert job.state == State.DONE, job.error
    assert row.name == "Mine" and row.hook_name == "blocks.0.hook_mlp_out", "what a person says takes the file's place"
    assert row.facts == {"hook_name": "blocks.0.hook_mlp_out"}


def test_a_folder_keeps_its_tree(bring: Any, tmp_path: Path) -> None:
    files = sent(write_sae(tmp_path / "given"))
    paths = "\n".join(f"top/layer_1/{file.name}" for file in files)
    row, job = bring(where="folder", tree=files, paths=paths)
    assert job.state == State.DONE, job.error
    assert row.name == "top" and row.path.endswith("top/layer_1")


def test_a_folder_without_javascript_is_flat(bring: Any, tmp_path: Path) -> None:
    row, job = bring(where="folder", tree=sent(write_sae(tmp_path / "given")))
    assert job.state == State.DONE and row.path == f"sae/file/{row.pk}"


def test_a_path_on_the_server_is_used_where_it_is(bring: Any, settings: Any, data_folder: Path, client_of: Any) -> None:
    folder = write_sae(settings.IMPORT_DIRS[0] / "lab" / "one")
    row, job = bring(where="path", path=str(folder))
    assert job.state == State.DONE, job.error
    assert row.files == folder and row.name == "one" and files_below(data_folder) == []
    again = client_of("researcher").post(url(), {"where": "path", "path": str(folder)})
    assert again.status_code == 422 and "in the registry already, as one" in again.context["form"].errors["path"][0]
    row.delete()
    assert len(files_below(folder)) == 2, "what lies elsewhere is not ours to delete"


def test_files_of_the_server_outside_of_the_import_folders_are_refused(
    client_of: Any, settings: Any, tmp_path: Path
) -> None:
    folder = write_sae(tmp_path / "secret")
    inside = settings.IMPORT_DIRS[0] / "linked"
    inside.mkdir()
    (inside / "cfg.json").symlink_to(folder / "cfg.json")
    for path, part in ((folder, "may read only under"), (inside, "is a link that leads out")):
        response = client_of("researcher").post(url(), {"where": "path", "path": str(path)})
        assert response.status_code == 422 and part in response.context["form"].errors["path"][0]
    assert not SAE.objects.exists()


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder with two SAEs in folders of their own."""
    for layer in (0, 1):
        write_sae(tmp_path / "given" / f"layer_{layer}", seed=layer, hook_name=f"blocks.{layer}.hook_resid_post")
    return tmp_path / "given"


@pytest.mark.parametrize("door", ["zip", "path"])
def test_of_several_saes_each_gets_a_row_and_a_job(
    door: str, two: Path, client_of: Any, run_job: Any, settings: Any, data_folder: Path
) -> None:
    data = {"where": "upload", "files": zipped(two), "name": "mine", "model_name": "tiny"}
    if door == "path":
        shutil.copytree(two, settings.IMPORT_DIRS[0] / "two")
        data |= {"where": "path", "path": str(settings.IMPORT_DIRS[0] / "two")}
    assert client_of("researcher").post(url(), data).status_code == 302
    first = SAE.objects.get()
    job = run_job(first.job)
    assert job.state == State.DONE, job.error
    first, second = SAE.objects.order_by("pk")
    assert job.result["others"] == [second.pk] and first.ready and not second.ready
    assert run_job(second.job).state == State.DONE, second.job.error
    second.refresh_from_db()
    for layer, row in enumerate((first, second)):
        assert (row.name, row.layer, row.model_name, row.owner) == (f"mine/layer_{layer}", layer, "tiny", first.owner)
        assert load_sae(row.files).config.hook_name == f"blocks.{layer}.hook_resid_post" and not row.upload.exists()
    assert first.sha256 != second.sha256
    if door == "zip":
        assert len(files_below(data_folder)) == 4, "two configs and two weights"


def test_one_of_several_can_be_asked_for(bring: Any, two: Path, data_folder: Path) -> None:
    row, job = bring(where="upload", files=zipped(two), entry="layer_1")
    assert job.state == State.DONE and row.layer == 1 and SAE.objects.count() == 1, job.error
    assert len(files_below(data_folder)) == 2


def test_when_the_others_cannot_be_made_nothing_of_them_is_left(
    bring: Any, two: Path, data_folder: Path, monkeypatch: Any
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(imports.shutil, "copytree", full)
    row, job = bring(where="upload", files=zipped(two))
    assert job.state == State.FAILED and SAE.objects.count() == 1 and "entry" not in row.facts
    assert all(name.startswith(f"uploads/{row.pk}/") for name in files_below(data_folder)), "kept for Retry"


def test_more_saes_than_one_import_brings_are_asked_about(
    bring: Any, two: Path, client_of: Any, run_job: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(imports, "MOST_AT_ONCE", 1)
    row, job = bring(where="upload", files=zipped(two))
    assert job.error == "These files hold 2 SAEs: layer_0, layer_1 and more. Say which one."
    assert row.asked == ["entry"] and not row.ready and row.upload.exists(), "what was sent waits for the answer"
    response = client_of("researcher").post(reverse("saes:sae_facts", args=[row.pk]), {"entry": "layer_1"})
    assert response.status_code == 302
    assert not resume(row, {"entry": "layer_0"}, row.owner), "of two answers at once, the first counts"
    row.refresh_from_db()
    job = run_job(row.job)
    row.refresh_from_db()
    assert job.state == State.DONE, job.error
    assert row.layer == 1 and not row.upload.exists()


def test_a_place_that_leads_out_of_the_upload_is_refused(bring: Any, tmp_path: Path) -> None:
    _, job = bring(where="upload", files=zipped(write_sae(tmp_path / "given")), entry="../../..")
    assert job.state == State.FAILED and "There is no ../../.. in these files." in job.error


def test_the_same_weights_again_are_refused_and_may_be_kept_twice(bring: Any, tmp_path: Path) -> None:
    folder = write_sae(tmp_path / "given")
    first, _ = bring(where="upload", files=zipped(folder))
    again, job = bring(where="upload", files=zipped(folder))
    assert job.state == State.FAILED and f"(SAE {first.pk}), which is here already" in job.error
    assert SAE.objects.get() == first and not again.upload.exists(), "what is not wanted is not kept"
    twice, job = bring(where="upload", files=zipped(folder), second_copy="on")
    assert job.state == State.DONE and twice.ready and twice.sha256 == first.sha256


def test_nothing_is_left_of_what_is_refused_but_its_job(
    bring: Any, tmp_path: Path, data_folder: Path, client_of: Any, user_of: Any
) -> None:
    """No row, no files; whoever has the SAE's page or cell open, or asks for it, is told what went wrong."""
    (tmp_path / "cfg.json").write_text("{}")
    row, job = bring(where="upload", files=sent(tmp_path))
    assert job.state == State.FAILED and "cfg.json" in job.error and job.hint.startswith("Nothing was registered.")
    assert not SAE.objects.exists() and files_below(data_folder) == []
    client, page = client_of("researcher"), reverse("saes:sae_detail", args=[row.pk])
    assert client.get(page).url == job.get_absolute_url()
    assert client.get(page, headers={"HX-Request": "true"})["HX-Redirect"] == job.get_absolute_url()
    assert job.get_absolute_url() in client.get(reverse("saes:sae_state", args=[row.pk])).content.decode()
    said = ask(user_of("researcher"), "get", f"/saes/{row.pk}")
    assert said.status_code == 404 and job.error in said.json()["detail"] and said.json()["job"] == job.pk
    shown = client.get(job.get_absolute_url()).content.decode()
    assert "Retry" not in shown and "Open its page" not in shown and "cfg.json" in shown
    assert not job.retry() and ask(user_of("researcher"), "post", f"/jobs/{job.pk}/retry").status_code == 409


def test_an_sae_that_was_deleted_is_no_refusal(bring: Any, tmp_path: Path, client_of: Any) -> None:
    row, job = bring(where="upload", files=zipped(write_sae(tmp_path / "given")))
    pk = row.pk
    row.delete()
    assert client_of("researcher").get(reverse("saes:sae_detail", args=[pk])).status_code == 404
    assert "deleted" in client_of("researcher").get(reverse("saes:sae_state", args=[pk])).content.decode()
    job.refresh_from_db()
    assert job.state == State.DONE and job.subject_url() == job.get_absolute_url()


def test_a_path_of_the_server_that_is_refused_stays_as_it_is(bring: Any, settings: Any) -> None:
    folder = settings.IMPORT_DIRS[0] / "lab"
    folder.mkdir()
    (folder / "cfg.json").write_text("{}")
    _, job = bring(where="path", path=str(folder))
    assert job.state == State.FAILED and not SAE.objects.exists() and files_below(folder) == ["cfg.json"]


def test_of_several_saes_only_the_broken_one_is_not_registered(two: Path, bring: Any, run_job: Any) -> None:
    weights = two / "layer_1" / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    first, job = bring(where="upload", files=zipped(two))
    assert job.state == State.DONE and first.ready
    other = SAE.objects.get(pk=job.result["others"][0])
    job = run_job(other.job)
    assert job.state == State.FAILED and "sae_weights.safetensors" in job.error
    assert SAE.objects.get() == first


def test_a_full_disk_keeps_what_was_sent(
    bring: Any, tmp_path: Path, run_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from saes import adopt
    from saes.numerics.folders import FolderError

    def full(*args: Any, **more: Any) -> None:
        raise FolderError("The disk is full.")

    monkeypatch.setattr(adopt, "_move", full)
    row, job = bring(where="upload", files=zipped(write_sae(tmp_path / "given")))
    assert job.state == State.FAILED and row.upload.exists()
    monkeypatch.undo()
    assert job.retry() and run_job(job).state == State.DONE


def test_its_language_model_is_found(bring: Any, tmp_path: Path) -> None:
    model = LanguageModel.objects.create(name="x", location="lab/Tiny", source="hub")
    row, _ = bring(where="upload", files=zipped(write_sae(tmp_path / "given")))
    assert row.model == model and row.model_name == "tiny"


# ------------------------------------------------------------------------------------------------------- who


def test_who_may_import(client_of: Any, tmp_path: Path) -> None:
    assert Client().get(url()).url.startswith("/login/")
    for role in ("stranger", "viewer", "annotator"):
        assert client_of(role).get(url()).status_code == 403
        assert client_of(role).post(url(), {"where": "upload"}).status_code == 403
    page = client_of("researcher").get(url()).content.decode()
    assert "webkitdirectory" in page and 'enctype="multipart/form-data"' in page


@pytest.mark.parametrize(
    "data, field",
    [({"where": "upload"}, "files"), ({"where": "folder"}, "tree"), ({"where": "path"}, "path"), ({}, "where")],
)
def test_what_is_missing_is_said_beside_its_field(data: dict[str, str], field: str, client_of: Any) -> None:
    response = client_of("researcher").post(url(), data | {"model_name": "kept"})
    assert response.status_code == 422 and list(response.context["form"].errors) == [field]
    assert 'value="kept"' in response.content.decode(), "what was typed is not lost"


# ------------------------------------------------------------------------------------------------------- golden files


def markers() -> list[str]:
    return glob.glob("/tmp/saehub_pwned_marker_*")


@pytest.mark.parametrize("case", BAD, ids=lambda path: path.parent.name)
@pytest.mark.parametrize("door", ["bring", "bring_by_api"])
def test_broken_and_hostile_saes_are_refused(door: str, case: Path, request: Any, data_folder: Path) -> None:
    """Each case as a zip through the page, the API and its job: refused in a sentence that names the fault, nothing kept."""
    bring = request.getfixturevalue(door)
    for marker in markers():
        os.unlink(marker)
    told = json.loads(case.read_text())
    row, job = bring(where="upload", files=zipped(case.parent / "model"), repo_id="google/gemma-scope-2b-pt-res")
    assert markers() == []
    name = told["case"]
    if name in HEALTHY and job.state == State.DONE:
        assert row.ready
        return
    assert job.state == State.FAILED and list(SAE.objects.values_list("ready_at", "asked")) == (
        [(None, row.asked)] if row.asked else []
    ), "nothing is registered, but where a person has to answer first"
    assert not job.error.startswith("Unexpected"), job.error
    assert 20 < len(job.error) < 500 and job.error.endswith(".") and not job.error.startswith("files "), job.error
    if not row.asked:
        assert files_below(data_folder) == [], "no stray files"
        assert job.hint, "and what to do is said"


@pytest.mark.parametrize("case", PUBLIC, ids=lambda path: path.parent.name)
@pytest.mark.parametrize("door", ["path", "zip", "api"])
def test_golden_saes_are_adopted(door: str, case: Path, request: Any, settings: Any) -> None:
    """Each SAE that its original package wrote, from a path of the server and as a zip by page and API.

    What was converted still gives its numbers.
    """
    import torch
    from safetensors.torch import load_file

    told = json.loads(case.read_text())
    bring = request.getfixturevalue("bring_by_api" if door == "api" else "bring")
    if door == "path":
        where = {"where": "path", "path": shutil.copytree(case.parent / "model", settings.IMPORT_DIRS[0] / "golden")}
    else:
        where = {"where": "upload", "files": zipped(case.parent / "model")}
    facts = {name: told[name] for name in GIVEN if told.get(name) not in (None, "")}
    if facts.get("normalize_activations") not in NORMALIZATIONS:  # said in words of its own
        facts.pop("normalize_activations", None)
    if isinstance(facts.get("apply_b_dec_to_input"), bool):
        facts["apply_b_dec_to_input"] = "yes" if facts["apply_b_dec_to_input"] else "no"
    row, job = bring(**where, entry=told["entry"], **facts)
    assert job.state == State.DONE, job.error
    assert row.architecture and row.d_in == told["d_in"] and row.d_sae == told["d_sae"]
    if row.format == "saelens" and told["format"] != "saelens":
        assert row.proof["holds"] and row.proof["max_abs_x_hat"] == 0.0
    golden = load_file(case.parent / "golden.safetensors")
    if golden["x"].dim() == 2 and row.config["row_by_row"]:
        with torch.no_grad():
            sae = load_sae(row.files, facts=row.facts)
            acts, x_hat = sae.encode(golden["x"]), sae(golden["x"])
        form = "_inference" if told["format"] == "saelens_training" and "x_hat_inference" in golden else ""
        assert torch.allclose(acts, golden[f"feature_acts{form}"], **told["tolerance"])
        assert torch.allclose(x_hat, golden[f"x_hat{form}"], **told["tolerance"])
        assert torch.equal(acts != 0, golden[f"feature_acts{form}"] != 0)


def test_the_golden_files_are_there() -> None:
    if not SHARED.exists():
        pytest.skip(f"no {SHARED}: the published SAEs and the broken ones are not in this repository")
    assert len(BAD) > 40 and len(PUBLIC) > 50


# ------------------------------------------------------------------------------------------------------- a file of one's own


def test_a_file_of_ones_own_is_asked_about_until_it_fits(
    bring: Any, tmp_path: Path, client_of: Any, run_job: Any, api: Any
) -> None:
    """By page and API: wrong answers lose neither the files nor what was typed."""
    import torch
    from safetensors.torch import save_file

    W = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    save_file({"enc.weight": W, "enc.bias": torch.zeros(64), "dec": W.clone()}, tmp_path / "mine.safetensors")
    row, job = bring(where="upload", files=sent(tmp_path))
    assert job.state == State.FAILED and "It holds dec (64, 32), enc.bias (64), enc.weight (64, 32)" in job.error
    assert row.asked == ["tensors", "architecture", "model_name", "hook_name", "normalize_activations"]
    page, client = reverse("saes:sae_facts", args=[row.pk]), client_of("researcher")
    html = client.get(row.get_absolute_url()).content.decode()
    assert '<textarea name="tensors"' in html and "It holds dec (64, 32)" in html
    fragment = client.get(row.get_absolute_url(), headers={"HX-Request": "true"}).content.decode()
    assert '<div id="asked" hx-swap-oob="true"><section' in fragment, (
        "whoever watches the import is asked there and then"
    )
    said = {
        "tensors": "W_enc = enc.weight\nb_enc = enc.bias\nW_dec = dec", "architecture": "standard",
        "model_name": "tiny", "hook_name": "blocks.1.hook_resid_post", "normalize_activations": "none",
    }  # fmt: skip
    assert client.post(page, said).status_code == 302
    row.refresh_from_db()
    job = run_job(row.job)
    row.refresh_from_db()
    assert job.state == State.FAILED and "b_enc has the shape (64,)" in job.error and row.asked == ["tensors"]
    html = client.get(row.get_absolute_url()).content.decode()
    assert "W_enc = enc.weight\nb_enc = enc.bias" in html, "what was typed is there to be corrected"
    assert row.upload.exists()
    right = "W_enc = enc.weight.T\nb_enc = enc.bias\nW_dec = dec"
    answer = api("researcher", "post", f"/saes/{row.pk}/facts", {"tensors": right})
    assert answer.status_code == 202, answer.content
    row.refresh_from_db()
    job = run_job(row.job)
    row.refresh_from_db()
    assert job.state == State.DONE and row.ready and row.proof["holds"], job.error
    assert row.proof["source_format"] == "named_tensors" and row.format == "saelens" and not row.upload.exists()
    assert (row.d_in, row.d_sae, row.layer, row.model_name) == (32, 64, 1, "tiny") and row.facts["tensors"] == right
    x = torch.randn(8, 32)
    torch.testing.assert_close(load_sae(row.files)(x), (x @ W.T).relu() @ W, rtol=1e-4, atol=1e-4)


def test_all_of_it_can_be_said_at_once(bring_by_api: Any, tmp_path: Path) -> None:
    import torch

    W = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    torch.save({"W": W, "V": W.t().contiguous()}, tmp_path / "mine.pt")
    row, job = bring_by_api(
        where="upload", files=sent(tmp_path), tensors="W_enc=W, W_dec=V", architecture="topk", k="4", model_name="tiny",
        hook_name="blocks.0.hook_resid_post", normalize_activations="none",
    )  # fmt: skip
    assert job.state == State.DONE and row.ready and row.architecture == "topk" and row.k == 4, job.error
