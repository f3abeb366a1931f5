"""miStudio's exports and checkpoints of each of its classes, held against its equations; what they lost is said."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from saes.numerics.formats import FormatError, MissingFact, NotRepresentable, detect_format, load_sae, save_sae
from saes.numerics.sae import SAE
from tests.saes.numerics.test_saes_saelens import assert_same_bits, edit, random_sae

D_IN, D_SAE, K = 6, 20, 4
NORMALISED = {"normalize_activations": "constant_norm_rescale"}
CLASSES = ("SparseAutoencoder", "SkipAutoencoder", "TopKSAE", "JumpReLUSAE", "Transcoder")


def x_of(n: int = 9) -> torch.Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(1))


def scaled(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """miStudio's constant_norm_rescale: (x * c, c)."""
    c = D_IN**0.5 / x.norm(dim=-1, keepdim=True)
    return x * c, c


# -- exports -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_exact_and_keeps_all_that_is_known(architecture, dtype, tmp_path):
    sae = random_sae(
        architecture,
        dtype,
        k=K if architecture == "topk" else None,
        normalize_activations="constant_norm_rescale",
        metadata={"dataset_path": "c4", "training": {"seed": 3}, "sae_lens_version": "6.54.12"},
    )
    save_sae(sae, tmp_path / "sae", "mistudio_community")
    assert detect_format(tmp_path / "sae") == "mistudio_community"
    again = load_sae(tmp_path / "sae", dtype=None)
    assert_same_bits(sae, again)
    assert again.config == sae.config
    cfg = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    assert cfg["apply_b_dec_to_input"] is True and cfg["hook_point_layer"] == 1 and "sae_lens_version" not in cfg


def test_an_export_goes_through_our_own_form_and_back(tmp_path):
    sae = random_sae("standard", **NORMALISED)
    save_sae(sae, tmp_path / "first", "mistudio_community")
    edit(
        tmp_path / "first", lambda c: c.update(mistudio_training_id="train_1", extra_metadata={"top_k": None, "lr": 1})
    )
    save_sae(load_sae(tmp_path / "first"), tmp_path / "ours")
    assert detect_format(tmp_path / "ours") == "saelens"
    save_sae(load_sae(tmp_path / "ours"), tmp_path / "last", "mistudio_community")
    assert detect_format(tmp_path / "last") == "mistudio_community"
    cfg = json.loads((tmp_path / "last" / "cfg.json").read_text())
    assert cfg["mistudio_training_id"] == "train_1" and cfg["extra_metadata"]["lr"] == 1
    assert_same_bits(sae, load_sae(tmp_path / "last"))


@pytest.mark.parametrize(
    ("architecture", "options", "sentence"),
    [
        ("gated", {}, "no gated SAE; it has standard, jumprelu, topk"),
        ("standard", {"normalize_activations": "layer_norm"}, "no normalisation 'layer_norm'"),
        ("standard", {"apply_b_dec_to_input": False}, "always subtracts b_dec"),
        ("standard", {"hook_name": "somewhere"}, "needs the layer"),
        ("standard", {"d_out": 5, "apply_b_dec_to_input": False}, "d_out other than d_in"),
    ],
)
def test_what_an_export_cannot_hold_is_refused(architecture, options, sentence, tmp_path):
    with pytest.raises(NotRepresentable, match=sentence):
        save_sae(random_sae(architecture, **options), tmp_path / "sae", "mistudio_community")
    negative = random_sae("jumprelu")
    negative.threshold.neg_()
    with pytest.raises(NotRepresentable, match="logarithm of the thresholds"):
        save_sae(negative, tmp_path / "sae", "mistudio_community")
    assert not list(tmp_path.iterdir())


def exported(folder: Path, architecture: str, extra: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    """As miStudio writes them: the flag says false, k is only in the extras."""
    folder.mkdir()
    cfg = {
        "model_name": "gpt2-small", "hook_point": "blocks.3.hook_resid_post", "hook_point_layer": 3, "d_in": D_IN,
        "d_sae": D_SAE, "architecture": architecture, "normalize_activations": "constant_norm_rescale",
        "apply_b_dec_to_input": False, "dtype": "torch.float32", "mistudio_training_id": "t", "extra_metadata": extra,
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(cfg))
    save_file(tensors, folder / "sae_weights.safetensors")
    return folder


def weights(sae: SAE, *without: str) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in sae.state_dict().items() if name not in without}


