"""The SAELens form holds every architecture it has a class for, bit by bit; its older and its training forms are read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from saes.numerics.architectures import ARCHITECTURES, sae_class
from saes.numerics.formats import (
    FormatError,
    MissingFact,
    NotRepresentable,
    detect_format,
    load_sae,
    save_sae,
)
from saes.numerics.sae import SAE, SAEConfig, SAEError

CONFIGS: dict[str, dict[str, Any]] = {
    "standard": {"normalize_activations": "layer_norm"},
    "topk": {"k": 4},
    "abstopk": {"k": 4, "apply_b_dec_to_input": False},
    "jumprelu": {"normalize_activations": "covariance_whitening"},
    "gated": {"normalize_activations": "expected_average_only_in"},
    "matching_pursuit": {
        "options": {"residual_threshold": 0.25, "max_iterations": 5, "stop_on_duplicate_support": False}
    },
    "temporal": {
        "options": {
            "n_heads": 2, "n_attn_layers": 2, "bottleneck_factor": 5, "sae_diff_type": "topk", "kval_topk": 3,
            "tied_weights": False, "activation_normalization_factor": 0.5,
        }
    },
} | {
    name: {"d_out": 5, "apply_b_dec_to_input": False, "hook_name_out": "blocks.1.hook_mlp_out"}
    for name in ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
}  # fmt: skip
HAS_NO_FORM = {
    "groupmax": {"k": 4}, "topk_by_decoder_norm": {"k": 4}, "skip_sae": {}, "tanh_relu": {},
    "topk_transcoder": {"k": 4, "apply_b_dec_to_input": False},
    "topk_skip_transcoder": {"k": 4, "apply_b_dec_to_input": False},
    "topk_by_decoder_norm_transcoder": {"k": 4, "apply_b_dec_to_input": False},
    "crosscoder": {"options": {"hooks": 2}, "apply_b_dec_to_input": False},
    "causal_crosscoder": {"options": {"hooks": 2}, "apply_b_dec_to_input": False},
    "clt": {"options": {"hooks": 2}, "apply_b_dec_to_input": False},
}  # fmt: skip


def random_sae(architecture: str, dtype: torch.dtype = torch.float32, **options: Any) -> SAE:
    hook = {"hook_name": "blocks.1.hook_resid_pre", "model_name": "me/mine"}
    sae = sae_class(architecture)(SAEConfig(architecture, 6, 20, **hook | options), dtype=dtype).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sae.named_parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        if name == "threshold":
            parameter.abs_()
    return sae


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    cfg = json.loads((folder / "cfg.json").read_text())
    change(cfg)
    (folder / "cfg.json").write_text(json.dumps(cfg))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "sae_weights.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "sae_weights.safetensors")


def assert_same_bits(a: SAE, b: SAE) -> None:
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, tensor in a.state_dict().items():
        assert b.state_dict()[name].dtype == tensor.dtype and torch.equal(b.state_dict()[name], tensor), name


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_round_trip_of_every_architecture_is_exact(architecture, dtype, tmp_path):
    sae = random_sae(architecture, dtype, metadata={"dataset_path": "c4"}, **CONFIGS[architecture])
    sae.log_sparsity = torch.linspace(-10, 0, 20)
    save_sae(sae, tmp_path / "sae")
    assert detect_format(tmp_path / "sae") == "saelens"
    again = load_sae(tmp_path / "sae", dtype=None)
    assert_same_bits(sae, again)
    assert again.config.metadata.pop("sae_lens_version")
    assert again.config == sae.config
    assert torch.equal(again.log_sparsity, sae.log_sparsity)


@pytest.mark.parametrize("architecture", HAS_NO_FORM)
def test_what_sae_lens_has_no_class_for_is_refused_by_name(architecture, tmp_path):
    sae = random_sae(architecture, **HAS_NO_FORM[architecture])
    with pytest.raises(NotRepresentable, match=f"no architecture '{architecture}'"):
        save_sae(sae, tmp_path / "sae")


def test_every_architecture_is_either_written_or_refused():
    assert set(CONFIGS) | set(HAS_NO_FORM) | {"batchtopk"} == set(ARCHITECTURES)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"options": {"glu": True}}, "no place for glu"),
        ({"d_out": 5, "apply_b_dec_to_input": False}, "d_out other than d_in"),
    ],
)
def test_what_has_no_place_in_cfg_is_refused_by_name(config, sentence, tmp_path):
    with pytest.raises(NotRepresentable, match=sentence):
        save_sae(random_sae("standard", **config), tmp_path / "sae")
    with pytest.raises(NotRepresentable, match="no transcoder that subtracts b_dec"):
        save_sae(random_sae("transcoder"), tmp_path / "sae")


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
def test_either_of_its_files_means_the_folder(name, tmp_path):
    sae = random_sae("standard")
    save_sae(sae, tmp_path / "sae")
    assert detect_format(tmp_path / "sae" / name) == "saelens"
    assert_same_bits(sae, load_sae(tmp_path / "sae" / name))


def test_mixed_storage_is_kept_in_the_dtype_that_holds_all_of_it(tmp_path):
    save_sae(random_sae("jumprelu", torch.bfloat16), tmp_path / "sae")
    edit_tensors(tmp_path / "sae", lambda t: t.update(threshold=t["threshold"].float() + 1e-4))
    sae = load_sae(tmp_path / "sae", dtype=None)
    assert sae.W_dec.dtype == torch.float32
    assert torch.equal(sae.threshold, load_file(tmp_path / "sae" / "sae_weights.safetensors")["threshold"])


def test_a_batchtopk_sae_is_written_as_the_jumprelu_sae_that_training_made(tmp_path):
    sae = random_sae("batchtopk", k=2.5)
    sae.threshold.fill_(0.3)
    save_sae(sae, tmp_path / "sae")
    cfg = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    assert cfg["architecture"] == "jumprelu" and "k" not in cfg
    assert cfg["metadata"]["training_architecture"] == "batchtopk"
    assert cfg["metadata"]["training_architecture_details"]["k"] == 2.5
    again = load_sae(tmp_path / "sae")
    assert_same_bits(sae.for_inference(), again)
    assert sae.config.metadata == {}


def test_firing_rates_of_the_wrong_length_are_left_out_and_that_is_said(tmp_path):
    save_sae(random_sae("standard"), tmp_path / "sae")
    for wrong in (
        {"sparsity": torch.zeros(19)},
        {"other": torch.zeros(20)},
        {"sparsity": torch.full((20,), torch.nan)},
    ):
        save_file(wrong, tmp_path / "sae" / "sparsity.safetensors")
        sae = load_sae(tmp_path / "sae")
        assert sae.log_sparsity is None
        assert sae.config.metadata["sparsity_left_out"].endswith(".")
    (tmp_path / "sae" / "sparsity.safetensors").write_bytes(b"<html>")
    assert "web page" in load_sae(tmp_path / "sae").config.metadata["sparsity_left_out"]


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated", "matching_pursuit"])
def test_a_scaling_factor_folds_into_every_architecture(architecture, tmp_path):
    config = CONFIGS[architecture] | {"normalize_activations": "expected_average_only_in"}
    sae = random_sae(architecture, **config)
    save_sae(sae, tmp_path / "sae")
    folded = load_sae(tmp_path / "sae", facts={"norm_scaling_factor": 2.5})
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(folded(x), sae(2.5 * x) / 2.5, rtol=1e-4, atol=1e-5)
    scale = 1 / 2.5 if architecture == "matching_pursuit" else 1  # tied: its codes are of x as it comes
    torch.testing.assert_close(folded.encode(x), sae.encode(2.5 * x) * scale, rtol=1e-4, atol=1e-5)


def test_a_file_that_changed_is_checked_again(tmp_path):
    save_sae(random_sae("standard"), tmp_path / "sae")
    for _ in range(2):
        load_sae(tmp_path / "sae")
    edit_tensors(tmp_path / "sae", lambda t: t["W_dec"][3, 2].fill_(torch.nan))
    with pytest.raises(FormatError, match="W_dec holds 1 value that is not a finite"):
        load_sae(tmp_path / "sae")
    assert load_sae(tmp_path / "sae", checked=True).W_dec[3, 2].isnan()


# -- checkpoints of training -------------------------------------------------------------------------------------------


def checkpoint(tmp_path: Path, architecture: str, **cfg: Any) -> tuple[SAE, Path]:
    """A folder as SAELens' trainer leaves it."""
    sae = random_sae(architecture, k=4 if "topk" in architecture else None)
    save_sae(sae, tmp_path / "sae")
    edit(tmp_path / "sae", lambda c: c.update({"decoder_init_norm": 0.1} | cfg))
    (tmp_path / "sae" / "trainer_state.pt").write_bytes(b"never opened")
    return sae, tmp_path / "sae"


