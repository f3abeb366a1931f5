"""Giving an SAE to others: archives in other formats that give the same codes, uploads to a Hub, model cards."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from django.urls import reverse

from saehub.accounts.hub_tokens import save
from saehub.jobs.models import Job, State
from saes.card import model_card
from saes.models import SAE
from saes.numerics.formats import FORMATS as TABLE
from saes.numerics.formats import detect_format, load_sae
from saes.sharing import AS_IS, FORMATS, archive
from tests.mini_hub import COMMIT, MiniHub
from tests.sae_rows import a_catalogue_row, a_model, a_trained_sae, files_below, write_sae

pytestmark = pytest.mark.django_db


@pytest.fixture
def sae(data_folder: Path) -> SAE:
    """An SAE whose files are really here."""
    row = a_trained_sae("one", d_sae=64, k=4, config={"dtype": "float32", "normalize_activations": "none"})
    write_sae(row.files)
    return row


def page_of(client: Any, sae: SAE) -> str:
    return str(client.get(f"{sae.get_absolute_url()}?tab=share").content.decode())


def body(answer: Any) -> bytes:
    return b"".join(answer.streaming_content)


def test_every_format_that_can_be_written_is_offered() -> None:
    assert set(FORMATS) - {AS_IS} == {name for name, one in TABLE.items() if one.save}


@pytest.mark.parametrize("form", list(FORMATS))
def test_an_archive_gives_the_same_codes(form: str, sae: SAE, client_of: Any, run_job: Any, tmp_path: Path) -> None:
    client = client_of("researcher")
    answer = client.post(reverse("saes:sae_export", args=[sae.pk]), {"format": form, "licence": "MIT"})
    assert answer.url == f"{sae.get_absolute_url()}?tab=share"
    job = run_job(Job.objects.get(kind="export_sae"))
    assert job.state == State.DONE, job.error
    url = reverse("saes:sae_archive", args=[sae.pk, form])
    assert url in page_of(client, sae)
    got = client_of("viewer").get(url)
    data = body(got)
    assert int(got["Content-Length"]) == len(data) and got["Content-Type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(data)) as made:
        assert all(name.startswith(f"sae-{sae.pk}/") for name in made.namelist())
        made.extractall(tmp_path)
    folder = tmp_path / f"sae-{sae.pk}"
    card = (folder / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["license"] == "mit"
    (folder / "README.md").unlink()
    assert detect_format(folder) == ("saelens" if form == AS_IS else form)
    before = load_sae(sae.files)
    after = load_sae(folder, facts={"hook_name": "h", "model_name": "tiny", "k": 4})
    x = torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(before.encode(x), after.encode(x)) and torch.equal(before(x), after(x))
    assert files_below(sae.exports) == [f"{form}.zip"], "nothing but the archive is kept"


def test_what_a_format_cannot_hold_is_refused_with_the_reason(sae: SAE, client_of: Any, run_job: Any) -> None:
    write_sae(sae.files, architecture="gated", k=None)
    client_of("researcher").post(reverse("saes:sae_export", args=[sae.pk]), {"format": "sparsify"})
    job = run_job(Job.objects.get(kind="export_sae"))
    assert job.state == State.FAILED and "gated" in job.error and "sparsify" in job.error
    assert files_below(sae.exports) == [] and archive(sae, "sparsify") is None
    assert job.error.split(".")[0] in page_of(client_of("researcher"), sae).replace("&#x27;", "'")


def test_files_that_are_missing_are_said(sae: SAE, client_of: Any, run_job: Any) -> None:
    sae.checksums = {"cfg.json": {"sha256": "ab" * 32, "bytes": 3}}
    sae.save()
    (sae.files / "cfg.json").unlink()
    client_of("researcher").post(reverse("saes:sae_export", args=[sae.pk]), {"format": AS_IS})
    job = run_job(Job.objects.get(kind="export_sae"))
    assert job.state == State.FAILED and "missing on this machine" in job.error


def test_an_archive_goes_with_a_press_and_with_its_sae(sae: SAE, client_of: Any, data_folder: Path) -> None:
    sae.exports.mkdir(parents=True)
    (sae.exports / "saelens.zip").write_bytes(b"zip")
    url = reverse("saes:sae_archive", args=[sae.pk, "saelens"])
    assert client_of("viewer").post(url).status_code == 403
    assert client_of("researcher").post(url).status_code == 302
    assert archive(sae, "saelens") is None
    assert client_of("viewer").get(url).status_code == 404
    assert client_of("viewer").get(reverse("saes:sae_archive", args=[sae.pk, "nonsense"])).status_code == 404
    (sae.exports / "saelens.zip").write_bytes(b"zip")
    exports = sae.exports
    sae.delete()
    assert not exports.exists()


def test_who_may_export(sae: SAE, client_of: Any) -> None:
    url = reverse("saes:sae_export", args=[sae.pk])
    for role in ("viewer", "annotator", "stranger"):
        assert client_of(role).post(url, {"format": "saelens"}).status_code == 403
    assert "Make the archive" not in page_of(client_of("viewer"), sae)
    for _ in range(2):  # pressed twice, made once
        client_of("researcher").post(url, {"format": "saelens"})
    assert Job.objects.count() == 1
    row = a_catalogue_row()
    client_of("researcher").post(reverse("saes:sae_export", args=[row.pk]), {"format": "saelens"})
    assert Job.objects.count() == 1 and "No files here" in page_of(client_of("researcher"), row)
    wrong = client_of("researcher").post(url, {"format": "saelens", "licence": "do <b>what</b>"})
    assert wrong.status_code == 422 and "A licence is a short name" in wrong.content.decode()


def test_the_api_does_the_same(sae: SAE, api: Any, run_job: Any) -> None:
    assert api("viewer", "post", f"/saes/{sae.pk}/export", {"format": "sparsify"}).status_code == 403
    asked = api("researcher", "post", f"/saes/{sae.pk}/export", {"format": "sparsify", "licence": "mit"})
    assert asked.status_code == 202
    run_job(Job.objects.get(pk=asked.json()["job_ids"][0]))
    found = api("viewer", "get", f"/saes/{sae.pk}/export").json()
    assert [one["format"] for one in found["archives"]] == ["sparsify"] and found["card"].startswith("---\n")
    got = api("viewer", "get", f"/saes/{sae.pk}/export/sparsify")
    assert zipfile.ZipFile(io.BytesIO(body(got))).testzip() is None
    assert api("viewer", "get", f"/saes/{sae.pk}/export/mi_crow").status_code == 404
    assert api("researcher", "post", f"/saes/{sae.pk}/export", {"format": "no"}).status_code == 422
    assert api("researcher", "delete", f"/saes/{sae.pk}/export/sparsify").json() == {"deleted": True}
    no_token = api("researcher", "post", f"/saes/{sae.pk}/upload", {"repo_id": "lab/saes"})
    assert no_token.status_code == 409 and "Hub token" in no_token.json()["detail"]


# -- the card ------------------------------------------------------------------------------------------------------------
METRICS = {
    "l0": {"value": 8.0, "definition": "l0", "formula": "E|acts|_0", "n": 3172, "data": "docs"},
    "ce_recovered": {"value": None, "definition": "ce_recovered", "formula": "a | ratio", "n": 0, "data": "docs"},
}


def test_the_card_says_what_was_measured_and_how(data_folder: Path) -> None:
    model = a_model("tiny", source="hub", location="org/tiny", revision="c0ffee")
    row = a_trained_sae("one", model=model, metrics=METRICS, notes="seen <script>alert(1)</script>\nand more")
    card = model_card(row, "saelens", licence="mit", repo_id="lab/saes", path="a/b")
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == "mit" and front["library_name"] == "saelens" and front["base_model"] == "org/tiny"
    assert "| L0 | 8 | E\\|acts\\|_0 | 3,172 | docs | `l0` |" in card
    assert "| CE loss recovered | not measured | a \\| ratio |" in card
    assert "model.layers.1 (output)" in card and 'SAE.from_pretrained("lab/saes", "a/b")' in card
    assert "<script>" not in card
    other = model_card(row, "sparsify")
    assert "library_name" not in other and "SparseCoder.load_from_disk" in other and "| licence | not stated |" in other


# -- uploads -------------------------------------------------------------------------------------------------------------
@pytest.fixture
def writer(user_of: Any, hub: MiniHub) -> MiniHub:
    """A Hub on which the researcher's token may write."""
    hub.tokens["hf_researcher"] = "lab"
    hub.writers.add("hf_researcher")
    save(user_of("researcher"), "hf_researcher")
    return hub