@pytest.mark.parametrize("architecture", ["standard", "standard_saelens", "standard_anthropic", "jumprelu"])
def test_since_february_2026_b_dec_is_subtracted_whatever_the_file_says(architecture, tmp_path):
    sae = random_sae("jumprelu" if architecture == "jumprelu" else "standard", **NORMALISED)
    found = load_sae(exported(tmp_path / "e", architecture, {"top_k": None}, weights(sae)))
    assert torch.equal(found.encode(x_of()), sae.encode(x_of())) and found.config.apply_b_dec_to_input
    assert "mistudio_lost" not in found.config.metadata


def test_before_it_was_not_and_a_bias_was_lost(tmp_path):
    sae = random_sae("standard", **NORMALISED, apply_b_dec_to_input=False)
    found = load_sae(exported(tmp_path / "e", "standard", {"top_k_sparsity": None}, weights(sae)))
    assert torch.equal(found.encode(x_of()), sae.encode(x_of()))
    assert "lack one of two output biases" in found.config.metadata["mistudio_lost"]


def test_when_nothing_tells_which_it_is_a_person_must(tmp_path):
    folder = exported(tmp_path / "e", "jumprelu", {}, weights(random_sae("jumprelu")))
    with pytest.raises(MissingFact, match="February 2026") as caught:
        load_sae(folder)
    assert caught.value.names == ("apply_b_dec_to_input",)
    for said in (True, False):
        assert load_sae(folder, facts={"apply_b_dec_to_input": said}).config.apply_b_dec_to_input is said


def test_a_topk_export_lost_its_bias_and_keeps_k_elsewhere(tmp_path):
    sae = random_sae("topk", k=K, **NORMALISED)
    sae.b_dec.zero_()
    found = load_sae(exported(tmp_path / "e", "topk", {"top_k": K}, weights(sae, "b_dec")))
    assert torch.equal(found(x_of()), sae(x_of())) and found.config.k == K
    assert "lack b_pre" in found.config.metadata["mistudio_lost"]


def test_a_skip_export_adds_its_input(tmp_path):
    sae = random_sae("standard", **NORMALISED)
    found = load_sae(exported(tmp_path / "e", "skip", {"top_k": None}, weights(sae)))
    torch.testing.assert_close(found(x_of()), sae(x_of()) + x_of())


def test_a_transcoder_export_lost_its_centre(tmp_path):
    sae = random_sae("transcoder", d_out=5, apply_b_dec_to_input=False)
    found = load_sae(exported(tmp_path / "e", "transcoder", {"top_k": None}, weights(sae)))
    assert torch.equal(found(x_of()), sae(x_of()))
    assert "lack b_enc_center" in found.config.metadata["mistudio_lost"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"architecture": "gated"}, "miStudio has standard, "),
        ({"architecture": None}, "says architecture None"),
        ({"normalize_activations": "magic"}, "normalize_activations 'magic'"),
        ({"extra_metadata": [1]}, "extra_metadata in cfg.json must be of type dict"),
        ({"d_in": 7}, "W_enc has the shape 6 x 20"),
    ],
)
def test_an_export_that_is_wrong_is_refused(change, sentence, tmp_path):
    folder = exported(tmp_path / "e", "standard", {"top_k": None}, weights(random_sae("standard")))
    edit(folder, lambda c: c.update(change))
    with pytest.raises(FormatError, match=sentence):
        load_sae(folder)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def checkpoint(folder: Path, kind: str, notes: dict[str, str] | None = None, **more: torch.Tensor) -> Path:
    """A checkpoint of one of miStudio's classes, of random numbers."""
    draw = lambda *shape: torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))  # noqa: E731
    linear = {"encoder.weight": draw(D_SAE, D_IN), "encoder.bias": draw(D_SAE), "decoder.weight": draw(D_IN, D_SAE)}
    state = {
        "SparseAutoencoder": linear | {"decoder_bias": draw(D_IN)},
        "SkipAutoencoder": linear | {"decoder_bias": draw(D_IN)},
        "TopKSAE": linear | {"b_pre": draw(D_IN)},
        "Transcoder": linear | {"decoder.bias": draw(D_IN), "b_enc_center": draw(D_IN)},
        "JumpReLUSAE": {
            "W_enc": draw(D_SAE, D_IN), "b_enc": draw(D_SAE), "W_dec": draw(D_IN, D_SAE), "b_dec": draw(D_IN),
            "activation.log_threshold": draw(D_SAE),
        },
    }[kind]  # fmt: skip
    folder.mkdir(exist_ok=True)
    named = {f"model.{name}": tensor for name, tensor in (state | more).items()}
    said = {"architecture": kind, "step": "7"} if notes is None else notes
    save_file(named, folder / "checkpoint.safetensors", metadata=said)
    return folder