def scaler(folder: Path, factor: Any = None, whitening: bool = False) -> None:
    said = {"scaling_factor": factor, "has_whitening": whitening}
    (folder / "activation_scaler.json").write_text(json.dumps(said))


def test_what_the_scaler_still_did_outside_of_the_weights_is_folded(tmp_path):
    sae, folder = checkpoint(tmp_path, "standard", normalize_activations="expected_average_only_in")
    scaler(folder, 0.4)
    assert detect_format(folder) == "saelens_training"
    folded = load_sae(folder, facts={"norm_scaling_factor": 7.0})  # the file's own goes before
    x = torch.randn(9, 6)
    torch.testing.assert_close(folded.encode(x), sae.encode(0.4 * x))
    torch.testing.assert_close(folded(x), sae(0.4 * x) / 0.4)
    scaler(folder, None)
    assert_same_bits(sae, load_sae(folder))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda f: scaler(f, "much"), "scaling_factor in activation_scaler.json must be a number above 0"),
        (lambda f: scaler(f, -1), "must be a number above 0"),
        (lambda f: scaler(f, None, True), "activation_whitening.safetensors is missing"),
        (lambda f: (f / "activation_scaler.json").write_text("[]"), "must hold a JSON object"),
    ],
)
def test_a_scaler_that_is_wrong_is_refused(spoil, sentence, tmp_path):
    _sae, folder = checkpoint(tmp_path, "standard")
    spoil(folder)
    with pytest.raises(FormatError, match=sentence):
        load_sae(folder)


