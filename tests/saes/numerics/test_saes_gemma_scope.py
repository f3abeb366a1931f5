"""Gemma Scope 1 and 2 beyond the golden files: storage types, missing configs, facts, and numbers in plain numpy."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from saes.numerics.formats import FormatError, MissingFact, NotRepresentable, detect_format, load_sae, save_sae
from tests.saes.numerics.plain import Arrays, arrays, assert_gives, inputs, jumprelu, rounded, tensors

D, M = 10, 37
X = inputs(D)


def made(seed: int = 1, d_out: int = D) -> Arrays:
    return arrays(seed, W_enc=(D, M), b_enc=(M,), W_dec=(M, d_out), b_dec=(d_out,), threshold=(M,))


def plain(a: Arrays, x: np.ndarray = X) -> tuple[np.ndarray, np.ndarray]:
    acts = jumprelu(x @ a["W_enc"] + a["b_enc"], a["threshold"])
    return acts, acts @ a["W_dec"] + a["b_dec"]


def scope_1(root: Path, a: Arrays, at: str = "layer_7/width_16k/average_l0_40", save=np.savez) -> Path:
    (root / at).mkdir(parents=True)
    save(root / at / "params.npz", **a)
    return root / at


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("lower", [False, True])
def test_scope_1_in_every_storage_and_spelling(dtype, save, lower, tmp_path):
    a = made()
    stored = {name.lower() if lower else name: array.astype(dtype) for name, array in a.items()}
    folder = scope_1(tmp_path, stored, save=save)
    sae = load_sae(folder, facts={"repo_id": "google/gemma-scope-9b-it-res"})
    kept = {name: array.astype(dtype).astype(np.float32) for name, array in a.items()}
    assert_gives(sae, X, *plain(kept))
    assert (sae.config.hook_name, sae.config.model_name) == ("blocks.7.hook_resid_post", "gemma-2-9b-it")
    assert not sae.config.apply_b_dec_to_input


@pytest.mark.parametrize(
    ("repo", "hook", "out"),
    [
        ("google/gemma-scope-27b-pt-mlp", "blocks.7.hook_mlp_out", ""),
        ("google/gemma-scope-2b-pt-att", "blocks.7.attn.hook_z", ""),
        ("google/gemma-scope-2b-pt-transcoders", "blocks.7.ln2.hook_normalized", "blocks.7.hook_mlp_out"),
    ],
)
def test_scope_1_hook_points_are_those_of_the_repository(repo, hook, out, tmp_path):
    sae = load_sae(scope_1(tmp_path, made()), facts={"repo_id": repo})
    assert (sae.config.hook_name, sae.config.hook_name_out) == (hook, out)
    assert sae.config.architecture == ("jumprelu_transcoder" if out else "jumprelu")
    assert_gives(sae, X, *plain(made()))


def test_scope_1_of_a_hub_cache_needs_no_facts(tmp_path):
    root = tmp_path / "models--google--gemma-scope-2b-pt-transcoders" / "snapshots" / ("0" * 40)
    folder = scope_1(root, made(), "layer_3/width_16k/average_l0_54")
    assert detect_format(folder) == "gemma_scope_1_transcoder"
    assert load_sae(folder).config.hook_name_out == "blocks.3.hook_mlp_out"
    assert load_sae(folder / "params.npz").config.hook_name == "blocks.3.ln2.hook_normalized"


def test_scope_1_embedding_is_of_scaled_embeddings(tmp_path):
    a = made()
    folder = scope_1(tmp_path, a, "embedding/width_4k/average_l0_6")
    sae = load_sae(folder, facts={"repo_id": "google/gemma-scope-2b-pt-res"})
    root = np.float32(D**0.5)
    assert_gives(sae, X * root, *plain(a | {"W_dec": a["W_dec"] * root}))
    assert sae.config.hook_name == "hook_embed"


def test_scope_1_asks_for_what_the_files_do_not_say(tmp_path):
    (tmp_path / "here").mkdir()
    np.savez(tmp_path / "here" / "params.npz", **made())
    with pytest.raises(MissingFact) as caught:
        load_sae(tmp_path / "here")
    assert caught.value.names == ("repo_id",)
    facts = {"repo_id": "google/gemma-scope-2b-pt-res"}
    with pytest.raises(MissingFact) as caught:
        load_sae(tmp_path / "here", facts=facts)
    assert caught.value.names == ("layer",)
    by_layer, by_path = facts | {"layer": 5}, facts | {"repo_path": "layer_5/width_16k/average_l0_9"}
    for known in (by_layer, by_path, {"hook_name": "blocks.5.hook_resid_post"}):
        assert load_sae(tmp_path / "here", facts=known).config.hook_name == "blocks.5.hook_resid_post"


def test_scope_1_damage_is_said_before_anything_is_asked(tmp_path):
    a = made()
    folder = scope_1(tmp_path, a | {"b_enc": a["b_enc"][:-1]})
    with pytest.raises(FormatError, match="b_enc has the shape 36") as caught:
        load_sae(folder)
    assert not isinstance(caught.value, MissingFact)
    del a["threshold"]
    with pytest.raises(FormatError, match="lacks threshold"):
        load_sae(scope_1(tmp_path / "other", a))


# -- Gemma Scope 2 -----------------------------------------------------------------------------------------------------
def scope_2(
    folder: Path, a: Arrays, config: dict | None = None, dtype=torch.float32, name="params.safetensors"
) -> Path:
    folder.mkdir(parents=True)
    lower = {name.lower() if name.startswith("W") else name: array for name, array in a.items()}
    save_file(tensors(lower, dtype), folder / name)
    if config is not None:
        (folder / "config.json").write_text(json.dumps({"architecture": "jump_relu", **config}))
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_scope_2_in_every_storage_without_a_config(dtype, tmp_path):
    folder = scope_2(tmp_path / "mlp_out_all" / "layer_12_width_65k_l0_big", made(), dtype=dtype)
    sae = load_sae(folder, facts={"repo_id": "google/gemma-scope-2-270m-pt"})
    assert_gives(sae, X, *plain(rounded(made(), dtype)))
    assert (sae.config.hook_name, sae.config.model_name) == ("blocks.12.hook_mlp_out", "google/gemma-3-270m")
    assert sae.config.metadata["hf_hook_name"] == "model.layers.12.post_feedforward_layernorm.output"


@pytest.mark.parametrize("d_out", [D, 14])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("with_config", [False, True])
def test_scope_2_transcoders(d_out, affine, with_config, tmp_path):
    a = made(d_out=d_out)
    skip = arrays(5, S=(D, d_out))["S"]
    config = {
        "type": "transcoder",
        "model_name": "gemma-v3-1b-it",
        "width": M,
        "affine_connection": affine,
        "hf_hook_point_in": "model.layers.4.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.4.post_feedforward_layernorm.output",
    }
    stored = a | ({"affine_skip_connection": skip} if affine else {})
    folder = tmp_path / "transcoder" / f"layer_4_width_16k_l0_small{'_affine' if affine else ''}"
    sae = load_sae(scope_2(folder, stored, config if with_config else None))
    acts, y = plain(a)
    assert_gives(sae, X, acts, y + X @ skip if affine else y)
    assert sae.config.architecture == ("jumprelu_skip_transcoder" if affine else "jumprelu_transcoder")
    assert (sae.config.hook_name, sae.config.hook_name_out) == ("blocks.4.mlp.hook_in", "blocks.4.hook_mlp_out")
    assert sae.config.model_name == ("google/gemma-3-1b-it" if with_config else "")


@pytest.mark.parametrize("layers", [1, 3])
def test_scope_2_one_layer_of_a_clt_has_codes_but_no_reconstruction(layers, tmp_path):
    a = made() | arrays(6, W_dec=(M, layers, D))
    folder = scope_2(tmp_path / "clt" / "width_16k_l0_big", a, name="params_layer_10.safetensors")
    for entry in ("params_layer_10", "params_layer_10.safetensors"):
        sae = load_sae(folder / entry)
        assert_gives(sae, X, *plain(a | {"W_dec": a["W_dec"].sum(1)}))
        assert (sae.config.hook_name, sae.config.hook_name_out) == ("blocks.10.mlp.hook_in", "blocks.10.hook_mlp_out")
        assert "cross-layer" in sae.config.metadata["not_an_autoencoder"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"type": "crosscoder"}, "type in config.json is 'crosscoder'"),
        ({"type": "sae", "architecture": "top_k"}, "must be jump_relu"),
        ({"type": "sae", "width": M + 1}, "width 38, but the weights have 37"),
        ({"type": "molt"}, "type in config.json is 'molt'"),
        ({"type": 7}, "type in config.json must be text"),
    ],
)
def test_scope_2_config_that_does_not_fit_is_refused(change, sentence, tmp_path):
    folder = scope_2(tmp_path / "resid_post" / "layer_1_width_16k_l0_big", made(), change)
    with pytest.raises(FormatError, match=sentence):
        load_sae(folder)


# -- crosscoders of Gemma Scope 2 ----------------------------------------------------------------------------------------
LAYERS = (5, 9, 12)
CROSSCODER = {
    "type": "crosscoder", "model_name": "google/gemma-3-270m-pt", "width": len(LAYERS) * M, "l0": 50,
    "hf_hook_point_in": "model.layers.{5,9,12}.output", "hf_hook_point_out": "model.layers.{5,9,12}.output",
    "affine_connection": False,
}  # fmt: skip


def crosscoder(root: Path, config: dict | None = CROSSCODER, name: str = "layer_5_9_12_width_16k_l0_big") -> Path:
    folder = root / "crosscoder" / name
    folder.mkdir(parents=True)
    for number in range(len(LAYERS)):
        save_file(tensors(one_layer(number)), folder / f"params_layer_{number}.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps({"architecture": "jump_relu", **config}))
    return folder


def one_layer(number: int) -> Arrays:
    """What the file of one layer holds; nothing is written to earlier layers, as it is in trained ones."""
    made = arrays(
        20 + number, w_enc=(D, M), b_enc=(M,), threshold=(M,), w_dec=(M, len(LAYERS), D), b_dec=(D,)
    )  # fmt: skip
    made["w_dec"][:, :number] = 0
    return made


def plain_crosscoder(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(acts, y), layer after layer, one token at a time and one target layer at a time."""
    files = [one_layer(number) for number in range(len(LAYERS))]
    acts = [
        jumprelu(x[:, n * D : (n + 1) * D] @ file["w_enc"] + file["b_enc"], file["threshold"])
        for n, file in enumerate(files)
    ]
    out = []
    for target, file in enumerate(files):
        y = np.tile(file["b_dec"], (len(x), 1))
        for source in range(target + 1):
            y = y + acts[source] @ files[source]["w_dec"][:, target]
        out.append(y)
    return np.concatenate(acts, 1), np.concatenate(out, 1)