def ask(client: Any, sae: SAE, **given: Any) -> Any:
    fields = {"repo_id": "lab/saes", "path": "layer_1", "format": "saelens", "licence": "mit"} | given
    return client.post(reverse("saes:sae_upload", args=[sae.pk]), fields)


def test_an_upload_is_one_commit_that_comes_back_the_same(
    sae: SAE, writer: MiniHub, client_of: Any, run_job: Any, tmp_path: Path
) -> None:
    assert ask(client_of("researcher"), sae, private="on").status_code == 302
    job = run_job(Job.objects.get(kind="upload_sae"))
    assert job.state == State.DONE, job.error
    files = writer.repos["models/lab/saes"]
    assert sorted(files) == ["README.md", "layer_1/README.md", "layer_1/cfg.json", "layer_1/sae_weights.safetensors"]
    assert writer.messages == ["Add one"] and "models/lab/saes" in writer.private
    assert job.result["commit"] == COMMIT and job.result["url"] == f"{writer.url}/lab/saes/tree/{COMMIT}/layer_1"
    assert files["layer_1/sae_weights.safetensors"] == (sae.files / "sae_weights.safetensors").read_bytes()
    assert b'SAE.from_pretrained("lab/saes", "layer_1")' in files["README.md"]
    page = page_of(client_of("researcher"), sae)
    assert f'href="{job.result["url"]}"' in page and files_below(sae.exports) == []
    again = a_catalogue_row("layer_1", repo_id="lab/saes", repo_path="layer_1", owner=job.owner)
    back = run_job(again.start(job.owner))
    assert back.state == State.DONE, back.error
    assert "hf_researcher" not in str(job.params) + job.traceback + "".join(line.text for line in job.lines.all())