def expected(folder: Path, kind: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, output) by miStudio's own equations."""
    t = {name.removeprefix("model."): tensor for name, tensor in load_file(folder / "checkpoint.safetensors").items()}
    if kind == "Transcoder":
        acts = ((x - t["b_enc_center"]) @ t["encoder.weight"].T + t["encoder.bias"]).relu()
        return acts, acts @ t["decoder.weight"].T + t["decoder.bias"]
    x, c = scaled(x)
    b = t.get("decoder_bias", t.get("b_pre", t.get("b_dec")))
    if kind == "JumpReLUSAE":
        z = (x - b) @ t["W_enc"].T + t["b_enc"]
        acts = z.relu() * (z > t["activation.log_threshold"].exp())
        return acts, (acts @ t["W_dec"].T + b) / c
    z = ((x - b) @ t["encoder.weight"].T + t["encoder.bias"]).relu()
    acts = z * (z >= z.topk(K).values[:, -1:]) if kind == "TopKSAE" else z
    skip = x if kind == "SkipAutoencoder" else 0
    return acts, (acts @ t["decoder.weight"].T + b + skip) / c


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("named", [True, False])
def test_a_checkpoint_of_each_class_has_its_equations(kind, named, tmp_path):
    folder = checkpoint(tmp_path / "layer_3", kind, None if named else {})
    assert detect_format(folder) == detect_format(folder / "checkpoint.safetensors") == "mistudio"
    facts = NORMALISED | {"k": K, "architecture": "skip" if kind == "SkipAutoencoder" else "standard"}
    sae = load_sae(folder, facts=facts)
    acts, x_hat = expected(folder, kind, x_of())
    torch.testing.assert_close(sae.encode(x_of()), acts)
    torch.testing.assert_close(sae(x_of()), x_hat)


def test_what_no_checkpoint_says_is_asked_for_all_at_once(tmp_path):
    with pytest.raises(MissingFact) as caught:
        load_sae(checkpoint(tmp_path / "a", "TopKSAE"), facts=dict.fromkeys(("normalize_activations", "k")))
    assert caught.value.names == ("normalize_activations", "k")
    with pytest.raises(MissingFact, match="standard or skip") as caught:
        load_sae(checkpoint(tmp_path / "b", "SparseAutoencoder", {}), facts=NORMALISED)
    assert caught.value.names == ("architecture",)
    load_sae(checkpoint(tmp_path / "c", "Transcoder"))  # has none of these


def test_older_checkpoints_have_two_biases_and_subtract_none(tmp_path):
    folder = checkpoint(tmp_path / "a", "SparseAutoencoder", **{"decoder.bias": torch.full((D_IN,), 0.5)})
    sae = load_sae(folder, facts={"normalize_activations": "none"})
    t = load_file(folder / "checkpoint.safetensors")
    acts = (x_of() @ t["model.encoder.weight"].T + t["model.encoder.bias"]).relu()
    torch.testing.assert_close(sae.encode(x_of()), acts)
    torch.testing.assert_close(sae(x_of()), acts @ t["model.decoder.weight"].T + t["model.decoder_bias"] + 0.5)


def test_tied_weights_are_read_both_ways(tmp_path):
    folder = checkpoint(tmp_path / "a", "SparseAutoencoder")
    tensors = load_file(folder / "checkpoint.safetensors")
    del tensors["model.decoder.weight"]
    save_file(tensors, folder / "checkpoint.safetensors", metadata={"architecture": "SparseAutoencoder"})
    sae = load_sae(folder, facts={"normalize_activations": "none"})
    assert torch.equal(sae.W_dec, sae.W_enc.T) and sae.W_dec.data_ptr() != sae.W_enc.data_ptr()


def test_the_hook_point_comes_from_the_header_or_from_a_person(tmp_path):
    notes = {"architecture": "JumpReLUSAE", "layer_idx": "3", "hook_type": "mlp"}
    folder = checkpoint(tmp_path / "a", "JumpReLUSAE", notes)
    assert load_sae(folder, facts=NORMALISED).config.hook_name == "blocks.3.hook_mlp_out"
    assert load_sae(folder, facts=NORMALISED | {"hook_name": "mine"}).config.hook_name == "mine"