@pytest.mark.parametrize("config", [CROSSCODER, None])
def test_scope_2_crosscoders_read_all_their_layers_side_by_side(config, tmp_path):
    folder = crosscoder(tmp_path, config)
    assert detect_format(folder) == "gemma_scope_2"
    sae = load_sae(folder, facts={"repo_id": "google/gemma-scope-2-270m-pt"})
    x = inputs(len(LAYERS) * D)
    assert_gives(sae, x, *plain_crosscoder(x))
    assert (sae.config.architecture, sae.config.d_in, sae.config.d_sae) == ("causal_crosscoder", 3 * D, 3 * M)
    assert (sae.config.model_name, sae.config.hook_name) == ("google/gemma-3-270m", "")
    assert sae.config.metadata["hook_points"] == [f"blocks.{layer}.hook_resid_post" for layer in LAYERS]
    assert sae.config.metadata["hf_hook_points"] == [f"model.layers.{layer}.output" for layer in LAYERS]
    assert "several layers" in sae.config.metadata["not_an_autoencoder"]
    values, indices = sae.encode_sparse(torch.from_numpy(x))
    torch.testing.assert_close(sae.decode_sparse(values, indices), sae(torch.from_numpy(x)))
    with pytest.raises(NotRepresentable):
        save_sae(sae, tmp_path / "out")


