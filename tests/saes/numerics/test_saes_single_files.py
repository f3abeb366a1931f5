"""Lone torch files, circuit-tracer's sets, temporal SAEs: storage, missing configs, options, in plain numpy."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from saes.numerics.formats import FormatError, MissingFact, detect_format, load_sae
from tests.saes.numerics.plain import Arrays, arrays, assert_gives, inputs, jumprelu, relu, rounded, tensors, topk

D, M, OUT = 8, 30, 11
X = inputs(D)
A = arrays(21, W_enc=(D, M), b_enc=(M,), W_dec=(M, D), b_dec=(D,), threshold=(M,))
FOUR = ("W_enc", "b_enc", "W_dec", "b_dec")


def codes(a: Arrays, x: np.ndarray = X) -> np.ndarray:
    return x @ a["W_enc"] + a["b_enc"]


def linear(start: str) -> Arrays:
    return {
        f"encoder{start}.weight": A["W_enc"].T,
        f"encoder{start}.bias": A["b_enc"],
        f"decoder{start}.weight": A["W_dec"].T,
        f"decoder{start}.bias": A["b_dec"],
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "start", "format", "hook", "model"),
    [
        ("Llama-3.3-70B-Instruct-SAE-l50.pt", "_linear", "goodfire", 50, "meta-llama/Llama-3.3-70B-Instruct"),
        ("DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt", "", "deepseek_r1", 19, "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"),
    ],
)
def test_linear_files(name, start, format, hook, model, dtype, tmp_path):
    torch.save(tensors(linear(start), dtype), tmp_path / name)
    a = rounded(A, dtype)
    acts = relu(codes(a))
    for entry in (tmp_path / name, tmp_path):
        assert detect_format(entry) == format
        sae = load_sae(entry)
        assert_gives(sae, X, acts, acts @ a["W_dec"] + a["b_dec"])
        assert (sae.config.hook_name, sae.config.model_name) == (f"blocks.{hook}.hook_resid_post", model)


def test_a_renamed_linear_file_asks_for_its_hook_point(tmp_path):
    torch.save(tensors(linear("_linear")), tmp_path / "mine.pth")
    with pytest.raises(MissingFact) as caught:
        load_sae(tmp_path / "mine.pth")
    assert caught.value.names == ("hook_name",)
    by_repo = load_sae(tmp_path / "mine.pth", facts={"repo_id": "Goodfire/Llama-3.1-8B-Instruct-SAE-l19"})
    assert by_repo.config.hook_name == "blocks.19.hook_resid_post"
    assert by_repo.config.model_name == "meta-llama/Llama-3.1-8B-Instruct"


def test_hook_z_subtracts_b_dec(tmp_path):
    torch.save(tensors({name: A[name] for name in FOUR}), tmp_path / "s_v9.pt")
    cfg = {"act_name": "blocks.2.attn.hook_z", "dict_size": M, "act_size": D, "model_name": "gpt2-small"}
    (tmp_path / "s_v9_cfg.json").write_text(json.dumps(cfg))
    acts = relu(codes(A, X - A["b_dec"]))
    for entry in ("s_v9.pt", "s_v9"):
        assert detect_format(tmp_path / entry) == "connor_rob_hook_z"
        assert_gives(load_sae(tmp_path / entry), X, acts, acts @ A["W_dec"] + A["b_dec"])
    (tmp_path / "s_v9_cfg.json").write_text(json.dumps(cfg | {"dict_size": 31}))
    with pytest.raises(FormatError, match="dict_size 31, but the weights have 30"):
        load_sae(tmp_path / "s_v9.pt")


def qwen(folder: Path, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    for layer in (4, 5):
        stored = {"W_enc": A["W_enc"].T + layer - 5, "b_enc": A["b_enc"], "W_dec": A["W_dec"].T, "b_dec": A["b_dec"]}
        torch.save(tensors(stored, dtype), folder / f"layer{layer}.sae.pt")
    if config:
        (folder / "config.json").write_text(json.dumps({"model_type": "topk_sae", "base_model": "Qwen/Q", **config}))
    return folder / "layer5.sae.pt"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_qwen_scope_is_transposed_topk(dtype, tmp_path):
    path = qwen(tmp_path, dtype, k=6, d_model=D, d_sae=M)
    a = rounded(A, dtype)
    acts = topk(codes(a), 6)
    for entry in (path, tmp_path / "layer5"):
        assert detect_format(entry) == "qwen_scope"
        sae = load_sae(entry)
        assert_gives(sae, X, acts, acts @ a["W_dec"] + a["b_dec"])
        assert (sae.config.hook_name, sae.config.model_name) == ("blocks.5.hook_resid_post", "Qwen/Q")


def test_qwen_scope_k_without_a_config(tmp_path):
    path = qwen(tmp_path)
    with pytest.raises(MissingFact) as caught:
        load_sae(path)
    assert caught.value.names == ("k",)
    assert load_sae(path, facts={"k": 3}).config.k == 3
    sae = load_sae(path, facts={"repo_id": "Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_7"})
    assert (sae.config.k, sae.config.model_name) == (7, "Qwen/Qwen3-8B-Base")


def test_qwen_scope_sizes_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(FormatError, match="d_sae 31, but the weights have 30"):
        load_sae(qwen(tmp_path, k=3, d_sae=31))


# -- circuit-tracer ----------------------------------------------------------------------------------------------------
def layer(folder: Path, a: Arrays, config: dict[str, Any] | None, dtype: torch.dtype = torch.float32) -> Path:
    folder.mkdir(exist_ok=True)
    stored = a | {"W_enc": a["W_enc"].T}
    save_file(tensors(stored, dtype), folder / "layer_2.safetensors")
    sizes = {"d_model": {"value": D}, "d_feature": {"value": M}}
    (folder / "wandb-config.yaml").write_text(yaml.safe_dump(sizes))
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump({"model_kind": "transcoder_set", **config}))
    return folder / "layer_2.safetensors"


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("kind", ["relu", "topk", "jumprelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transcoder_sets(dtype, kind, skip, tmp_path):
    a = {name: A[name] for name in FOUR} | arrays(22, W_dec=(M, OUT), b_dec=(OUT,))
    a |= {"threshold": A["threshold"]} if kind == "jumprelu" else {}
    a |= arrays(23, W_skip=(OUT, D)) if skip else {}
    config = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "mlp.hook_out", "model_name": "m"}
    config |= {"activation": "topk", "k": 6} if kind == "topk" else {}
    path = layer(tmp_path, a, config, dtype)
    assert detect_format(path) == "mwhanna_transcoder"
    sae, kept = load_sae(path), rounded(a, dtype)
    z = codes(kept)
    acts = {"relu": relu, "topk": lambda z: topk(z, 6), "jumprelu": lambda z: jumprelu(z, kept["threshold"])}[kind](z)
    y = acts @ kept["W_dec"] + kept["b_dec"]
    assert_gives(sae, X, acts, y + X @ kept["W_skip"].T if skip else y)
    assert (sae.config.hook_name, sae.config.hook_name_out) == ("blocks.2.hook_resid_mid", "blocks.2.hook_mlp_out")


def test_transcoder_set_without_config_yaml(tmp_path):
    path = layer(tmp_path, {name: A[name] for name in FOUR}, None)
    sae = load_sae(path, facts={"repo_id": "mwhanna/qwen3-14b-transcoders"})
    assert (sae.config.hook_name, sae.config.hook_name_out) == ("blocks.2.mlp.hook_in", "blocks.2.hook_mlp_out")
    assert sae.config.model_name == "Qwen/Qwen3-14B"
    (tmp_path / "wandb-config.yaml").write_text("d_model: {value: 9}\n")
    with pytest.raises(FormatError, match="value 9, but the weights have 8"):
        load_sae(path)


@pytest.mark.parametrize("jump", [False, True])
@pytest.mark.parametrize("targets", [1, 4])
def test_one_layer_of_a_clt_has_codes_but_no_reconstruction(targets, jump, tmp_path):
    W_dec = arrays(24, W=(M, targets, D))["W"]
    encoder = {"W_enc_7": A["W_enc"].T, "b_enc_7": A["b_enc"], "b_dec_7": A["b_dec"]}
    save_file(tensors(encoder | ({"threshold_7": A["threshold"]} if jump else {})), tmp_path / "W_enc_7.safetensors")
    save_file(tensors({"W_dec_7": W_dec}), tmp_path / "W_dec_7.safetensors")
    (tmp_path / "config.yaml").write_text("model_kind: cross_layer_transcoder\nmodel_name: google/gemma-2-2b\n"
                                          "feature_input_hook: hook_resid_mid\nfeature_output_hook: hook_mlp_out\n")  # fmt: skip
    acts = jumprelu(codes(A), A["threshold"]) if jump else relu(codes(A))
    for entry in ("7", "W_enc_7.safetensors"):
        assert detect_format(tmp_path / entry) == "mntss_clt"
        sae = load_sae(tmp_path / entry)
        assert_gives(sae, X, acts, acts @ W_dec.sum(1) + A["b_dec"])
        assert "cross-layer" in sae.config.metadata["not_an_autoencoder"]
        assert (sae.config.hook_name, sae.config.hook_name_out) == ("blocks.7.hook_resid_mid", "blocks.7.hook_mlp_out")


# -- temporal ----------------------------------------------------------------------------------------------------------
HEADS, FACTOR, SEEN = 2, 3, 7


def temporal(folder: Path, tied: bool, layers: int, kind: str) -> tuple[Path, Arrays]:
    folder.mkdir(parents=True)
    shapes: dict[str, tuple[int, ...]] = {"D": (M, D), "b": (D,)}
    for n in range(layers):
        for name, rows in (("k_ctx", M // FACTOR), ("q_target", M // FACTOR), ("v_ctx", M), ("c_proj", M)):
            shapes |= {f"attn_layers.{n}.{name}.weight": (rows, M), f"attn_layers.{n}.{name}.bias": (rows,)}
    a = arrays(25, **shapes) | ({} if tied else arrays(26, E=(D, M)))
    save_file(tensors(a), folder / "latest_ckpt.safetensors")
    sae = {"exp_factor": M / D, "n_heads": HEADS, "n_attn_layers": layers, "bottleneck_factor": FACTOR,
           "sae_diff_type": kind, "kval_topk": 4, "tied_weights": tied, "scaling_factor": 0.5}  # fmt: skip
    whole = {"llm": {"dimin": D}, "sae": sae, "data": {"dtype": "float32"}}
    (folder / "conf.yaml").write_text(yaml.safe_dump(whole))
    return folder, a


def attention(a: Arrays, n: int, now: np.ndarray) -> np.ndarray:
    """Queries of each position; keys and values of the position before it; only of positions up to its own."""
    before = np.concatenate([np.zeros_like(now[:1]), now[:-1]])

    def apply(name: str, x: np.ndarray) -> np.ndarray:
        return x @ a[f"attn_layers.{n}.{name}.weight"].T + a[f"attn_layers.{n}.{name}.bias"]

    q, k, v = (
        apply(name, x).reshape(len(x), HEADS, -1)
        for name, x in (("q_target", now), ("k_ctx", before), ("v_ctx", before))
    )
    mixed = np.zeros_like(v)
    for t in range(len(now)):
        for h in range(HEADS):
            scores = k[: t + 1, h] @ q[t, h] / np.sqrt(q.shape[-1])
            weights = np.exp(scores - scores.max())
            mixed[t, h] = (weights / weights.sum()) @ v[: t + 1, h]
    return apply("c_proj", mixed.reshape(len(now), -1))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", ["topk", "relu"])
def test_temporal(tied, layers, kind, tmp_path):
    folder, a = temporal(tmp_path / "layer_12" / "temporal", tied, layers, kind)
    x, lam = inputs(D, SEEN), np.float32(1 / (4 * D))
    E = a["D"].T if tied else a["E"]
    rest, predicted = x * np.float32(0.5) - a["b"], np.zeros((SEEN, M), dtype=np.float32)
    for n in range(layers):
        p = relu(attention(a, n, relu(lam * rest @ E)))
        way = p @ a["D"]
        share = (way * rest).sum(-1, keepdims=True) / (np.linalg.norm(way, axis=-1, keepdims=True) + 1e-6) ** 2
        predicted, rest = predicted + p * share, rest - way * share
    z = lam * rest @ E
    novel = topk(z, 4) if kind == "topk" else relu(z)
    sae = load_sae(folder)
    assert_gives(sae, x, novel, ((novel + predicted) @ a["D"] + a["b"]) / np.float32(0.5))
    assert sae.config.hook_name == "blocks.12.hook_resid_post"


@pytest.mark.parametrize(
    ("section", "change", "sentence"),
    [
        ("sae", {"tied_weights": False}, "lacks E, but tied_weights"),
        ("sae", {"exp_factor": 5.0}, "there are 40 features, but the weights have 30"),
        ("llm", {"dimin": 9}, "dimin 9, but the weights have 8"),
        ("sae", {"n_heads": "two"}, "n_heads in sae in conf.yaml must be a whole number"),
        ("sae", {"bottleneck_factor": 5}, "k_ctx.weight has the shape"),
    ],
)
def test_temporal_conf_that_does_not_fit_is_refused(section, change, sentence, tmp_path):
    folder, _ = temporal(tmp_path / "layer_1" / "temporal", True, 1, "topk")
    whole = yaml.safe_load((folder / "conf.yaml").read_text())
    whole[section] |= change
    (folder / "conf.yaml").write_text(yaml.safe_dump(whole))
    with pytest.raises(FormatError, match=sentence):
        load_sae(folder)
