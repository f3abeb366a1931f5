"""One YAML document for page, API and command: what it says is what is trained, and a run's own trains it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from django.core.management import CommandError, call_command
from django.urls import reverse
from safetensors.torch import load_file

from saehub.jobs.models import State
from saes.models import SAE
from training.models import Capture, Run, Sweep
from training.presets import PRESETS
from training.run_document import TRAINER, DocumentError, form_of, from_yaml, of_run, of_sweep, to_yaml
from training.run_form import RunForm

HOOK = "blocks.1.hook_resid_post"


def document(capture: Capture, **changes: Any) -> dict[str, Any]:
    given = {
        "capture": capture.pk, "architecture": "topk", "k": 4, "d_sae": 64, "n_tokens": 1280, "batch_size": 64,
        "evaluate_after": False, "harvest_after": False,
    }  # fmt: skip
    return given | changes


def weights(run: Run) -> dict[str, torch.Tensor]:
    assert run.sae, run.state
    return load_file(run.sae.files / "sae_weights.safetensors")


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"architecture": "jumprelu", "target_l0": 5.0, "seed": 3, "bandwidth": 0.1},
        {
            "architecture": "batchtopk",
            "matryoshka_widths": [16, 32],
            "order_seed": 7,
            "clip": 1.0,
            "lr": 0.0012345678901,
        },
        {"architecture": "gated", "l1_coefficient": 0.5, "initialization": "saelens", "precision": "float32"},
    ],
    ids=["topk", "jumprelu", "matryoshka", "gated"],
)
def test_the_document_of_a_finished_run_trains_it_again_to_the_bit(
    make_capture: Any, run_job: Any, user_of: Any, more: dict[str, Any]
) -> None:
    first = form_of(document(make_capture()[0], **more), user_of("researcher"))
    assert first.is_valid(), first.errors
    run = first.make()
    assert run_job(run.job).state == State.DONE, run.job.error
    run.refresh_from_db()
    manifest = json.loads((run.sae.files / "config.json").read_text())
    for source in (to_yaml(of_run(run)), to_yaml(manifest["document"])):
        again = form_of(from_yaml(source), user_of("researcher"))
        assert again.is_valid(), again.errors
        twin = again.make()
        assert twin.config == run.config
        assert run_job(twin.job).state == State.DONE, twin.job.error
        twin.refresh_from_db()
        for name, tensor in weights(run).items():
            assert torch.equal(tensor, weights(twin)[name]), name
    assert set(manifest["made_with"]) >= {"torch", "transformers"}
    assert manifest["document"]["corpus_sha256"] == run.capture.corpus.sha256


def test_processes_and_fast_products_are_part_of_the_document(make_capture: Any, user_of: Any) -> None:
    form = form_of(document(make_capture()[0], processes=2, precision="fast"), user_of("researcher"))
    assert form.is_valid(), form.errors
    run = form.make()
    said = from_yaml(to_yaml(of_run(run)))
    assert (run.processes, said["processes"]) == (2, 2)
    assert form_of(said, user_of("researcher")).is_valid()


def test_a_document_with_lists_is_a_sweep_and_says_so_again(make_capture: Any, user_of: Any) -> None:
    form = form_of(document(make_capture()[0], k=[4, 8], seed=[0, 1]), user_of("researcher"))
    assert form.is_valid(), form.errors
    sweep = form.make()
    said = from_yaml(to_yaml(of_sweep(sweep)))
    assert (said["k"], said["seed"], said["order_seed"]) == ([4, 8], [0, 1], 0)
    again = form_of(said, user_of("researcher"))
    assert again.is_valid(), again.errors
    twin = again.make()
    assert [run.config for run in twin.runs.order_by("pk")] == [run.config for run in sweep.runs.order_by("pk")]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("k: [1", "not YAML (line"),
        ("- 1", "`key: value` lines"),
        ("kk: 3", "There is no setting kk"),
        ("k: 3", "Say what to train on"),
        ("capture: 99", "no finished capture 99"),
        ("!!python/object/apply:os.system ['true']", "not YAML"),
        ("k: " + "[" * 20_000, "not YAML"),
        ("k: " + "9" * 5_000, "not YAML"),
        ("name: 2026-13-45", "not YAML"),
        ("k: &a [1, 1]\nlr: [*a, *a]", "no aliases"),
        ("k: 4\nsteps: .nan", "steps is neither"),
        ("k: 2026-01-01", "k is neither"),
        ('capture_name: "\\ud800"', "Texts may hold neither the zero character"),
        ('capture_name: "a\\0"', "Texts may hold neither the zero character"),
    ],
)
def test_what_is_no_document_gets_one_sentence(db: Any, user_of: Any, text: str, says: str) -> None:
    with pytest.raises(DocumentError) as error:
        form_of(from_yaml(text), user_of("researcher"))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "line", ["hook_name: 3", "hook_name: {a: b}", "k: 2026-01-01", "name: [a, b]", "processes: .inf"]
)
def test_a_value_of_the_wrong_kind_is_said_beside_the_document(make_capture: Any, client_of: Any, line: str) -> None:
    text = f"capture: {make_capture()[0].pk}\nk: 4\n{line}"
    answer = client_of("researcher").post(reverse("training:run_create"), {"document": text})
    assert answer.status_code == (302 if line.startswith("name") else 422)


@pytest.mark.parametrize("value", ["2026-01-01", "[a, b]", "{a: b}", "!!binary aGFsbG8=", ".nan", "true", "'3'"])
def test_a_value_that_only_the_trainer_knows_is_no_crash(make_capture: Any, client_of: Any, value: str) -> None:
    for name in TRAINER:
        text = f"capture: {make_capture()[0].pk}\nk: 4\n{name}: {value}"
        answer = client_of("researcher").post(reverse("training:run_create"), {"document": text})
        assert answer.status_code in (302, 422), name


def test_another_text_is_refused(make_capture: Any, user_of: Any) -> None:
    with pytest.raises(DocumentError, match="is of another text"):
        form_of(document(make_capture()[0], corpus_sha256="0" * 64), user_of("researcher"))


def test_the_page_takes_and_gives_the_document(make_capture: Any, run_job: Any, client_of: Any) -> None:
    text = to_yaml(document(make_capture()[0], k=5))
    client, address = client_of("researcher"), reverse("training:run_create")
    answer = client.post(address, {"document": text})
    run = Run.objects.get()
    assert (answer.status_code, answer.url, run.config["k"]) == (302, run.get_absolute_url(), 5)
    given = client.get(reverse("training:run_yaml", args=[run.pk]))
    assert yaml.safe_load(given.content) == of_run(run)
    lines = given.content.decode().splitlines()
    assert [line.split(":")[0] for line in lines] == list(of_run(run)), "a line for each key, to read and to edit"
    for wrong, says in (("k: [", "not YAML"), (text.replace("k: 5", "k: 500"), "k is 500")):
        answer = client.post(address, {"document": wrong})
        assert answer.status_code == 422
        assert says in answer.content.decode()
        assert wrong.splitlines()[0] in answer.content.decode(), "what was pasted is not lost"
    assert client_of("viewer").post(address, {"document": text}).status_code == 403


# ---------------------------------------------------------------------------------------------------- the command


def test_the_command_refuses_with_code_2(make_capture: Any, tmp_path: Path) -> None:
    capture = make_capture()[0]
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    for flags, says in (
        ([str(tmp_path / "latin.yaml")], "latin.yaml is not UTF-8 text."),
        (["--capture", "99"], "no finished capture"),
        (["--capture", str(capture.pk), "--d-sae", "64", "--k", "100"], "k: k is 100"),
        ([str(tmp_path / "none.yaml")], "cannot be read"),
        (["--resume", "99"], "There is no run 99"),
        (["--capture", str(capture.pk), "--user", "nobody"], "no user nobody"),
    ):
        with pytest.raises(CommandError, match=says) as error:
            call_command("train", *flags)
        assert error.value.returncode == 2


def test_a_dry_run_says_what_it_would_train_and_makes_nothing(make_capture: Any, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(to_yaml(document(make_capture()[0], k=[4, 8])))
    call_command("train", str(file), "--seed", "0,1,2", "--dry-run", "--json")
    said = json.loads(capsys.readouterr().out)
    assert (said["runs"], said["dry_run"]) == (6, True)
    assert {(point["k"], point["seed"]) for point in said["points"]} == {(k, s) for k in (4, 8) for s in (0, 1, 2)}
    assert not Run.objects.exists() and not Sweep.objects.exists()


# ---------------------------------------------------------------------------------------------------- beginnings


@pytest.mark.parametrize("key", PRESETS)
def test_every_preset_fills_a_form_that_can_be_trained(
    make_capture: Any, client_of: Any, user_of: Any, key: str
) -> None:
    capture = make_capture()[0]
    page = client_of("researcher").get(reverse("training:run_create") + f"?preset={key}&capture={capture.pk}")
    assert PRESETS[key].source in page.content.decode()
    form = page.context["form"]
    data = {name: form[name].value() for name in form.fields}
    data = {name: value for name, value in data.items() if value is not None and value is not False} | {"d_sae": "4096"}
    bound = RunForm(data, user=user_of("researcher"))
    assert bound.is_valid(), bound.errors
    for name, value in PRESETS[key].values.items():
        assert bound.cleaned_data[name] == value, name


def test_train_like_any_sae(make_capture: Any, model: Any, client_of: Any) -> None:
    capture = make_capture()[0]
    sae = SAE.objects.create(
        name="public", source=SAE.Source.HUB, model=model, model_name="tiny", hook_name=HOOK, architecture="batchtopk",
        d_in=32, d_sae=96, k=6, path="", config={"context_size": 32},
    )  # fmt: skip
    page = client_of("researcher").get(reverse("training:run_create") + f"?sae={sae.pk}")
    form = page.context["form"]
    shown = {name: form[name].value() for name in ("source", "architecture", "d_sae", "k")}
    assert shown == {"source": f"{capture.pk}:{HOOK}", "architecture": "batchtopk", "d_sae": "96", "k": "6"}
    assert "contexts of 32 tokens" in page.content.decode()
    assert "nothing-like" not in page.content.decode()


def test_train_like_an_sae_of_which_there_is_no_capture_says_so(make_capture: Any, model: Any, client_of: Any) -> None:
    make_capture()
    elsewhere = {"source": SAE.Source.HUB, "architecture": "topk", "d_sae": 96, "k": 6, "path": ""}
    here = SAE.objects.create(
        name="other place", model=model, model_name="tiny", hook_name="blocks.0.hook_mlp_out", **elsewhere
    )
    page = client_of("researcher").get(reverse("training:run_create") + f"?sae={here.pk}").content.decode()
    assert "No capture here holds" in page and f"{reverse('training:capture_create')}?model={model.pk}" in page
    unknown = SAE.objects.create(name="of another model", model_name="gpt2", hook_name=HOOK, **elsewhere)
    page = client_of("researcher").get(reverse("training:run_create") + f"?sae={unknown.pk}").content.decode()
    assert "No capture here holds" in page and reverse("saes:model_create") in page