def test_scope_2_crosscoder_writes_what_its_weights_write_also_backwards(tmp_path):
    """Causality is the training's doing: a part of w_dec that is not zero counts, as it does in the authors' own class."""
    folder = crosscoder(tmp_path)
    last = one_layer(2)
    last["w_dec"][:, 0] = 1.0
    save_file(tensors(last), folder / "params_layer_2.safetensors")
    x = inputs(len(LAYERS) * D)
    acts, y = plain_crosscoder(x)
    y[:, :D] += acts[:, 2 * M :].sum(1, keepdims=True)
    assert_gives(load_sae(folder), x, acts, y)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: (folder / "params_layer_1.safetensors").unlink(), "params_layer_1.safetensors .* is missing"),
        (lambda folder: (folder / "params_layer_2.safetensors").unlink(), "3 layers, but there are 2 files"),
        (
            lambda folder: save_file(
                tensors(one_layer(1) | arrays(3, b_enc=(M + 1,))), folder / "params_layer_1.safetensors"
            ),
            "b_enc in params_layer_1.safetensors has the shape",
        ),
        (
            lambda folder: (folder / "config.json").write_text(json.dumps(CROSSCODER | {"width": M})),
            f"says width {M}, but the weights have {3 * M}",
        ),
        (
            lambda folder: (folder / "config.json").write_text(
                json.dumps(CROSSCODER | {"hf_hook_point_in": "model.layers.5.output", "hf_hook_point_out": ""})
            ),
            "must name several layers",
        ),
        (
            lambda folder: (folder / "config.json").write_text(
                json.dumps(CROSSCODER | {"hf_hook_point_out": "model.layers.{6,10,13}.output"})
            ),
            "which is not read here",
        ),
    ],
)
def test_scope_2_crosscoder_that_is_not_whole_is_refused(damage, sentence, tmp_path):
    folder = crosscoder(tmp_path)
    damage(folder)
    with pytest.raises(FormatError, match=sentence):
        load_sae(folder)


