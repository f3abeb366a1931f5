"""dictionary_learning and sparsify: every class and option in plain numpy, and what is written is read back to the bit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from saes.numerics.architectures import sae_class
from saes.numerics.formats import FormatError, MissingFact, NotRepresentable, detect_format, load_sae, save_sae
from saes.numerics.sae import SAE, SAEConfig
from tests.saes.numerics.plain import Arrays, arrays, assert_gives, inputs, jumprelu, relu, rounded, tensors, topk

D, M, K = 8, 30, 5
X = inputs(D)
A = arrays(11, W_enc=(D, M), b_enc=(M,), W_dec=(M, D), b_dec=(D,), threshold=(M,), b_gate=(M,), b_mag=(M,), r_mag=(M,))
ONE = np.float32(0.3)
LINEAR = {"encoder.weight": A["W_enc"].T, "encoder.bias": A["b_enc"], "decoder.weight": A["W_dec"].T}
PLAIN = {name: A[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
STATES: dict[str, Arrays] = {
    "AutoEncoder": LINEAR | {"bias": A["b_dec"]},
    "AutoEncoderNew": LINEAR | {"decoder.bias": A["b_dec"]},
    "GatedAutoEncoder": {
        "encoder.weight": A["W_enc"].T,
        "decoder.weight": A["W_dec"].T,
        "decoder_bias": A["b_dec"],
        "gate_bias": A["b_gate"],
        "mag_bias": A["b_mag"],
        "r_mag": A["r_mag"],
    },
    "JumpReluAutoEncoder": PLAIN | {"threshold": A["threshold"]},
    "AutoEncoderTopK": LINEAR | {"b_dec": A["b_dec"], "threshold": ONE},
    "BatchTopKSAE": LINEAR | {"b_dec": A["b_dec"], "threshold": ONE},
    "MatryoshkaBatchTopKSAE": PLAIN | {"threshold": ONE},
}
WITH_K = ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE")


def numbers(kind: str, a: Arrays = A, threshold: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    x = X if kind in ("AutoEncoderNew", "JumpReluAutoEncoder") else X - a["b_dec"]
    z = x @ a["W_enc"]
    if kind == "GatedAutoEncoder":
        acts = relu(z * np.exp(a["r_mag"]) + a["b_mag"]) * (z + a["b_gate"] > 0)
    else:
        z = z + a["b_enc"]
        acts = {
            "AutoEncoder": relu,
            "AutoEncoderNew": relu,
            "JumpReluAutoEncoder": lambda z: jumprelu(z, a["threshold"]),
            "AutoEncoderTopK": lambda z: topk(z, K),
        }.get(kind, lambda z: jumprelu(z, np.float32(threshold)))(z)
    return acts, acts @ a["W_dec"] + a["b_dec"]


def dictionary(folder: Path, kind: str, dtype: torch.dtype = torch.float32, name: str = "ae.pt", **state: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    whole: dict[str, Any] = {key: torch.tensor(array).to(dtype) for key, array in STATES[kind].items()}
    if kind in WITH_K:
        whole["k"] = torch.tensor(K, dtype=torch.int)
    if kind.startswith("Matryoshka"):
        whole["group_sizes"] = torch.tensor([10, 20])
    torch.save({key: value for key, value in (whole | state).items() if value is not None}, folder / name)
    return folder


def configure(folder: Path, kind: str, **trainer: Any) -> Path:
    whole = {"dict_class": kind, "activation_dim": D, "dict_size": M, "lm_name": "EleutherAI/pythia-70m", "layer": 4}
    (folder / "config.json").write_text(json.dumps({"trainer": whole | trainer}))
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", STATES)
def test_every_dict_class_in_every_storage(kind, dtype, tmp_path):
    folder = configure(dictionary(tmp_path / "t", kind, dtype), kind)
    assert detect_format(folder) == "dictionary_learning"
    sae = load_sae(folder)
    threshold = float(torch.tensor(ONE).to(dtype))
    assert_gives(sae, X, *numbers(kind, rounded(A, dtype), threshold))
    assert (sae.config.hook_name, sae.config.model_name) == ("blocks.4.hook_resid_post", "EleutherAI/pythia-70m")
    assert_gives(load_sae(folder / "ae.pt"), X, *numbers(kind, rounded(A, dtype), threshold))


def test_a_threshold_that_was_never_estimated_means_relu(tmp_path):
    folder = configure(dictionary(tmp_path, "BatchTopKSAE", threshold=torch.tensor(-1.0)), "BatchTopKSAE")
    assert_gives(load_sae(folder), X, *numbers("BatchTopKSAE", threshold=0))


def test_a_jumprelu_that_subtracts_is_said_to(tmp_path):
    folder = configure(dictionary(tmp_path, "JumpReluAutoEncoder"), "JumpReluAutoEncoder")
    acts = jumprelu((X - A["b_dec"]) @ A["W_enc"] + A["b_enc"], A["threshold"])
    sae = load_sae(folder, facts={"apply_b_dec_to_input": True})
    assert_gives(sae, X, acts, acts @ A["W_dec"] + A["b_dec"])


def test_a_checkpoint_of_a_step_has_its_config_above(tmp_path):
    configure(tmp_path, "AutoEncoder")
    dictionary(tmp_path / "checkpoints", "AutoEncoder", name="ae_200.pt")
    assert_gives(load_sae(tmp_path / "checkpoints" / "ae_200.pt"), X, *numbers("AutoEncoder"))


@pytest.mark.parametrize(
    ("submodule", "facts", "hook"),
    [
        ("resid_post_layer_3", {}, "blocks.3.hook_resid_post"),
        ("mlp_out_layer_2", {}, "blocks.2.hook_mlp_out"),
        ("attention_out_layer_2", {}, "attention_out_layer_2"),
        ("", {}, "blocks.4.hook_resid_post"),
        ("resid_post_layer_3", {"hook_name": "blocks.1.hook_resid_pre"}, "blocks.1.hook_resid_pre"),
    ],
)
def test_hook_points_by_submodule_name(submodule, facts, hook, tmp_path):
    folder = configure(dictionary(tmp_path, "AutoEncoder"), "AutoEncoder", submodule_name=submodule)
    assert load_sae(folder, facts=facts).config.hook_name == hook


def test_a_layer_that_nothing_says_is_asked_for(tmp_path):
    folder = configure(dictionary(tmp_path, "AutoEncoder"), "AutoEncoder", layer=None)
    with pytest.raises(MissingFact) as caught:
        load_sae(folder)
    assert caught.value.names == ("hook_name",)


@pytest.mark.parametrize(
    ("state", "trainer", "sentence"),
    [
        ({"bias": None}, {}, r"ae\.pt lacks bias"),
        ({"more": torch.ones(2)}, {}, "holds more"),
        ({}, {"dict_class": "IdentityDict"}, "dict_class in config.json is 'IdentityDict'"),
        ({}, {"activation_dim": 9}, "activation_dim 9, but the weights have 8"),
        ({}, {"dict_size": 31}, "dict_size 31, but the weights have 30"),
        ({"encoder.bias": torch.ones(29)}, {}, "b_enc has the shape 29"),
        ({"encoder.weight": torch.ones(30)}, {}, "must be a matrix"),
        ({"optimizer": {}, "ae": {}}, {}, "backup of a training"),
    ],
)
def test_dictionary_that_does_not_fit_is_refused(state, trainer, sentence, tmp_path):
    folder = configure(dictionary(tmp_path, "AutoEncoder", **state), "AutoEncoder", **trainer)
    with pytest.raises(FormatError, match=sentence):
        load_sae(folder)


def test_k_of_two_minds_is_refused(tmp_path):
    folder = configure(dictionary(tmp_path, "AutoEncoderTopK"), "AutoEncoderTopK", k=K + 1)
    with pytest.raises(FormatError, match="k 6, but the weights have 5"):
        load_sae(folder)
    configure(folder, "AutoEncoderTopK")
    with pytest.raises(FormatError, match="says k 5, but 9 was given"):
        load_sae(folder, facts={"k": 9})


# -- sparsify ----------------------------------------------------------------------------------------------------------
SKIP = arrays(12, S=(D, D))["S"]


def sparse(folder: Path, skip: bool = False, dtype: torch.dtype = torch.float32, **cfg: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    stored = {"encoder.weight": A["W_enc"].T, "encoder.bias": A["b_enc"], "W_dec": A["W_dec"], "b_dec": A["b_dec"]}
    save_file(tensors(stored | ({"W_skip": SKIP} if skip else {}), dtype), folder / "sae.safetensors")
    whole = {"d_in": D, "k": K, "num_latents": M, "expansion_factor": 32, "normalize_decoder": True}
    (folder / "cfg.json").write_text(json.dumps(whole | cfg))
    return folder


def groupmax(z: np.ndarray, k: int) -> np.ndarray:
    groups = z.reshape(len(z), k, -1)
    return np.where(groups == groups.max(-1, keepdims=True), relu(groups), 0).reshape(z.shape)


def abstopk(z: np.ndarray, k: int) -> np.ndarray:
    return np.where(topk(np.abs(z), k) != 0, z, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transcode", [None, False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_sparsify_topk_transcoders_and_skips(skip, transcode, dtype, tmp_path):
    said = {} if transcode is None else {"transcode": transcode}
    sae = load_sae(sparse(tmp_path / "layers.6.mlp", skip, dtype, skip_connection=skip, **said))
    a, S = rounded(A, dtype), rounded({"S": SKIP}, dtype)["S"]
    z = (X if transcode else X - a["b_dec"]) @ a["W_enc"] + a["b_enc"]
    acts = topk(z, K)
    assert_gives(sae, X, acts, acts @ a["W_dec"] + a["b_dec"] + (X @ S.T if skip else 0))
    crosses = bool(skip or transcode)
    hooks = ("blocks.6.mlp.hook_in", "blocks.6.hook_mlp_out") if crosses else ("blocks.6.hook_mlp_out", "")
    assert (sae.config.hook_name, sae.config.hook_name_out) == hooks
    assert sae.reconstructs != crosses


@pytest.mark.parametrize(("cfg", "act"), [({"activation": "groupmax"}, groupmax), ({"signed": True}, abstopk)])
def test_sparsify_groupmax_and_signed(cfg, act, tmp_path):
    sae = load_sae(sparse(tmp_path / "layers.6", **cfg))
    acts = act((X - A["b_dec"]) @ A["W_enc"] + A["b_enc"], K)
    assert_gives(sae, X, acts, acts @ A["W_dec"] + A["b_dec"])


def test_sparsify_latents_of_the_expansion_factor_and_shards(tmp_path):
    folder = sparse(tmp_path / "h.3", num_latents=0, expansion_factor=M / D)
    whole = load_sae(folder)
    parts = load_file(folder / "sae.safetensors")
    (folder / "sae.safetensors").unlink()
    where = {name: f"sae-{number}.safetensors" for number, name in enumerate(parts)}
    for name, file in where.items():
        save_file({name: parts[name]}, folder / file)
    (folder / "sae.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert detect_format(folder) == "sparsify"
    sharded = load_sae(folder)
    assert sharded.config == whole.config and sharded.config.hook_name == "blocks.3.hook_resid_post"
    assert all(torch.equal(sharded.state_dict()[name], tensor) for name, tensor in whole.state_dict().items())


@pytest.mark.parametrize(
    ("folder", "model", "hook"),
    [
        ("layers.3", "", "blocks.3.hook_resid_post"),
        ("layers.0.attention", "EleutherAI/pythia-70m", "blocks.0.hook_attn_out"),
        ("layers.9.mlp", "google/gemma-2-2b", "layers.9.mlp.output"),
        ("model.layers.9.mlp.act", "", "model.layers.9.mlp.act.output"),
        ("embed_tokens", "", "hook_embed"),
    ],
)
def test_sparsify_hook_points_by_the_folder(folder, model, hook, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model": model, "hookpoints": [folder]}))
    sae = load_sae(sparse(tmp_path / folder))
    assert (sae.config.hook_name, sae.config.model_name) == (hook, model)


def test_sparsify_in_a_folder_of_another_name_asks(tmp_path):
    folder = sparse(tmp_path / "mine")
    with pytest.raises(MissingFact) as caught:
        load_sae(folder)
    assert caught.value.names == ("hook_name",)
    assert (
        load_sae(folder, facts={"hook_name": "blocks.2.hook_resid_post"}).config.hook_name == "blocks.2.hook_resid_post"
    )
    assert load_sae(folder, facts={"repo_path": "layers.5.mlp"}).config.hook_name == "blocks.5.hook_mlp_out"


@pytest.mark.parametrize(
    ("cfg", "sentence"),
    [
        ({"d_in": 9}, "d_in 9, but the weights have 8"),
        ({"num_latents": 31}, "there are 31 latents, but the weights have 30"),
        ({"num_latents": 0, "expansion_factor": 4}, "there are 32 latents"),
        ({"skip_connection": True}, "holds no W_skip"),
        ({"activation": "softmax"}, "activation 'softmax'"),
        ({"signed": True, "transcode": True}, "activation 'signed' of a transcoder"),
        ({"k": None}, "does not say k"),
        ({"k": "many"}, "k in cfg.json must be a whole number"),
    ],
)
def test_sparsify_cfg_that_does_not_fit_is_refused(cfg, sentence, tmp_path):
    with pytest.raises(FormatError, match=sentence):
        load_sae(sparse(tmp_path / "layers.1", **cfg))


# -- writing -----------------------------------------------------------------------------------------------------------
def random_sae(architecture: str, dtype: torch.dtype = torch.float32, **options: Any) -> SAE:
    config = SAEConfig(
        architecture, options.pop("d_in", D), M, hook_name="blocks.2.attn.hook_z", model_name="gpt2", **options
    )
    sae = sae_class(architecture)(config, dtype=dtype)
    generator = torch.Generator().manual_seed(5)
    for parameter in sae.parameters():
        parameter.data.copy_(torch.rand(parameter.shape, generator=generator))
    return sae


def same(first: SAE, second: SAE) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours
    )


BATCH = {"training_architecture": "batchtopk", "training_architecture_details": {"k": 7}}
WRITABLE = {
    "dictionary_learning": [
        ("standard", {}),
        ("standard", {"apply_b_dec_to_input": False}),
        ("gated", {}),
        ("topk", {"k": 4}),
        ("jumprelu", {"apply_b_dec_to_input": False}),
        ("jumprelu", {"metadata": BATCH}),
        ("jumprelu", {"metadata": {"training_architecture_details": {"k": 7, "matryoshka_widths": [10, 30]}}}),
    ],
    "sparsify": [
        ("topk", {"k": 4}),
        ("groupmax", {"k": 5}),
        ("topk_transcoder", {"k": 4, "apply_b_dec_to_input": False, "hook_name_out": "blocks.2.hook_mlp_out"}),
        ("topk_skip_transcoder", {"k": 4, "apply_b_dec_to_input": False}),
        ("topk_skip_transcoder", {"k": 4, "hook_name_out": "blocks.2.hook_mlp_out", "metadata": {"note": "kept"}}),
    ],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("form", "architecture", "options"), [(form, *case) for form, cases in WRITABLE.items() for case in cases]
)
def test_what_is_written_is_read_back_to_the_bit(form, architecture, options, dtype, tmp_path):
    sae = random_sae(architecture, dtype, **options)
    if architecture == "jumprelu" and sae.config.apply_b_dec_to_input:
        sae.threshold.data.fill_(0.25)
    save_sae(sae, tmp_path / "sae", format=form)
    assert detect_format(tmp_path / "sae") == form
    again = load_sae(tmp_path / "sae", dtype=dtype)
    assert again.config == sae.config
    assert same(again, sae)


REFUSED = [
    ("dictionary_learning", "topk", {"k": 4, "apply_b_dec_to_input": False}, "always subtracts b_dec"),
    ("dictionary_learning", "gated", {"apply_b_dec_to_input": False}, "always subtracts b_dec"),
    ("dictionary_learning", "jumprelu", {}, "one threshold for all features"),
    ("dictionary_learning", "jumprelu", {"metadata": {"one": True}}, "whole number k with a BatchTopK SAE"),
    ("dictionary_learning", "abstopk", {"k": 4}, "no class for the architecture 'abstopk'"),
    ("dictionary_learning", "transcoder", {"apply_b_dec_to_input": False}, "no class for the architecture"),
    ("dictionary_learning", "standard", {"d_out": 9, "apply_b_dec_to_input": False}, "d_out other than d_in"),
    ("dictionary_learning", "standard", {"normalize_activations": "layer_norm"}, "inputs are normalised"),
    ("dictionary_learning", "standard", {"options": {"glu": True}}, "no place for this SAE's options"),
    ("sparsify", "standard", {}, "no architecture 'standard'"),
    ("sparsify", "abstopk", {"k": 4}, "no architecture 'abstopk'"),
    ("sparsify", "topk", {"k": 4, "apply_b_dec_to_input": False}, "subtracts b_dec from the input of every SAE"),
    ("sparsify", "topk_transcoder", {"k": 4}, "does not subtract b_dec from the input of a transcoder"),
    ("sparsify", "topk_transcoder", {"k": 4, "d_out": 9, "apply_b_dec_to_input": False}, "d_out other than d_in"),
    ("sparsify", "topk", {"k": 4, "normalize_activations": "layer_norm"}, "inputs are normalised"),
    ("sparsify", "topk", {"k": 4, "metadata": {"odd": float("nan")}}, "cannot be written as JSON"),
]


@pytest.mark.parametrize(("form", "architecture", "options", "sentence"), REFUSED)
def test_what_a_format_cannot_hold_is_refused_and_nothing_is_written(form, architecture, options, sentence, tmp_path):
    sae = random_sae(architecture, **options)
    if sae.config.metadata.get("one"):
        sae.get_parameter("threshold").data.fill_(0.25)
    with pytest.raises(NotRepresentable, match=sentence):
        save_sae(sae, tmp_path / "sae", format=form)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", WRITABLE)
def test_weights_that_are_not_finite_are_not_written(form, tmp_path):
    sae = random_sae("topk", k=4)
    sae.W_dec.data[0, 0] = float("nan")
    with pytest.raises(NotRepresentable, match="not finite"):
        save_sae(sae, tmp_path / "sae", format=form)
    assert not list(tmp_path.iterdir())
