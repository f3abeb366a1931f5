"""catalogue_sync: the public directory becomes rows; twice is once; nothing local is lost; what is odd is a warning."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from django.core.management import CommandError, call_command
from django.urls import reverse
from django.utils import timezone

from saehub.jobs.models import Job, State, enqueue
from saes import catalogue
from saes.catalogue import CatalogueError, merge, open_directory, read_directory, sync
from saes.models import SAE, Release
from tests.peers import peer

pytestmark = pytest.mark.django_db

DIRECTORY: dict[str, Any] = {
    "gemma-scope-2b-pt-res": {
        "conversion_func": "gemma_2", "model": "gemma-2-2b", "repo_id": "google/gemma-scope-2b-pt-res",
        "links": {"model": "https://huggingface.co/google/gemma-2-2b", "odd": 3},
        "saes": [
            {"id": "layer_12/width_16k/average_l0_82", "path": "layer_12/width_16k/average_l0_82", "l0": 82},
            {"id": "layer_12/width_16k/average_l0_22", "path": "layer_12/width_16k/average_l0_22"},
        ],
    },
    "gemma-scope-2b-pt-res-canonical": {
        "conversion_func": "gemma_2", "model": "gemma-2-2b", "repo_id": "google/gemma-scope-2b-pt-res",
        "saes": [
            {"id": "layer_12/width_16k/canonical", "path": "layer_12/width_16k/average_l0_82", "neuronpedia": "gemma-2-2b/12-gemmascope-res-16k"},
        ],
    },
    "llama_scope_lxr_8x": {
        "conversion_func": "llama_scope", "model": "meta-llama/Llama-3.1-8B", "repo_id": "fnlp/Llama3_1-8B-Base-LXR-8x",
        "config_overrides": {"normalize_activations": "none"},
        "saes": [{"id": "l15r_8x", "path": "Llama3_1-8B-Base-L15R-8x", "l0": 50.0, "norm_scaling_factor": 2.5, "variance_explained": -0.7}],
    },
    "clt": {
        "conversion_func": "mntss_clt_layer_transcoder", "model": "gemma-2-2b", "repo_id": "mntss/clt",
        "saes": [{"id": "layer_7", "path": 7}],
    },
}  # fmt: skip


def write(tmp_path: Path, directory: Any = DIRECTORY, name: str = "pretrained_saes.yaml") -> str:
    path = tmp_path / name
    path.write_text(yaml.safe_dump(directory, sort_keys=False))
    return str(path)


def run(tmp_path: Path, directory: Any = DIRECTORY) -> dict[str, Any]:
    return sync(write(tmp_path, directory), say=lambda text: None)


def test_each_place_becomes_one_row_with_what_its_name_says(tmp_path: Path) -> None:
    summary = run(tmp_path)
    assert (summary["releases"], summary["entries"], summary["rows"], summary["new"], summary["aliases"]) == (
        4,
        5,
        4,
        4,
        1,
    )
    assert summary["warnings"] == [] and Release.objects.count() == 4
    row = SAE.objects.get(repo_path="layer_12/width_16k/average_l0_82")
    assert row.name == "gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82"
    assert row.aliases == ["gemma-scope-2b-pt-res-canonical/layer_12/width_16k/canonical"]
    assert (row.release.name, row.sae_id) == ("gemma-scope-2b-pt-res", "layer_12/width_16k/average_l0_82")
    assert (row.model_name, row.layer, row.site, row.hook_name) == (
        "gemma-2-2b",
        12,
        "resid_post",
        "blocks.12.hook_resid_post",
    )
    assert (row.d_sae, row.published_l0, row.architecture, row.format) == (16384, 82.0, "jumprelu", "gemma_scope_1")
    assert row.neuronpedia_id == "gemma-2-2b/12-gemmascope-res-16k", "said by its other name"
    assert row.source == "hub" and row.read_at is None and row.ready_at is None and row.owner is None
    assert row.release.links == {"model": "https://huggingface.co/google/gemma-2-2b"}


def test_what_is_not_said_stays_null(tmp_path: Path) -> None:
    run(tmp_path)
    row = SAE.objects.get(repo_path="layer_12/width_16k/average_l0_22")
    assert row.published_l0 is None and row.published_variance is None and row.l0 is None
    clt = SAE.objects.get(repo_id="mntss/clt")
    assert (clt.repo_path, clt.layer, clt.d_sae, clt.published_l0) == ("W_enc_7.safetensors", 7, None, None)
    assert (clt.hook_name, clt.hook_name_out, clt.site) == ("blocks.7.hook_resid_mid", "blocks.7.hook_mlp_out", "clt")


def test_facts_that_no_file_holds_are_kept_with_the_row(tmp_path: Path) -> None:
    run(tmp_path)
    row = SAE.objects.get(repo_path="Llama3_1-8B-Base-L15R-8x")
    assert row.facts == {"normalize_activations": "none", "norm_scaling_factor": 2.5}
    assert (row.published_variance, row.d_sae, row.layer) == (-0.7, 32768, 15), "a bad variance is a fact too"
    assert row.release.facts == {"normalize_activations": "none"}


def test_a_second_run_changes_nothing(tmp_path: Path) -> None:
    run(tmp_path)
    before = list(SAE.objects.order_by("pk").values())
    summary = run(tmp_path)
    assert (summary["new"], summary["changed"], summary["gone"]) == (0, 0, 0)
    assert list(SAE.objects.order_by("pk").values()) == before


def test_nothing_local_is_lost(tmp_path: Path, user_of: Any) -> None:
    run(tmp_path)
    now = timezone.now()
    read = SAE.objects.get(repo_path="layer_12/width_16k/average_l0_82")
    SAE.objects.filter(pk=read.pk).update(
        notes="ours", curation="reviewed", owner=user_of("curator"), ready_at=now, read_at=now, path="sae/x", d_sae=999,
        hook_name="model.layers.12", l0=80.5, config={"k": 1}, facts={"hook_name": "told on import"}, revision="abc",
    )  # fmt: skip
    renamed = SAE.objects.get(repo_path="Llama3_1-8B-Base-L15R-8x")
    SAE.objects.filter(pk=renamed.pk).update(name="our favourite", facts=renamed.facts | {"k": 50})
    changed = json.loads(json.dumps(DIRECTORY))
    changed["gemma-scope-2b-pt-res"]["saes"][0]["l0"] = 83
    changed["llama_scope_lxr_8x"]["saes"][0]["norm_scaling_factor"] = 3.0
    assert run(tmp_path, changed)["changed"] == 2
    row = SAE.objects.get(pk=read.pk)
    assert (row.notes, row.curation, row.owner, row.path, row.ready_at) == (
        "ours",
        "reviewed",
        user_of("curator"),
        "sae/x",
        now,
    )
    assert (row.d_sae, row.hook_name, row.l0, row.config, row.revision) == (
        999,
        "model.layers.12",
        80.5,
        {"k": 1},
        "abc",
    )
    assert row.facts == {"hook_name": "told on import"} and row.published_l0 == 83.0, "what is published is taken over"
    row = SAE.objects.get(pk=renamed.pk)
    assert row.name == "our favourite" and row.facts == {
        "normalize_activations": "none",
        "norm_scaling_factor": 3.0,
        "k": 50,
    }


def test_a_place_downloaded_before_gets_its_release(tmp_path: Path, user_of: Any) -> None:
    own = SAE.objects.create(
        name="mine", source="hub", repo_id="mntss/clt", repo_path="W_enc_7.safetensors", owner=user_of("researcher")
    )
    summary = run(tmp_path)
    assert (summary["new"], summary["changed"]) == (3, 1)
    own.refresh_from_db()
    assert (own.release.name, own.sae_id, own.name, own.layer) == ("clt", "layer_7", "mine", 7)


def test_what_vanished_is_marked_and_comes_back(tmp_path: Path) -> None:
    run(tmp_path)
    trained = SAE.objects.create(name="ours", source="trained")
    fewer = {name: release for name, release in DIRECTORY.items() if name != "clt"}
    assert run(tmp_path, fewer)["gone"] == 1
    row = SAE.objects.get(repo_id="mntss/clt")
    assert row.gone_at is not None and SAE.objects.count() == 5
    assert run(tmp_path, fewer)["gone"] == 0, "once is enough"
    summary = run(tmp_path)
    row.refresh_from_db(), trained.refresh_from_db()
    assert row.gone_at is None and summary["changed"] == 1 and trained.gone_at is None


def test_another_directory_marks_nothing_of_the_first(tmp_path: Path) -> None:
    run(tmp_path)
    other = sync(write(tmp_path, {"clt": DIRECTORY["clt"]}, "other.yaml"), say=lambda text: None)
    assert other["gone"] == 0 and SAE.objects.filter(gone_at=None).count() == 4


def test_every_entry_is_checked() -> None:
    odd: dict[str, Any] = {
        "good": {"conversion_func": None, "model": "m", "repo_id": "o/r", "saes": [
            {"id": "a", "path": "a", "l0": 0, "variance_explained": float("nan")},
            {"id": "b", "path": "b", "l0": True}, {"id": "c"}, {"path": "d"}, "e", {"id": "f", "path": True}, {"id": "g", "path": "g", "l0": "many"},
        ]},
        "strange": {"conversion_func": "tomorrow", "model": None, "repo_id": "o/s", "saes": [{"id": "x", "path": "x"}], "config_overrides": []},
        "no repo": {"saes": [{"id": "x", "path": "x"}]}, "no list": {"repo_id": "o/r", "saes": 3}, "nothing": None,
    }  # fmt: skip
    read = read_directory(yaml.safe_dump(odd).encode(), "test")
    assert [entry.name for entry in read.entries] == ["good/a", "good/b", "good/g", "strange/x"]
    assert all(entry.l0 is None and entry.variance is None for entry in read.entries)
    text = "\n".join(read.warnings)
    for said in ("good/a: an L0 of 0", "good/b: an L0 of True", "good/c: left out", "good/?: left out", "good/f: left out",
                 "good/g: an L0 of many", "strange: its files are of a kind not known here (tomorrow)", "strange: config_overrides",
                 "no repo: left out", "no list: left out", "nothing: left out"):  # fmt: skip
        assert said in text, said
    assert [found.entry.format for found in merge(read) if found.entry.release == "strange"] == [""]


def test_a_release_that_indentation_put_inside_an_sae_is_recovered() -> None:
    inner = [{"id": "b", "path": "b"}, {"id": "c", "path": "c"}]
    release = {"conversion_func": None, "model": "m", "repo_id": "o/r", "saes": [
        {"id": "a", "path": "a"}, {"id": "b", "path": "b", "repo_id": "o/r", "model": "m", "saes": inner},
    ]}  # fmt: skip
    read = read_directory(yaml.safe_dump({"one": release}).encode(), "test")
    assert [entry.name for entry in read.entries] == ["one/a", "one/b", "one/c"]
    assert read.warnings == ["one/b: wrong indentation put a release inside this SAE (1 more entries, taken up)."]


def test_two_l0s_of_one_place_are_told_and_the_paths_own_counts() -> None:
    place = "layer_20/width_524k/average_l0_48"
    release = DIRECTORY["gemma-scope-2b-pt-res"]
    both = {
        "plain": release | {"saes": [{"id": place, "path": place, "l0": 78}]},
        "x-canonical": release | {"saes": [{"id": "c", "path": place, "l0": 48}]},
    }
    read = read_directory(yaml.safe_dump(both).encode(), "test")
    (found,) = merge(read)
    assert found.entry.l0 == 48.0 and found.entry.release == "plain"
    assert read.warnings == [f"google/gemma-scope-2b-pt-res:{place}: its L0 is given as 48 and 78."]


@pytest.mark.parametrize(
    "text, says",
    [
        (b"\xff\xfe\x00", "is not readable YAML"),
        (b"a: [", "is not readable YAML"),
        (b"!!python/object/apply:os.system ['touch /tmp/pwned']", "is not readable YAML"),
        (b"- 1", "is not a directory of SAEs"),
        (b"", "is not a directory of SAEs"),
        (b"a: {repo_id: o/r, saes: []}", "names no SAE"),
    ],
)
def test_what_is_no_directory_is_one_sentence_and_changes_nothing(text: bytes, says: str, tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "bad.yaml").write_bytes(text)
    with pytest.raises(CatalogueError, match=says):
        sync(str(tmp_path / "bad.yaml"), say=lambda text: None)
    assert SAE.objects.filter(gone_at=None).count() == 4


def test_a_wheel_is_read_and_names_its_version(tmp_path: Path) -> None:
    wheel = tmp_path / "sae_lens-9.9.9-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("sae_lens/pretrained_saes.yaml", yaml.safe_dump(DIRECTORY))
    read = open_directory(str(wheel))
    assert read.origin == "sae-lens 9.9.9" and len(read.entries) == 5
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("other.py", "")
    for path, says in (
        (tmp_path / "other.whl", "is not a sae-lens wheel"),
        (tmp_path / "none.whl", "There is no file"),
    ):
        with pytest.raises(CatalogueError, match=says):
            open_directory(str(path))


def test_without_an_index_pip_gives_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(CommandError) as caught:
        call_command("catalogue_sync")
    text = str(caught.value)
    assert "sae-lens" in text and "--from FILE" in text and "secret" not in text and "127.0.0.1" not in text
    assert "cannot reach" in text or "has no sae-lens" in text, text


def test_the_command_prints_a_summary(tmp_path: Path, capsys: Any) -> None:
    call_command("catalogue_sync", "--from", write(tmp_path))
    printed = capsys.readouterr().out
    for line in (
        "releases        4",
        "entries        5",
        "rows        4",
        "new        4",
        "changed        0",
        "gone        0",
    ):
        assert line in printed, printed
    call_command("catalogue_sync", "--from", write(tmp_path), "--json")
    assert json.loads(capsys.readouterr().out)["new"] == 0


def test_the_job_does_the_same(tmp_path: Path, run_job: Any, user_of: Any) -> None:
    job = run_job(enqueue("sync", user_of("curator"), title="Sync", source=write(tmp_path)))
    assert job.state == State.DONE, job.traceback
    assert job.result["new"] == 4 and SAE.objects.count() == 4
    job = run_job(enqueue("sync", user_of("curator"), title="Sync", source=str(tmp_path / "none.yaml")))
    assert job.state == State.FAILED and job.error.startswith("There is no file")


def test_the_page_queues_it_for_who_may_curate(client_of: Any) -> None:
    url = reverse("saes:catalogue_sync")
    assert client_of("researcher").post(url).status_code == 403 and client_of("curator").get(url).status_code == 404
    response = client_of("curator").post(url)
    job = Job.objects.get()
    assert job.kind == "sync" and response.url == job.get_absolute_url() and job.params == {}


def wheel_of_the_peers(folder: Path) -> Path:
    """The public directory as it came with the SAELens of `make peers`, packed again as a wheel that pip takes."""
    python = peer()
    if python is None:
        pytest.skip("needs SAELens: make peers, or SAEHUB_PEERS")
    [site] = python.parent.parent.glob("lib/python3*/site-packages")
    wheel = folder / "sae_lens-6.54.12-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in (catalogue.MEMBER, *(f"sae_lens-6.54.12.dist-info/{part}" for part in ("METADATA", "WHEEL"))):
            archive.write(site / name, name)
        archive.writestr("sae_lens-6.54.12.dist-info/RECORD", "")
    return wheel


def test_the_whole_public_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through pip, of a folder instead of an index."""
    wheel = wheel_of_the_peers(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    summary = catalogue.sync(version="6.54.12", say=lambda text: None)
    assert (summary["origin"], summary["releases"], summary["entries"]) == ("sae-lens 6.54.12", 170, 13_857)
    assert summary["rows"] == SAE.objects.count() == 13_428 and summary["aliases"] == 429
    assert len(summary["warnings"]) == 2 and "wrong indentation" in summary["warnings"][0]
    assert (
        SAE.objects.exclude(published_variance=None).count() == 78 and not SAE.objects.filter(published_l0=0).exists()
    )
    assert not SAE.objects.filter(layer=None).exclude(site="embed").exists()
    assert not SAE.objects.filter(hook_name="").exists() and not SAE.objects.filter(format="").exists()
    assert SAE.objects.filter(facts__has_key="norm_scaling_factor").count() == 304
    again = catalogue.sync(str(wheel), say=lambda text: None)
    assert (again["new"], again["changed"], again["gone"]) == (0, 0, 0)