@pytest.mark.parametrize("entry", ["params_layer_1", "params_layer_1.safetensors"])
def test_one_file_of_a_crosscoder_is_none(entry, tmp_path):
    with pytest.raises(FormatError, match=r"one layer of a crosscoder.*choose its folder"):
        load_sae(crosscoder(tmp_path) / entry)


@pytest.mark.parametrize("width", [M, 3 * M])
def test_the_width_of_a_clt_counts_the_features_of_all_layers(width, tmp_path):
    """Published ones say 262080 for files of 14560 features each, of 18 layers."""
    a = made() | arrays(6, W_dec=(M, 3, D))
    config = {"type": "clt", "width": width, "hf_hook_point_in": "model.layers.{all}.pre_feedforward_layernorm.output"}
    folder = scope_2(tmp_path / "clt" / "width_262k_l0_big", a, config, name="params_layer_1.safetensors")
    assert load_sae(folder / "params_layer_1").config.d_sae == M
    (folder / "config.json").write_text(json.dumps(config | {"width": 2 * M}))
    with pytest.raises(FormatError, match="one of the two is wrong"):
        load_sae(folder / "params_layer_1")


def test_scope_2_without_config_in_a_folder_that_says_nothing_asks(tmp_path):
    folder = scope_2(tmp_path / "mine", made())
    with pytest.raises(MissingFact) as caught:
        load_sae(folder)
    assert caught.value.names == ("hook_name",)
    assert load_sae(folder, facts={"hook_name": "blocks.2.hook_resid_post"}).config.architecture == "jumprelu"
    by_path = load_sae(folder, facts={"repo_path": "resid_post_all/layer_2_width_16k_l0_big"})
    assert by_path.config.hook_name == "blocks.2.hook_resid_post"