@pytest.mark.parametrize(
    ("more", "notes", "sentence"),
    [
        ({"b_pre": torch.zeros(D_IN)}, None, "no tensor model.b_pre"),
        ({"decoder.bias": torch.zeros(4)}, None, r"decoder.bias is F32 of the shape \[4\]"),
        ({"decoder_bias": torch.zeros(5)}, None, "b_dec has the shape 5"),
        ({"encoder.weight": torch.zeros(3)}, None, "must be a matrix"),
        ({}, {"architecture": "GhostSAE"}, "'GhostSAE', which miStudio does not have"),
        ({}, {"architecture": "TopKSAE"}, "lack model.b_pre"),
    ],
)
def test_a_checkpoint_that_is_wrong_is_refused(more, notes, sentence, tmp_path):
    folder = checkpoint(tmp_path / "a", "SparseAutoencoder", notes, **more)
    with pytest.raises(FormatError, match=sentence):
        load_sae(folder, facts=NORMALISED | {"k": K})
    with pytest.raises(FormatError, match="normalize_activations 'magic'"):
        load_sae(checkpoint(tmp_path / "b", "JumpReLUSAE"), facts={"normalize_activations": "magic"})


# -- the form that the documents promise -------------------------------------------------------------------------------


def documented(folder: Path, sae: SAE, cfg: dict[str, Any], linear: bool = True, turned: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    names = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight", "b_dec": "decoder.bias"}
    save_file(
        {
            names.get(n, n) if linear else n: (t.T if turned and t.dim() == 2 else t).contiguous()
            for n, t in sae.state_dict().items()
        },
        folder / "model.safetensors",
    )
    sizes = {"d_in": D_IN, "d_sae": D_SAE, "model_name": "gpt2", "hook_name": "blocks.3.hook_resid_post"}
    (folder / "config.json").write_text(json.dumps(sizes | cfg))
    return folder


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu"])
def test_the_promised_form_is_read_whichever_way_its_matrices_lie(architecture, turned, linear, tmp_path):
    sae = random_sae(architecture, k=K if architecture == "topk" else None, **NORMALISED)
    cfg = {"architecture": architecture, "hyperparameters": {"top_k": K, **NORMALISED}, "final_loss": 0.1}
    folder = documented(tmp_path / "d", sae, cfg, linear, turned)
    (folder / "training_metadata.json").write_text('{"steps": 9}')
    assert detect_format(folder) == "mistudio"
    found = load_sae(folder)
    assert_same_bits(sae, found)
    assert found.config.metadata["training_metadata"] == {"steps": 9} and found.config.metadata["final_loss"] == 0.1
    assert torch.equal(found(x_of()), sae(x_of()))


def test_the_promised_form_has_other_names_and_asks_for_what_it_lacks(tmp_path):
    sae = random_sae("standard")
    folder = documented(tmp_path / "d", sae, {})
    (folder / "config.json").write_text(json.dumps({"input_dim": D_IN, "hidden_dim": D_SAE, "hook_point": "h"}))
    with pytest.raises(MissingFact) as caught:
        load_sae(folder)
    assert caught.value.names == ("architecture", "normalize_activations")
    assert load_sae(folder, facts=NORMALISED | {"architecture": "standard"}).config.hook_name == "h"


def test_the_promised_form_is_refused_where_it_is_ambiguous_or_a_pickle(tmp_path):
    folder = documented(tmp_path / "d", random_sae("standard"), {"architecture": "standard", **NORMALISED})
    edit_square(folder)
    with pytest.raises(FormatError, match="which way round it lies"):
        load_sae(folder)
    (folder / "model.safetensors").rename(folder / "model.pt")
    with pytest.raises(FormatError, match=r"only model\.safetensors is read"):
        load_sae(folder)


def edit_square(folder: Path) -> None:
    names = ("encoder.weight", "decoder.weight")
    tensors = {name: torch.randn(6, 6) for name in names} | {
        "encoder.bias": torch.ones(6),
        "decoder.bias": torch.ones(6),
    }
    save_file(tensors, folder / "model.safetensors")
    cfg = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(cfg | {"d_sae": 6}))


def test_the_promised_form_with_a_strange_tensor_is_refused(tmp_path):
    folder = documented(tmp_path / "d", random_sae("standard"), {"architecture": "standard", **NORMALISED})
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"lm_head.weight": torch.ones(2)}, folder / "model.safetensors")
    with pytest.raises(FormatError, match=r"holds a tensor lm_head\.weight"):
        load_sae(folder)
    save_file(tensors | {"b_dec": torch.ones(6)}, folder / "model.safetensors")
    with pytest.raises(FormatError, match=r"holds both b_dec and decoder\.bias|both decoder\.bias and b_dec"):
        load_sae(folder)