def test_a_second_upload_sends_only_what_is_new_and_keeps_the_top_card(
    sae: SAE, writer: MiniHub, client_of: Any, run_job: Any
) -> None:
    writer.repos["models/lab/saes"] = {"README.md": b"our own words", "layer_0/cfg.json": b"{}"}
    for _ in range(2):
        ask(client_of("researcher"), sae)
        job = run_job(Job.objects.filter(kind="upload_sae").first())
        assert job.state == State.DONE, job.error
    files = writer.repos["models/lab/saes"]
    assert files["README.md"] == b"our own words" and "layer_0/cfg.json" in files and "layer_1/cfg.json" in files
    assert len([one for one in writer.asked if one.startswith("PUT /objects/")]) == 1
    assert "models/lab/saes" not in writer.private, "what is there already stays as it is"


def test_refusals_of_the_hub_are_sentences(sae: SAE, writer: MiniHub, client_of: Any, run_job: Any) -> None:
    writer.writers.clear()
    ask(client_of("researcher"), sae)
    job = run_job(Job.objects.get(kind="upload_sae"))
    assert job.state == State.FAILED and job.error == "The Hub does not let this token write to lab/saes."
    writer.writers.add("hf_researcher")
    writer.fault("/commit/", "status", 400, times=None)
    ask(client_of("researcher"), sae)
    job = run_job(Job.objects.filter(kind="upload_sae").first())
    assert job.state == State.FAILED and job.error.startswith("The Hub refused the commit to lab/saes.")
    assert writer.repos["models/lab/saes"] == {} and files_below(sae.exports) == [], "nothing is left half done"


def test_an_upload_can_be_cancelled_while_it_sends(
    sae: SAE, writer: MiniHub, client_of: Any, run_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from saehub.jobs import progress

    monkeypatch.setattr(progress, "FLUSH_SECONDS", 0)
    ask(client_of("researcher"), sae)
    row = Job.objects.get(kind="upload_sae")
    flushed = progress.Progress.flush

    def cancelling(self: Any) -> None:
        if self._last.get("step", "").startswith("Hashing"):
            Job.objects.get(pk=row.pk).cancel()
        flushed(self)

    monkeypatch.setattr(progress.Progress, "flush", cancelling)
    assert run_job(row).state == State.CANCELLED
    assert writer.repos["models/lab/saes"] == {} and files_below(sae.exports) == []


def test_who_may_upload(sae: SAE, hub: MiniHub, client_of: Any, user_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_server")
    page = page_of(client_of("researcher"), sae)
    assert "set a Hub token" in page and 'id="upload_repo_id"' not in page, "the server's token is not everybody's"
    assert ask(client_of("researcher"), sae).status_code == 302 and not Job.objects.exists()
    assert ask(client_of("viewer"), sae).status_code == 403
    sae.owner = user_of("curator")
    sae.save()
    save(user_of("researcher"), "hf_researcher")
    assert ask(client_of("researcher"), sae).status_code == 403, "somebody else's SAE"
    for given, said in (({"repo_id": "no-slash"}, "name/repository"), ({"path": "../up"}, "A folder is written")):
        wrong = ask(client_of("curator"), sae, **given)
        assert wrong.status_code == 422 and said in wrong.content.decode()
    assert not Job.objects.exists()
    assert ask(client_of("curator"), sae).status_code == 302
    assert Job.objects.get().owner == user_of("curator"), "who may act for others may use the server's token"


def test_saelens_loads_what_is_uploaded(
    sae: SAE, writer: MiniHub, client_of: Any, run_job: Any, tmp_path: Path, ask_peers: Callable[..., None]
) -> None:
    """The line of the card, run by SAELens itself against the files that the Hub got."""
    ask(client_of("researcher"), sae)
    assert run_job(Job.objects.get(kind="upload_sae")).state == State.DONE
    for name, data in writer.repos["models/lab/saes"].items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    ask_peers(Path(__file__).with_name("load_peer.py"), tmp_path / "layer_1", tmp_path / "shape.json")
    assert json.loads((tmp_path / "shape.json").read_text()) == [64, 32]
