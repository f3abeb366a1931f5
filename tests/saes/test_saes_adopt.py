"""Adopting files: detected, checked, converted with proof, registered whole or not at all."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from saehub.jobs.models import Job, enqueue
from saehub.jobs.progress import JobError, Progress
from saes import adopt
from saes.hook_places import place_of
from saes.models import SAE, LanguageModel
from saes.numerics import formats
from saes.numerics.architectures import build_sae
from saes.numerics.formats import FormatError, MissingFact, NotRepresentable, load_sae, save_sae
from saes.numerics.sae import SAEConfig

pytestmark = pytest.mark.django_db


@pytest.fixture
def progress() -> Progress:
    job = enqueue("probe", None, title="t", steps=1)
    return Progress(Job.objects.claim(job.pk, "test"))


def an_sae(folder: Path, architecture: str = "topk", **changes: Any) -> Path:
    config = {"d_in": 16, "d_sae": 64, "k": 4 if architecture == "topk" else None, "model_name": "tiny"} | changes
    config |= {"hook_name": "blocks.1.hook_resid_post"} if "hook_name" not in changes else {}
    save_sae(build_sae(SAEConfig(architecture, **config), seed=changes.get("k", 0)), folder)
    return folder


def a_row(**fields: Any) -> SAE:
    return SAE.objects.create(**{"name": "mine", "source": "file"} | fields)


def left(data: Path) -> list[str]:
    return sorted(str(path.relative_to(data)) for path in data.rglob("*") if path.is_file())


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> str:
    """A second name for the current form, so that what is written in it counts as another format: it is converted."""
    ours = formats.FORMATS["saelens"]
    monkeypatch.setitem(formats.FORMATS, "foreign", ours)
    monkeypatch.setattr(adopt, "detect_format", lambda path: "foreign")
    return "foreign"


def test_the_current_form_is_used_where_it_is(progress: Any, tmp_path: Path, data_folder: Path) -> None:
    folder = an_sae(tmp_path / "given")
    model = LanguageModel.objects.create(name="x", location="org/Tiny", source="hub")
    row = a_row()
    result = adopt.adopt_files(progress, row, folder, {})
    row.refresh_from_db()
    assert row.ready and row.format == "saelens" and row.path == str(folder) and row.files == folder
    assert (row.architecture, row.d_in, row.d_sae, row.k) == ("topk", 16, 64, 4)
    assert (row.model, row.model_name, row.hook_name) == (model, "tiny", "blocks.1.hook_resid_post")
    assert (row.site, row.layer, row.config["d_out"], row.proof) == ("resid_post", 1, 16, {})
    assert row.sha256 == row.checksums["sae_weights.safetensors"]["sha256"] == result["sha256"]
    assert row.size_bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert row.own_files() == [] and left(data_folder) == []


def test_another_form_is_converted_and_proved(progress: Any, tmp_path: Path, data_folder: Path, foreign: str) -> None:
    folder, row = an_sae(tmp_path / "given"), a_row()
    adopt.adopt_files(progress, row, folder, {"repo_id": "org/repo"})
    row.refresh_from_db()
    assert row.format == "saelens" and row.path == f"sae/file/{row.pk}" and row.facts == {"repo_id": "org/repo"}
    proof = row.proof
    assert (proof["source_format"], proof["n"], proof["holds"], proof["same_active_set"]) == ("foreign", 64, True, True)
    assert proof["max_abs_acts"] == proof["max_abs_x_hat"] == 0.0 and proof["mean_l0"] == 4.0
    x = torch.randn(5, 16)
    assert torch.equal(load_sae(row.files)(x), load_sae(folder)(x))
    assert set(row.checksums) == {"cfg.json", "sae_weights.safetensors"}
    assert row.sha256 == proof["source"]["sae_weights.safetensors"]["sha256"], "of the weights as they were published"
    assert row.own_files() == [row.files]


def test_a_conversion_that_changes_the_sae_is_refused(
    progress: Any, tmp_path: Path, data_folder: Path, foreign: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(sae: Any, folder: Path) -> None:
        with torch.no_grad():
            sae.b_dec += 0.01
        save_sae(sae, folder)

    monkeypatch.setattr(adopt, "save_sae", spoiled)
    row = a_row()
    with pytest.raises(JobError, match=r"codes differ by .*, so it was not imported"):
        adopt.adopt_files(progress, row, an_sae(tmp_path / "given"), {})
    row.refresh_from_db()
    assert not row.ready and row.path == "" and left(data_folder) == []


def test_what_our_form_cannot_hold_stays_as_it_is(
    progress: Any, tmp_path: Path, data_folder: Path, foreign: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(sae: Any, folder: Path) -> None:
        raise NotRepresentable("The saelens format has no architecture 'groupmax'.")

    monkeypatch.setattr(adopt, "save_sae", refuse)
    row = a_row()
    folder = an_sae(tmp_path / "given")
    adopt.adopt_files(progress, row, folder, {})
    assert (row.format, row.path, row.proof, left(data_folder)) == ("foreign", str(folder), {}, [])
    assert any("no architecture 'groupmax'" in line.text for line in progress.job.lines.all())


def test_an_upload_moves_under_the_data_folder(progress: Any, data_folder: Path) -> None:
    row = a_row()
    folder = an_sae(row.upload / "files" / "layer_1")
    (row.upload / "files" / "README.md").write_text("words")
    adopt.adopt_files(progress, row, folder, {})
    assert row.path == f"sae/file/{row.pk}/layer_1" and load_sae(row.files).config.k == 4
    assert left(data_folder) == [f"{row.path}/cfg.json", f"{row.path}/sae_weights.safetensors"], "nothing else is kept"
    row.delete()
    assert left(data_folder) == [] and not (data_folder / "sae" / "file" / str(row.pk)).exists()


def test_a_missing_fact_is_waited_for(progress: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Missing(FormatError):
        names = ("k",)

    real = load_sae

    def needs_k(path: Path, *, facts: Any = None, **more: Any) -> Any:
        if "k" not in facts:
            raise MissingFact("The files do not say k.", "k")
        return real(path, facts=facts, **more)

    monkeypatch.setattr(adopt, "load_sae", needs_k)
    folder, row = an_sae(tmp_path / "given"), a_row()
    with pytest.raises(adopt.MissingFacts, match="do not say k"):
        adopt.adopt_files(progress, row, folder, {})
    row.refresh_from_db()
    assert row.asked == ["k"] and not row.ready
    adopt.adopt_files(progress, row, folder, {"k": 4})
    row.refresh_from_db()
    assert row.ready and row.asked == [] and row.facts == {"k": 4}


def test_what_the_row_knows_is_a_fact(progress: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = load_sae

    def needs_hook(path: Path, *, facts: Any = None, **more: Any) -> Any:
        if "hook_name" not in facts:
            raise MissingFact("no hook", "hook_name")
        return real(path, facts=facts, **more)

    monkeypatch.setattr(adopt, "load_sae", needs_hook)
    row = a_row(hook_name="blocks.0.hook_mlp_out")
    adopt.adopt_files(progress, row, an_sae(tmp_path / "given"), {})
    assert (row.hook_name, row.site, row.layer) == ("blocks.0.hook_mlp_out", "mlp_out", 0)
    assert row.facts == {"hook_name": "blocks.0.hook_mlp_out"}, "kept: nothing is supplied in silence"


def test_the_same_weights_twice_are_refused_unless_asked_for(progress: Any, tmp_path: Path) -> None:
    first = a_row(name="first")
    adopt.adopt_files(progress, first, an_sae(tmp_path / "one"), {})
    again = a_row(name="again")
    with pytest.raises(JobError, match=rf"same weights as first \(SAE {first.pk}\)"):
        adopt.adopt_files(progress, again, an_sae(tmp_path / "two"), {})
    again.facts = {"second_copy": True}
    adopt.adopt_files(progress, again, tmp_path / "two", {})
    assert again.ready and again.sha256 == first.sha256


def test_hostile_text_in_a_config_does_not_reach_the_database(progress: Any, tmp_path: Path) -> None:
    folder, row = an_sae(tmp_path / "given", metadata={"note": "a\0b\ud800", "deep": [{"x": "\0"}]}), a_row()
    adopt.adopt_files(progress, row, folder, {})
    row.refresh_from_db()
    assert row.config["metadata"]["note"] == "ab?" and row.config["metadata"]["deep"] == [{"x": ""}]
    with pytest.raises(FormatError, match="hook_name is longer than 200"):
        adopt.adopt_files(progress, a_row(), an_sae(tmp_path / "long", hook_name="h" * 201), {})


def test_what_was_stored_small_stays_small() -> None:
    sae = build_sae(SAEConfig("topk", 16, 64, k=4), seed=1)
    assert adopt.compacted(sae).W_enc.dtype == torch.float32
    assert adopt.compacted(sae.to(torch.bfloat16).float()).W_enc.dtype == torch.bfloat16


@pytest.mark.parametrize("scale", [1e-3, 1.0, 200.0])
def test_the_probe_batch_fires_at_any_scale(scale: float) -> None:
    sae = build_sae(SAEConfig("standard", 16, 64), seed=1)
    with torch.no_grad():
        sae.b_enc -= scale
    acts = sae.encode(adopt.probe_batch(sae))
    assert (acts != 0).any(-1).float().mean() >= 0.5 and not (acts != 0).all()


@pytest.mark.parametrize(
    "hook, more, place",
    [
        ("blocks.12.hook_resid_post", {}, ("resid_post", 12)),
        ("model.layers.9", {}, ("resid_post", 9)),
        ("layers.3.mlp", {}, ("mlp_out", 3)),
        ("blocks.5.attn.hook_z", {}, ("hook_z", 5)),
        ("hook_embed", {}, ("embed", None)),
        ("blocks.3.ln2.hook_normalized", {"hook_name_out": "blocks.3.hook_mlp_out"}, ("transcoder", 3)),
        ("blocks.3.hook_mlp_in", {"architecture": "jumprelu_transcoder"}, ("transcoder", 3)),
        ("blocks.99999999999.hook_resid_pre", {}, ("", None)),
        ("something.else", {}, ("", None)),
    ],
)
def test_places_are_read_off_the_hook_points_name(hook: str, more: dict[str, str], place: tuple[str, int]) -> None:
    assert place_of(hook, **more) == place


def test_a_batchtopk_checkpoint_is_adopted_as_the_sae_to_use(progress: Any, tmp_path: Path, data_folder: Path) -> None:
    """Its codes in training depend on the whole batch; what is kept is the JumpReLU SAE that training made."""
    folder = an_sae(tmp_path / "given", "standard")
    tensors = load_file(folder / "sae_weights.safetensors")
    save_file(tensors | {"topk_threshold": torch.tensor(0.2, dtype=torch.float64)}, folder / "sae_weights.safetensors")
    cfg = json.loads((folder / "cfg.json").read_text())
    told = {"architecture": "batchtopk", "k": 4.0, "rescale_acts_by_decoder_norm": True, "decoder_init_norm": 0.1}
    (folder / "cfg.json").write_text(json.dumps(cfg | told))
    row = a_row()
    adopt.adopt_files(progress, row, folder, {})
    row.refresh_from_db()
    assert (row.format, row.architecture) == ("saelens", "jumprelu")
    assert row.proof["source_format"] == "saelens_training" and row.proof["holds"]
    assert row.config["metadata"]["training_architecture"] == "batchtopk"
