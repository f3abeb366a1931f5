"""OpenMOSS and Llama Scope beyond the golden files, against the equations in plain numpy."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from saes.numerics.formats import FormatError, MissingFact, detect_format, load_sae
from tests.saes.numerics.plain import (
    Arrays,
    arrays,
    assert_gives,
    inputs,
    jumprelu,
    norms,
    relu,
    rounded,
    tensors,
    topk,
)

D, M = 10, 40
X = inputs(D)
HOOK, OUT = "blocks.3.ln2.hook_normalized", "blocks.3.hook_mlp_out"
NORM = "dataset_average_activation_norm."
THRESHOLD = "activation_function.log_jumprelu_threshold"
A = arrays(3, W_E=(D, M), b_E=(M,), W_D=(M, D), b_D=(D,))
LOG = np.log(arrays(4, threshold=(M,))["threshold"])


def saved(folder: Path, a: Arrays, means: dict[str, float], dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    scalars = {f"{NORM}{hook}": torch.tensor(mean) for hook, mean in means.items()}
    save_file(tensors(a, dtype) | scalars, folder / "sae_weights.safetensors")
    whole = {"sae_type": "sae", "d_model": D, "expansion_factor": M / D, "hook_point_in": HOOK, "hook_point_out": HOOK}
    (folder / "config.json").write_text(json.dumps(whole | config))
    return folder


def plain(a: Arrays, act, s_in: Any = 1.0, s_out: Any = 1.0, by_norm: bool = True) -> tuple[np.ndarray, np.ndarray]:
    x = X * s_in
    z = x @ a["W_E"] + a["b_E"]
    if "W_E_glu" in a:
        z = z / (1 + np.exp(-(x @ a["W_E_glu"] + a["b_E_glu"])))
    n = norms(a["W_D"]) if by_norm else np.float32(1)
    acts = act(z * n) / n
    return acts, (acts @ a["W_D"] + a.get("b_D", np.float32(0))) / s_out


ACTIVATIONS = {
    "relu": relu,
    "topk": lambda z: topk(z, 6),
    "jumprelu": lambda z: jumprelu(z, np.exp(LOG)),
}


@pytest.mark.parametrize("crosses", [False, True])
@pytest.mark.parametrize("by_norm", [False, True])
@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("act_fn", ACTIVATIONS)
def test_every_activation_norm_gate_and_target(act_fn, glu, by_norm, crosses, tmp_path):
    a = A | (arrays(5, W_E_glu=(D, M), b_E_glu=(M,)) if glu else {})
    stored = a | ({THRESHOLD: LOG} if act_fn == "jumprelu" else {})
    means = {HOOK: 2.5, OUT: 0.7} if crosses else {HOOK: 2.5}
    config = {"act_fn": act_fn, "top_k": 6, "use_glu_encoder": glu, "sparsity_include_decoder_norm": by_norm}
    folder = saved(tmp_path, stored, means, hook_point_out=OUT if crosses else HOOK, **config)
    assert detect_format(folder) == "openmoss"
    sae = load_sae(folder)
    s = np.float32(D**0.5)
    assert_gives(sae, X, *plain(a, ACTIVATIONS[act_fn], s / 2.5, s / (0.7 if crosses else 2.5), by_norm))
    assert (sae.config.hook_name, sae.config.hook_name_out) == (HOOK, OUT if crosses else "")
    assert sae.reconstructs != crosses


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_storage(dtype, tmp_path):
    folder = saved(tmp_path, A | {THRESHOLD: LOG}, {HOOK: 2.0}, dtype, act_fn="jumprelu")
    kept = rounded(A | {THRESHOLD: LOG}, dtype)
    scale = np.float32(D**0.5 / 2)
    numbers = plain(kept, lambda z: jumprelu(z, np.exp(kept[THRESHOLD])), scale, scale)
    assert_gives(load_sae(folder), X, *numbers)


def test_rows_scaled_one_by_one(tmp_path):
    folder = saved(tmp_path, A, {}, act_fn="relu", norm_activation="token-wise")
    scale = np.sqrt(np.float32(D)) / np.linalg.norm(X, axis=-1, keepdims=True)
    assert_gives(load_sae(folder), X, *plain(A, relu, scale, scale))


def test_scales_folded_before_and_no_decoder_bias(tmp_path):
    a = {name: array for name, array in A.items() if name != "b_D"}
    folder = saved(tmp_path, a, {}, act_fn="relu", norm_activation="inference", use_decoder_bias=False)
    assert_gives(load_sae(folder), X, *plain(a, relu))


def test_weights_of_torch_and_of_checkpoints(tmp_path):
    for name in ("sae_weights.pt", "checkpoints/final.pt", "checkpoints/pruned.safetensors"):
        folder = saved(tmp_path / name.replace("/", "-"), A, {}, act_fn="relu", norm_activation="inference")
        (folder / "sae_weights.safetensors").unlink()
        (folder / name).parent.mkdir(exist_ok=True)
        if name.endswith(".pt"):
            torch.save({"sae": tensors(A), "version": "1"}, folder / name)
        else:
            save_file(tensors(A), folder / name)
        assert detect_format(folder) == "openmoss"
        assert_gives(load_sae(folder), X, *plain(A, relu))


def test_a_feature_without_a_decoder_never_fires(tmp_path):
    a = A | {"W_D": A["W_D"].copy(), THRESHOLD: LOG}
    a["W_D"][3] = 0
    sae = load_sae(saved(tmp_path, a, {HOOK: 2.5}, act_fn="jumprelu"))
    acts = sae.encode(torch.from_numpy(100 * X))
    assert not acts[:, 3].any() and acts.any()


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"act_fn": "batchtopk"}, "act_fn in config.json is 'batchtopk'"),
        ({"sae_type": "lorsa"}, "is a lorsa of OpenMOSS"),
        ({"sae_type": "molt"}, "is a molt of OpenMOSS"),
        ({"sae_type": "other"}, "sae_type in config.json is 'other'"),
        ({"norm_activation": "batch-wise"}, "batch-wise"),
        ({"norm_activation": "token-wise", "hook_point_out": OUT}, "norm of what it predicts"),
        ({"d_model": D + 1}, "d_model 11, but the weights have 10"),
        ({"expansion_factor": 5.0}, "there are 50 features, but the weights have 40"),
        ({"act_fn": "jumprelu"}, "lacks activation_function.log_jumprelu_threshold"),
        ({"use_glu_encoder": True}, "lacks W_E_glu"),
        ({"hook_point_in": "blocks.4.hook_resid_post", "hook_point_out": None}, "by which its inputs were scaled"),
        ({"act_fn": 3}, "act_fn in config.json must be text"),
    ],
)
def test_what_is_not_supported_or_does_not_fit_is_named(config, sentence, tmp_path):
    folder = saved(tmp_path, A, {HOOK: 2.5}, **({"act_fn": "relu"} | config))
    with pytest.raises(FormatError, match=sentence):
        load_sae(folder)


def test_tensors_left_over_are_refused(tmp_path):
    with pytest.raises(FormatError, match="holds extra"):
        load_sae(saved(tmp_path, A | {"extra": A["b_E"].copy()}, {HOOK: 2.5}, act_fn="relu"))


# -- several hook points -----------------------------------------------------------------------------------------------
HOOKS = ["blocks.1.hook_resid_post", "blocks.2.hook_resid_post", "blocks.3.hook_resid_post"]
MEANS = dict(zip(HOOKS, (2.0, 3.0, 5.0), strict=True))
SCALES = np.sqrt(np.float32(D)) / np.array([2.0, 3.0, 5.0], dtype=np.float32)
X3 = inputs(3 * D)


@pytest.mark.parametrize("act_fn", ACTIVATIONS)
def test_crosscoders(act_fn, tmp_path):
    a = arrays(6, W_E=(3, D, M), b_E=(3, M), W_D=(3, M, D), b_D=(3, D))
    stored = a | ({THRESHOLD: LOG} if act_fn == "jumprelu" else {})
    config = {"sae_type": "crosscoder", "act_fn": act_fn, "top_k": 6, "hook_points": HOOKS}
    sae = load_sae(saved(tmp_path, stored, MEANS, **config))
    x = X3.reshape(-1, 3, D) * SCALES[:, None]
    z = sum(x[:, h] @ a["W_E"][h] + a["b_E"][h] for h in range(3))
    codes, back = [], []
    for h in range(3):
        n = norms(a["W_D"][h])
        codes.append(ACTIVATIONS[act_fn](z * n) / n)
        back.append((codes[-1] @ a["W_D"][h] + a["b_D"][h]) / SCALES[h])
    assert_gives(sae, X3, codes[0], np.concatenate(back, -1))
    assert "not_an_autoencoder" in sae.config.metadata and not sae.reconstructs


@pytest.mark.parametrize("by_norm", [False, True])
@pytest.mark.parametrize("act_fn", ACTIVATIONS)
def test_cross_layer_transcoders(act_fn, by_norm, tmp_path):
    out = [f"blocks.{n}.hook_mlp_out" for n in range(3)]
    s_out = np.sqrt(np.float32(D)) / np.array([1.5, 2.5, 4.0], dtype=np.float32)
    a = arrays(7, W_E=(3, D, M), b_E=(3, M), threshold=(3, M))
    log = np.log(a.pop("threshold"))
    for t in range(3):
        a |= arrays(8 + t, **{f"W_D.{t}": (t + 1, M, D), f"b_D.{t}": (D,)})
    stored = a | ({THRESHOLD: log} if act_fn == "jumprelu" else {})
    config = {"sae_type": "clt", "act_fn": act_fn, "top_k": 6, "hook_points_in": HOOKS, "hook_points_out": out}
    means = MEANS | dict(zip(out, (1.5, 2.5, 4.0), strict=True))
    folder = saved(tmp_path, stored, means, sparsity_include_decoder_norm=by_norm, **config)
    if act_fn == "topk" and by_norm:
        with pytest.raises(FormatError, match="top k by decoder norm"):
            load_sae(folder)
        return
    x = X3.reshape(-1, 3, D) * SCALES[:, None]
    codes = []
    for layer in range(3):
        z = x[:, layer] @ a["W_E"][layer] + a["b_E"][layer]
        n = np.sqrt(sum(norms(a[f"W_D.{t}"][layer]) ** 2 for t in range(layer, 3))) if by_norm else np.float32(1)
        fired = jumprelu(z * n, np.exp(log[layer])) if act_fn == "jumprelu" else ACTIVATIONS[act_fn](z * n)
        codes.append(fired / n)
    back = [
        (sum(codes[source] @ a[f"W_D.{t}"][source] for source in range(t + 1)) + a[f"b_D.{t}"]) / s_out[t]
        for t in range(3)
    ]
    sae = load_sae(folder)
    assert_gives(sae, X3, np.concatenate(codes, -1), np.concatenate(back, -1))
    assert "not_an_autoencoder" in sae.config.metadata


# -- Llama Scope -------------------------------------------------------------------------------------------------------
LINEAR = {"W_E": "encoder.weight", "b_E": "encoder.bias", "W_D": "decoder.weight", "b_D": "decoder.bias"}


def linear(a: Arrays) -> Arrays:
    return {LINEAR[name]: array.T if name.startswith("W") else array for name, array in a.items()}


def llama(folder: Path, a: Arrays, name: str = "final", **config: Any) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    save_file(tensors(linear(a)), folder / "checkpoints" / f"{name}.safetensors")
    whole = {"d_model": D, "d_sae": M, "act_fn": "jumprelu", "jump_relu_threshold": 0.4, "hook_point_in": HOOK,
             "hook_point_out": HOOK, "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True,
             "dataset_average_activation_norm": {"in": 2.0, "out": 2.0}, "top_k": 50}  # fmt: skip
    (folder / "hyperparams.json").write_text(json.dumps(whole | config))
    return folder


def authors(a: Arrays, threshold: float, avg_in: float, avg_out: float) -> tuple[np.ndarray, np.ndarray]:
    """Their reader of 2024, on x as it is: everything is folded, codes are in the units of the output."""
    s_in, s_out = (np.float32(D**0.5 / avg) for avg in (avg_in, avg_out))
    b_E, b_D, W_D = a["b_E"] / s_in, a["b_D"] / s_out, a["W_D"] * (s_in / s_out)
    n = norms(W_D)
    z = X @ (a["W_E"] * n) + b_E * n
    acts = z * (z > threshold)
    return acts, acts @ (W_D / n[:, None]) + b_D


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("avg_out", [2.0, 0.6])
@pytest.mark.parametrize("name", ["final", "pruned"])
def test_llama_scope_is_the_authors_reading_in_scaled_units(name, avg_out, unit, tmp_path):
    a = A | ({"W_D": A["W_D"] / norms(A["W_D"])[:, None]} if unit else {})
    crosses = avg_out != 2.0
    folder = llama(
        tmp_path / "L3",
        a,
        name,
        hook_point_out=OUT if crosses else HOOK,
        dataset_average_activation_norm={"in": 2.0, "out": avg_out},
    )
    acts, x_hat = authors(a, 0.4, 2.0, avg_out)
    scaled = acts * np.float32(D**0.5 / avg_out)
    for entry in (folder, folder / "checkpoints" / f"{name}.safetensors"):
        assert detect_format(entry) == "llama_scope"
        sae = load_sae(entry)
        assert_gives(sae, X, scaled, x_hat)
        assert sae.config.architecture == ("jumprelu_transcoder" if crosses else "jumprelu")


def test_llama_scope_factor_is_the_files_or_the_fact(tmp_path):
    a = A | {"W_D": A["W_D"] / norms(A["W_D"])[:, None]}
    factor = D**0.5 / 2
    without = llama(tmp_path / "without", a, dataset_average_activation_norm=None)
    with pytest.raises(MissingFact) as caught:
        load_sae(without)
    assert caught.value.names == ("norm_scaling_factor",)
    acts, x_hat = authors(a, 0.4, 2.0, 2.0)
    for folder in (without, llama(tmp_path / "with", a)):
        assert_gives(load_sae(folder, facts={"norm_scaling_factor": factor}), X, acts * np.float32(factor), x_hat)
    with pytest.raises(FormatError, match=r"by hyperparams\.json it is"):
        load_sae(tmp_path / "with", facts={"norm_scaling_factor": 2 * factor})


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"act_fn": "topk"}, "act_fn in hyperparams.json is 'topk'"),
        ({"use_glu_encoder": True}, "sets use_glu_encoder"),
        ({"norm_activation": "token-wise"}, "norm_activation in hyperparams.json"),
        ({"d_sae": 99}, "d_sae 99, but the weights have 40"),
        ({"dataset_average_activation_norm": {"in": 0, "out": 1}}, "must be a number above 0"),
    ],
)
def test_llama_scope_option_that_is_not_read_is_named(config, sentence, tmp_path):
    with pytest.raises(FormatError, match=sentence):
        load_sae(llama(tmp_path / "L3", A, **config))


def test_r1_needs_its_factor(tmp_path):
    a = A | {"W_D": A["W_D"] / norms(A["W_D"])[:, None]}
    save_file(tensors(linear(a) | {"log_jumprelu_threshold": LOG}), tmp_path / "sae_weights.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"sae_type": "sae", "d_model": D, "hook_point_in": HOOK}))
    assert detect_format(tmp_path) == "llama_scope_r1_distill"
    with pytest.raises(MissingFact) as caught:
        load_sae(tmp_path)
    assert caught.value.names == ("norm_scaling_factor",)
    for bad in (0, -1.0, float("nan"), "2", True):
        with pytest.raises(FormatError, match="norm_scaling_factor"):
            load_sae(tmp_path, facts={"norm_scaling_factor": bad})
    sae = load_sae(tmp_path, facts={"norm_scaling_factor": 2.4})
    assert_gives(sae, X, *plain(a, ACTIVATIONS["jumprelu"], np.float32(2.4), np.float32(2.4)))