@pytest.mark.parametrize(
    "tensors", [{"mean": torch.zeros(6)}, dict.fromkeys(("mean", "matrix", "inverse_matrix"), torch.zeros(6))]
)
def test_whitening_of_the_wrong_shape_is_refused(tensors, tmp_path):
    _sae, folder = checkpoint(tmp_path, "standard")
    scaler(folder, None, True)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "activation_whitening.safetensors")
    with pytest.raises(FormatError, match=r"lacks matrix|matrix is F32 of the shape"):
        load_sae(folder)


# -- before version 6 --------------------------------------------------------------------------------------------------

OLD = {
    "d_in": 6, "d_sae": 20, "hook_point": "blocks.{layer}.hook_resid_pre", "hook_point_layer": 3, "model_name": "gpt2",
    "activation_fn": "relu", "normalize_activations": False, "sae_lens_version": "2.1.3", "context_size": 64,
}  # fmt: skip


def legacy(folder: Path, sae: SAE, cfg: dict[str, Any], **more: torch.Tensor) -> None:
    folder.mkdir(exist_ok=True)
    save_file(dict(sae.state_dict()) | more, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(cfg))


def test_the_oldest_names_are_understood_and_written_anew(tmp_path):
    sae = random_sae("standard")
    legacy(tmp_path / "old", sae, OLD, scaling_factor=torch.ones(20))
    assert detect_format(tmp_path / "old") == "saelens_legacy"
    found = load_sae(tmp_path / "old")
    assert_same_bits(sae, found)
    assert (found.config.hook_name, found.config.model_name) == ("blocks.3.hook_resid_pre", "gpt2")
    assert found.config.metadata["context_size"] == 64
    save_sae(found, tmp_path / "new")
    assert detect_format(tmp_path / "new") == "saelens"
    assert_same_bits(sae, load_sae(tmp_path / "new"))


