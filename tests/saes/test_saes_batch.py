"""Batches: what flags, lists and the basket mean, and `manage.py download_saes` from end to end."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command

from saehub.jobs.models import Job, State
from saes.batch import BatchError, BatchSpec, Wish, plan
from saes.models import SAE, Release
from tests.conftest import ROOT, child_environment, wait_for
from tests.mini_hub import COMMIT, MiniHub

GOLDEN = Path(__file__).parent.parent / "golden" / "saelens_topk"
REPO = "google/gemma-scope-2b-pt-res"
RELEASE = "gemma-scope-2b-pt-res"


@pytest.fixture
def catalogue(db: None) -> Release:
    """Three layers of two widths with a few L0s each, another site, and one without an L0."""
    release = Release.objects.create(name=RELEASE, repo_id=REPO, model_name="gemma-2-2b", format="gemma_scope_1")
    rows: list[dict[str, Any]] = [
        {"layer": layer, "d_sae": width, "published_l0": l0, "site": "resid_post", "release": release}
        for layer in range(3)
        for width in (16384, 65536)
        for l0 in (20.0 + layer, 90.0 + layer, 130.0)
    ]
    rows += [{"layer": 0, "d_sae": 16384, "published_l0": None, "site": "resid_post", "release": release}]
    rows += [{"layer": 0, "d_sae": 16384, "published_l0": 70.0, "site": "mlp_out", "release": None}]
    for number, fields in enumerate(rows):
        path = f"layer_{fields['layer']}/width_{fields['d_sae']}/l0_{fields['published_l0']}"
        repo = REPO if fields["site"] == "resid_post" else REPO.replace("res", "mlp")
        fields |= {"sae_id": path, "repo_id": repo, "repo_path": path, "source": "hub", "model_name": "gemma-2-2b"}
        SAE.objects.create(name=f"sae-{number}", **fields)
    SAE.objects.filter(name="sae-1").update(aliases=["gemma-scope-2b-pt-res-canonical/layer_0/width_16k/canonical"])
    return release


def chosen(**flags: str) -> list[tuple[Any, ...]]:
    return [(row.layer, row.d_sae, row.published_l0) for row in plan(BatchSpec.from_flags(flags))]


@pytest.mark.parametrize(
    "flags, rows",
    [
        ({"release": RELEASE, "layers": "0-1", "width": "16k", "l0": "nearest:100"}, [(0, 16384, 90.0), (1, 16384, 91.0)]),
        ({"release": RELEASE, "layers": "2", "l0": "nearest:500"}, [(2, 16384, 130.0), (2, 65536, 130.0)]),
        ({"release": RELEASE, "layers": "0,2", "width": "65k", "l0": "15-50"}, [(0, 65536, 20.0), (2, 65536, 22.0)]),
        ({"release": RELEASE, "width": "16384", "l0": "91"}, [(1, 16384, 91.0)]),
        ({"model": "gemma-2-2b", "site": "mlp"}, [(0, 16384, 70.0)]),
        ({"model": "google/gemma-2-2b", "site": "mlp_out"}, [(0, 16384, 70.0)]),
        ({"release": RELEASE, "l0": "canonical"}, [(0, 16384, 90.0)]),
        ({"release": f"{RELEASE}-canonical"}, [(0, 16384, 90.0)]),
        ({"release": f"{RELEASE}-canonical", "id": "layer_0/width_16k/canonical"}, [(0, 16384, 90.0)]),
        ({"repo": REPO, "path": "layer_1/width_16384/l0_130.0"}, [(1, 16384, 130.0)]),
    ],
)  # fmt: skip
def test_what_flags_mean(catalogue: Release, flags: dict[str, str], rows: list[Any]) -> None:
    assert chosen(**flags) == rows


def test_without_limits_all_of_a_release(catalogue: Release) -> None:
    assert len(chosen(release=RELEASE)) == 19
    assert len(chosen(model="gemma-2-2b")) == 20


def test_a_place_outside_of_the_catalogue_is_a_row_not_saved_yet(catalogue: Release) -> None:
    (row,) = plan(BatchSpec.from_flags({"repo": "lab/own", "path": "a/b/", "revision": "v1"}))
    assert (row.pk, row.repo_id, row.repo_path, row.revision, row.layer) == (None, "lab/own", "a/b", "v1", None)
    (row,) = plan(BatchSpec.from_flags({"repo": REPO, "path": "layer_12/width_16k/average_l0_82"}))
    assert (row.pk, row.layer, row.d_sae, row.published_l0, row.format) == (None, 12, 16384, 82.0, "gemma_scope_1")


def test_every_form_gives_the_same_batch(catalogue: Release, tmp_path: Path) -> None:
    rows = plan(BatchSpec.from_flags({"release": RELEASE, "l0": "nearest:100"}))
    basket = BatchSpec.from_rows(rows)
    files = {
        "a.yaml": basket.to_yaml(),
        "b.csv": "repo,path\n" + "".join(f"{row.repo_id},{row.repo_path}\n" for row in rows),
        "c.yml": f"- {{release: {RELEASE}, layers: [0, 1, 2], l0: 'nearest:100'}}\n",
        "d.csv": f"release,layers,l0\n{RELEASE},0-1,nearest:100\n\n{RELEASE},2,nearest:100\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        assert plan(BatchSpec.from_file(tmp_path / name)) == rows, name
    assert BatchSpec.from_text(basket.to_yaml(), ".yaml") == basket


def test_a_basket_is_found_with_one_query(catalogue: Release, django_assert_num_queries: Any) -> None:
    rows = list(SAE.objects.all())
    for some in (rows[:1], rows):
        spec = BatchSpec.from_rows(some)
        with django_assert_num_queries(1):
            assert plan(spec) == some


def test_one_that_is_here_at_another_commit_is_said(catalogue: Release) -> None:
    row = SAE.objects.get(name="sae-0")
    row.finish(revision="a" * 40)
    spec = BatchSpec.from_rows([row])
    assert plan(spec) == [row]
    row.finish(revision="b" * 40)
    with pytest.raises(BatchError, match="sae-0 is here at commit bbbbbbbbbbbb, not at aaaaaaaaaaaa"):
        plan(spec)


def test_what_is_named_twice_comes_once(catalogue: Release) -> None:
    wish = Wish(release=RELEASE, layers="0")
    assert len(plan(BatchSpec((wish, wish, Wish(release=RELEASE, layers="0-1"))))) == 13


@pytest.mark.parametrize(
    "flags, says, hint",
    [
        ({"release": "gemma-scope-2b-pt-rse"}, "No SAE of the catalogue has release gemma-scope-2b-pt-rse.", RELEASE),
        ({"model": "gemma-2-9b"}, "No SAE of the catalogue has model gemma-2-9b.", "gemma-2-2b"),
        ({"release": RELEASE, "layers": "40"}, "No SAE of the catalogue has release", "layers up to 2; sites resid_post"),
        ({"model": "gemma-2-2b", "site": "mlp", "width": "1m"}, "No SAE of the catalogue has", "widths 16,384, 65,536"),
        ({"release": RELEASE, "layers": "5-1"}, 'layers "5-1" cannot be read.', "0-25"),
        ({"release": RELEASE, "width": "wide"}, 'width "wide" cannot be read.', "16k"),
        ({"release": RELEASE, "l0": "nearest:"}, 'l0 "nearest:" cannot be read.', "nearest:100"),
        ({"layers": "3"}, "say a release, a model or a repository.", ""),
        ({"release": RELEASE, "path": "x"}, "a path needs its repository.", ""),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_said(catalogue: Release, flags: dict[str, str], says: str, hint: str) -> None:
    with pytest.raises(BatchError) as error:
        plan(BatchSpec.from_flags(flags))
    assert says in str(error.value) and hint in error.value.hint, (error.value, error.value.hint)


def test_an_l0_that_nobody_published_cannot_be_chosen_by(catalogue: Release) -> None:
    SAE.objects.update(published_l0=None)
    with pytest.raises(BatchError, match="has a published L0 to choose by"):
        chosen(release=RELEASE, l0="nearest:100")


def test_an_empty_catalogue_is_said(db: None) -> None:
    with pytest.raises(BatchError) as error:
        chosen(release="x")
    assert "catalogue_sync" in error.value.hint


@pytest.mark.parametrize(
    "name, text, says",
    [
        ("a.yaml", "saes:\n  - release: [", "a.yaml is not YAML: line 2"),
        ("a.yaml", "- !!python/object/apply:os.system [ls]", "a.yaml is not YAML"),
        ("a.yaml", "release: x", "a.yaml holds release beside its list saes."),
        ("a.yaml", "saes: 3", "a.yaml has no list of SAEs."),
        ("a.yaml", "[]", "a.yaml names no SAE."),
        ("a.yaml", "- {relaese: x}", 'a.yaml, entry 1: "relaese" is not known.'),
        ("a.yaml", "- {release: {a: b}}", "a.yaml, entry 1: release must be a word or a number."),
        ("a.yaml", "- release: x\n- 7", "a.yaml, entry 2: this does not say which SAEs."),
        ("a.csv", "release,layers\nx,0\ny,7-3\n", 'a.csv, line 3: layers "7-3" cannot be read.'),
        ("a.csv", "release\nx,y,z\n", "a.csv, line 2:"),
        ("a.csv", "colour\nred\n", 'a.csv, line 2: "colour" is not known.'),
        ("a.txt", "x", "a.txt is neither .yaml nor .csv."),
        ("a.yaml", "# " + "x" * 2_000_000, "a.yaml is larger than"),
        ("a.csv", "release\n" + "x\n" * 6000, "a.csv has 6,000 entries"),
    ],
)
def test_a_list_that_cannot_be_read_is_said_with_its_place(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(BatchError) as error:
        BatchSpec.from_file(tmp_path / name)
    assert str(error.value).startswith(says), error.value


def test_files_that_cannot_be_opened_are_said(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"release\n\xff\xfe\n")
    for path, says in ((tmp_path / "a.csv", "not a text file"), (tmp_path / "no.yaml", "cannot be read"), (tmp_path, "cannot be read")):  # fmt: skip
        with pytest.raises(BatchError, match=says):
            BatchSpec.from_file(path)


# -- the command
@pytest.fixture
def served(hub: MiniHub, tmp_path: Path, monkeypatch: Any) -> MiniHub:
    """Four SAEs in one repository, and a gated one."""
    weights, config = ((GOLDEN / name).read_bytes() for name in ("sae_weights.safetensors", "cfg.json"))
    hub.repos["models/lab/saes"] = {
        f"layer_{n}/{name}": data
        for n in range(4)
        for name, data in (("cfg.json", config + b" " * n), ("sae_weights.safetensors", weights))
    }
    hub.repos["models/lab/gated"] = {"cfg.json": config, "sae_weights.safetensors": weights}
    hub.gated.add("models/lab/gated")
    for name, value in {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"}.items():
        monkeypatch.setenv(name, value)
    return hub


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    path = tmp_path / "list.csv"
    path.write_text("repo,path\n" + "".join(f"lab/saes,layer_{n}\n" for n in range(4)))
    return path


def call(*words: str) -> tuple[int, str]:
    """(exit code, standard output) of the command, in this process."""
    out = io.StringIO()
    try:
        call_command("download_saes", *words, stdout=out, stderr=io.StringIO())
    except SystemExit as error:
        return int(error.code or 0), out.getvalue()
    except CommandError as error:
        return error.returncode, str(error)
    return 0, out.getvalue()


@pytest.mark.django_db
def test_a_dry_run_tells_all_and_changes_nothing(served: MiniHub, listed: Path) -> None:
    code, text = call("--spec", str(listed), "--dry-run")
    weights = (GOLDEN / "sae_weights.safetensors").stat().st_size
    assert code == 0 and "4 SAEs, " in text and "of disk to spare" in text and "lab/saes:layer_3" in text
    assert not SAE.objects.exists() and not Job.objects.exists()
    assert not [asked for asked in served.requests if "/resolve/" in asked.path]
    code, text = call("--spec", str(listed), "--dry-run", "--json")
    found = json.loads(text)
    config = (GOLDEN / "cfg.json").stat().st_size
    assert [one["bytes"] for one in found["saes"]] == [weights + config + n for n in range(4)]
    assert found["dry_run"] and found["free"] > 0 and code == 0


@pytest.mark.django_db
@pytest.mark.parametrize(
    "words, says",
    [
        ([], "Say which SAEs"),
        (["--release", "none"], "No SAE of the catalogue has release none."),
        (["--repo", "lab/saes", "--spec", "x.csv"], "Give either --spec or --repo."),
        (["--spec", "nothere.csv"], "nothere.csv cannot be read"),
        (["--repo", "lab/saes", "--path", "layer_0", "--jobs", "0"], "--jobs is 1 to"),
        (["--repo", "lab/saes", "--path", "layer_0", "--user", "nobody"], "There is no user nobody."),
    ],
)
def test_a_bad_request_is_code_2(served: MiniHub, words: list[str], says: str) -> None:
    code, text = call(*words)
    assert code == 2 and says in text
    assert not Job.objects.exists()


@pytest.mark.django_db
def test_what_does_not_fit_is_refused_whole(served: MiniHub, listed: Path, settings: Any) -> None:
    settings.DISK_RESERVE = 10**18
    code, text = call("--spec", str(listed))
    assert code == 2 and "the disk has 0 B to spare" in text and not Job.objects.exists()


@pytest.mark.usefixtures("committed")
def test_all_are_brought_by_jobs_that_the_pages_show(served: MiniHub, listed: Path) -> None:
    code, text = call("--spec", str(listed), "--jobs", "3")
    assert code == 0 and "4 of 4 are here" in text
    assert SAE.objects.ready().filter(revision=COMMIT).count() == 4
    jobs = Job.objects.all()
    assert {job.state for job in jobs} == {State.DONE} and {job.kind for job in jobs} == {"download"}
    assert {job.subject_id for job in jobs} == set(SAE.objects.values_list("pk", flat=True))
    served.requests.clear()
    code, text = call("--spec", str(listed), "--json")
    found = json.loads(text)
    assert code == 0 and [one["state"] for one in found["saes"]] == ["here"] * 4 and found["bytes"] == 0
    assert Job.objects.count() == 4 and not [asked for asked in served.requests if "/resolve/" in asked.path]


@pytest.mark.usefixtures("committed")
def test_one_that_fails_does_not_hold_up_the_others(served: MiniHub, tmp_path: Path) -> None:
    path = tmp_path / "list.yaml"
    path.write_text(
        "- {repo: lab/saes, path: layer_0}\n- {repo: lab/gated}\n- {repo: lab/saes, path: layer_9}\n- {repo: lab/none, path: x}\n"
    )
    code, text = call("--spec", str(path), "--json")
    found = json.loads(text)
    assert code == 1 and (found["done"], found["failed"]) == (1, 3)
    assert [one["state"] for one in found["saes"]] == ["done", "failed", "failed", "failed"]
    said = [one["error"] for one in found["saes"]]
    assert "is gated" in said[1] and "no SAE weights at layer_9" in said[2] and "no repository lab/none" in said[3]
    assert "Account" in found["saes"][1]["hint"]


@pytest.mark.usefixtures("committed")
def test_an_sae_that_is_being_brought_is_waited_for_not_brought_twice(served: MiniHub) -> None:
    row = SAE.objects.create(name="sae", source="hub", repo_id="lab/saes", repo_path="layer_0")
    job = row.start(None)
    code, _ = call("--repo", "lab/saes", "--path", "layer_0")
    job.refresh_from_db()
    assert code == 0 and Job.objects.count() == 1 and job.state == State.DONE


@pytest.mark.usefixtures("committed")
def test_a_spec_may_name_another_revision_than_the_row_has(served: MiniHub) -> None:
    SAE.objects.create(name="sae", source="hub", repo_id="lab/saes", repo_path="layer_0", revision="gone")
    assert call("--repo", "lab/saes", "--path", "layer_0")[0] == 1
    assert call("--repo", "lab/saes", "--path", "layer_0", "--revision", "main")[0] == 0


@pytest.mark.usefixtures("committed")
def test_ctrl_c_leaves_all_as_it_is_and_the_same_command_goes_on(served: MiniHub, listed: Path, tmp_path: Path) -> None:
    """In a process of its own, as in a terminal."""
    rate = served.fault("/lfs/", "rate", 40_000, times=None)
    served.repos["models/lab/saes"] |= {
        f"layer_{n}/sae_weights.safetensors": padded(n, 200_000) for n in range(4)
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "manage.py"), "download_saes", "--spec", str(listed), "--jobs", "2"]
    child = subprocess.Popen(
        command, env=child_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        parts = tmp_path / "hub" / "models--lab--saes" / "blobs"

        def begun() -> bool:
            return sum(path.stat().st_size for path in parts.glob("*.incomplete")) > 50_000

        wait_for(lambda: begun() or child.poll() is not None, 300, "some bytes")
        rate.value = 100  # no file comes to its end any more
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=600)
    finally:
        child.kill()
    assert child.returncode == 1, err
    assert "the same command goes on from there" in err and "0 of 4 are here" in out and "cancelled" in out
    assert "Traceback" not in err
    assert {job.state for job in Job.objects.all()} == {State.CANCELLED}
    kept = {path.name.partition(".")[0]: path.stat().st_size for path in parts.glob("*.incomplete")}
    assert kept
    served.faults.clear()
    served.requests.clear()
    done = subprocess.run([*command, "--json"], env=child_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["done"] == 4
    ranges = sorted(asked.range for asked in served.requests if asked.path.startswith("/lfs/") and asked.range)
    assert ranges == sorted(f"bytes={n}-" for n in kept.values())


@pytest.mark.usefixtures("committed")
def test_in_a_terminal_each_file_on_its_way_has_a_bar(served: MiniHub, listed: Path) -> None:
    rate = served.fault("/lfs/", "rate", 40_000, times=None)
    served.repos["models/lab/saes"] |= {f"layer_{n}/sae_weights.safetensors": padded(n, 100_000) for n in range(4)}
    near, far = pty.openpty()
    fcntl.ioctl(far, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    command = [sys.executable, str(ROOT / "manage.py"), "download_saes", "--spec", str(listed), "--jobs", "2"]
    child = subprocess.Popen(command, env=child_environment(), stdout=far, stderr=far, close_fds=True)
    os.close(far)
    shown = b""

    def bars() -> dict[str, set[str]]:
        text = shown.decode("utf-8", "replace")
        names = ("  sae_weights.safetensors", "all")
        return {name: set(re.findall(rf"{re.escape(name)}:\s+(\d+)%", text)) for name in names}

    with contextlib.suppress(OSError):  # how the end of a terminal reads
        while piece := os.read(near, 65536):
            shown += piece
            if all(len(percents) > 2 for percents in bars().values()):
                rate.value = 50_000_000  # they were seen to move
    os.close(near)
    text = shown.decode("utf-8", "replace")
    assert child.wait(300) == 0, text
    assert all(len(percents) > 2 for percents in bars().values()), bars()
    assert "layer_3" in text and "4 of 4 are here" in text


def padded(seed: int, length: int) -> bytes:
    """The golden SAE with other weights, in a file of at least `length` bytes, so that it takes a while."""
    import torch
    from safetensors.torch import load, save

    generator = torch.Generator().manual_seed(seed)
    tensors = load((GOLDEN / "sae_weights.safetensors").read_bytes())
    made = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}
    return save(made, metadata={"filler": os.urandom(length // 2).hex()})