@pytest.mark.parametrize("key", ["activation_fn", "activation_fn_str"])
def test_tanh_relu_is_what_it_was_then(key, tmp_path):
    sae = random_sae("standard")
    cfg = {name: value for name, value in OLD.items() if name != "activation_fn"}
    legacy(tmp_path / "old", sae, cfg | {key: "tanh-relu"})
    found = load_sae(tmp_path / "old").requires_grad_(False)
    x = 3 * torch.randn(50, 6)
    codes = (((x - sae.b_dec) @ sae.W_enc) + sae.b_enc).clamp(min=0).tanh()
    assert 0 < (codes != 0).float().mean() < 1
    torch.testing.assert_close(found.encode(x), codes)
    torch.testing.assert_close(found(x), codes @ sae.W_dec + sae.b_dec)
    with pytest.raises(NotRepresentable, match="no architecture 'tanh_relu'"):  # SAELens 6 would drop the tanh
        save_sae(found, tmp_path / "new")


@pytest.mark.parametrize("name", ["scaling_factor", "finetuning_scaling_factor"])
def test_finetuned_scales_multiply_what_is_decoded(name, tmp_path):
    sae, scale = random_sae("standard"), torch.linspace(0.5, 2, 20)
    legacy(tmp_path / "old", sae, OLD, **{name: scale})
    found = load_sae(tmp_path / "old").requires_grad_(False)
    x = torch.randn(9, 6)
    torch.testing.assert_close(found.encode(x), sae.encode(x))
    torch.testing.assert_close(found(x), (sae.encode(x) * scale) @ sae.W_dec + sae.b_dec)
    legacy(tmp_path / "old", sae, OLD, **{name: torch.ones(19)})
    with pytest.raises(FormatError, match=rf"{name} is F32 of the shape \[19\]"):
        load_sae(tmp_path / "old")


def test_hook_z_and_the_default_of_b_dec_of_then(tmp_path):
    legacy(tmp_path / "old", random_sae("standard"), OLD | {"hook_point": "blocks.1.attn.hook_z"})
    config = load_sae(tmp_path / "old").config
    assert config.metadata["reshape_activations"] == "hook_z" and config.apply_b_dec_to_input


@pytest.mark.parametrize(
    ("cfg", "error", "sentence"),
    [
        ({"activation_fn": "tanh-relu", "architecture": "gated"}, FormatError, "'tanh-relu', which is not supported"),
        ({"activation_fn": "gelu"}, FormatError, "'gelu', which is not supported"),
        ({"activation_fn_str": "topk"}, MissingFact, "does not say k"),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": [3]}, FormatError, "must be of type dict"),
        ({"architecture": "quantum"}, SAEError, "'quantum' is not supported"),
        ({"architecture": "clt"}, FormatError, "before version 6 had no architecture 'clt'"),
        ({"normalize_activations": "magic"}, SAEError, "'magic'"),
        ({"d_sae": "20"}, FormatError, "d_sae in cfg.json must be of type int"),
    ],
)
def test_old_configs_that_cannot_be_read_are_refused(cfg, error, sentence, tmp_path):
    told = {name: value for name, value in OLD.items() if name != "activation_fn"}  # of another generation
    legacy(tmp_path / "old", random_sae("standard"), told | cfg)
    with pytest.raises(error, match=sentence):
        load_sae(tmp_path / "old")


def test_topk_of_then_takes_k_from_its_options_or_the_facts(tmp_path):
    told = OLD | {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}, "normalize_activations": True}
    del told["activation_fn"]
    legacy(tmp_path / "old", random_sae("standard"), told)
    config = load_sae(tmp_path / "old", facts={"k": 4}).config
    assert (config.architecture, config.k, config.normalize_activations) == ("topk", 4, "expected_average_only_in")
    with pytest.raises(FormatError, match="says k 4, but 5 was given"):
        load_sae(tmp_path / "old", facts={"k": 5})
