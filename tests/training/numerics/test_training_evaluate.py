"""Every metric against a second implementation in numpy, and the model's loss against one written out by hand."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saes.numerics.architectures import build_sae
from saes.numerics.lm import LM
from saes.numerics.sae import SAE, SAEConfig
from saes.numerics.transcoders import Transcoder
from tests.conftest import TEXT
from tests.tiny_models import D_MODEL, RESID, tiny_lm, tiny_sae
from training.numerics.capture import capture
from training.numerics.definitions import DEFINITIONS, EvaluationError
from training.numerics.evaluate import evaluate, measure_capture, measure_texts
from training.numerics.reconstruction import Rows, density_histogram, explained_variance, reconstruction
from training.numerics.shards import Capture, is_held_out, open_capture
from training.numerics.tokens import TokenPolicy


def values(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: metric["value"] for name, metric in metrics.items()}


def data(n: int = 1000) -> torch.Tensor:
    """Off-centre activations: where E|x|^2 and the variance differ by much."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, D_MODEL, generator=generator) + 10 * torch.randn(D_MODEL, generator=generator)


def identity_sae() -> SAE:
    """acts = (relu(x), relu(-x)), decoded to x exactly."""
    sae = build_sae(SAEConfig("standard", D_MODEL, 2 * D_MODEL, hook_name=RESID))
    eye = torch.eye(D_MODEL)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([eye, -eye], dim=1))
        sae.W_dec.copy_(torch.cat([eye, -eye]))
    return sae


def zero_sae() -> SAE:
    sae = identity_sae()
    with torch.no_grad():
        sae.W_dec.zero_()
    return sae


# -- reconstruction ------------------------------------------------------------------


def by_numpy(sae: SAE, x: torch.Tensor) -> dict[str, float]:
    with torch.no_grad():
        acts = sae.encode(x).double().numpy()
        y = sae(x).double().numpy()
    a = x.double().numpy()
    error = ((a - y) ** 2).sum(1).mean()
    variance = a.var(axis=0).sum()
    norms, norms_hat = np.linalg.norm(a, axis=1), np.linalg.norm(y, axis=1)
    dead = int((acts == 0).all(0).sum())
    spread = ((a - a.mean(0)) ** 2).sum(1)
    square = (a**2).sum(1).mean()
    return {
        "l0": np.count_nonzero(acts) / len(a),
        "l1": np.abs(acts).sum(1).mean(),
        "mse": error,
        "mse_per_dimension": ((a - y) ** 2).mean(),
        "explained_variance": 1 - error / variance,
        "fvu": error / variance,
        "explained_variance_per_dimension": (1 - ((a - y) ** 2).mean(0) / a.var(axis=0)).mean(),
        "explained_variance_centred": 1 - (a - y).var(axis=0).sum() / variance,
        "explained_variance_legacy": (1 - ((a - y) ** 2).sum(1) / spread).mean(),
        "explained_variance_saebench": 1 - error / (square - (square / a.shape[1]) ** 2),
        "cosine": ((a * y).sum(1) / norms / norms_hat).mean(),
        "l2_norm_in": norms.mean(),
        "l2_norm_out": norms_hat.mean(),
        "l2_ratio": (norms_hat / norms).mean(),
        "relative_reconstruction_bias": (y**2).sum() / (a * y).sum(),
        "dead_features": dead,
        "alive_fraction": 1 - dead / acts.shape[1],
        "dense_features": int(((acts != 0).mean(0) > 0.1).sum()),
    }


@pytest.mark.parametrize("architecture", ["topk", "standard"])
@pytest.mark.parametrize("normalisation", ["none", "layer_norm"])
def test_metrics_against_numpy(architecture, normalisation):
    sae, x = tiny_sae(architecture, normalize_activations=normalisation), data()
    found = values(evaluate(sae, x.split(64)))
    expected = by_numpy(sae, x)
    assert set(found) == set(expected) | {"density_histogram"}
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name
    assert explained_variance(sae, x) == pytest.approx(expected["explained_variance"], rel=1e-6)


def test_the_result_does_not_depend_on_batches_or_blocks(monkeypatch):
    sae, x = tiny_sae(), data()
    at_once = values(evaluate(sae, [x]))
    monkeypatch.setattr("training.numerics.reconstruction.MAX_DENSE", 96 * 10)
    for batches in (x.split(7), x.split(999)):
        in_parts = values(evaluate(sae, batches))
        assert in_parts.pop("density_histogram") == at_once["density_histogram"]
        assert in_parts == pytest.approx({n: v for n, v in at_once.items() if n != "density_histogram"}, rel=1e-6)


def test_explained_variance_is_exact_where_float32_sums_would_not_be():
    """Mean 1,000 times the spread, a million rows: E|x|^2 - |E x|^2 loses seven digits to cancellation."""
    x = torch.randn(200_000, 4, generator=torch.Generator().manual_seed(0)) + 1000
    sae = build_sae(SAEConfig("standard", 4, 4))
    with torch.no_grad():
        sae.W_dec.zero_()
        sae.b_dec.copy_(x.double().mean(0))
    a = x.double().numpy()
    expected = 1 - ((a - sae.b_dec.detach().double().numpy()) ** 2).sum(1).mean() / a.var(axis=0).sum()
    assert values(evaluate(sae, x.split(5000)))["explained_variance"] == pytest.approx(expected, abs=1e-6)


def test_the_mean_explains_nothing_and_the_identity_all():
    x = data()
    mean = zero_sae()
    with torch.no_grad():
        mean.b_dec.copy_(x.mean(0))
    assert values(evaluate(mean, [x]))["explained_variance"] == pytest.approx(0, abs=1e-6)
    perfect = values(evaluate(identity_sae(), [x]))
    assert perfect["explained_variance"] == 1 and perfect["mse"] == 0 and perfect["l2_ratio"] == 1


def test_dead_features_are_those_that_never_fire_on_n_tokens():
    sae = tiny_sae("standard")
    with torch.no_grad():
        sae.b_enc[[3, 50]] = -1e6
    metrics = evaluate(sae, [data() - data().mean(0)])
    assert metrics["dead_features"]["value"] == 2 and metrics["dead_features"]["n"] == 1000
    assert metrics["density_histogram"]["value"]["dead"] == 2


def test_density_histogram_counts_every_feature_once():
    made = density_histogram(np.array([0, 0, 1, 10, 100, 1000]), 1000)
    assert made["dead"] == 2 and sum(made["counts"]) == 4
    edges = np.array(made["edges"])
    for rate in (1e-3, 1e-2, 1e-1, 1.0):
        inside = (edges[:-1] <= math.log10(rate)) & ((math.log10(rate) < edges[1:]) | (edges[1:] == 0))
        assert made["counts"][int(np.flatnonzero(inside)[0])] == 1


def test_every_metric_has_its_definition_n_and_data_as_json():
    metrics = evaluate(tiny_sae(), [data(50)], data="fifty rows")
    for name, metric in metrics.items():
        assert set(metric) == {"value", "definition", "n", "data"}
        assert metric["definition"] in DEFINITIONS and metric["definition"] == name
        assert metric["n"] == 50 and metric["data"] == "fifty rows"
    json.dumps(metrics, allow_nan=False)


def test_what_is_not_defined_is_null():
    metrics = values(evaluate(zero_sae(), [torch.ones(10, D_MODEL)]))
    assert metrics["explained_variance"] is None and metrics["relative_reconstruction_bias"] is None


def test_nothing_to_evaluate_and_damaged_weights():
    with pytest.raises(EvaluationError, match="no activations to evaluate on"):
        evaluate(tiny_sae(), [])
    sae = tiny_sae()
    with torch.no_grad():
        sae.b_dec[0] = math.nan
    with pytest.raises(EvaluationError, match="NaN or infinite"):
        evaluate(sae, [data(10)])


# -- predictions ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm(tiny_model_dir: Path) -> LM:
    return tiny_lm("llama", tiny_model_dir)


@pytest.fixture(scope="module")
def contexts(lm: LM) -> np.ndarray:
    generator = np.random.default_rng(0)
    return generator.integers(2, lm.vocab_size, size=(5, 12))


def ce_by_hand(lm: LM, ids: np.ndarray, change: Any = None) -> tuple[float, np.ndarray]:
    """Cross-entropy, and log-probabilities, with the output of the last block changed by a plain torch hook."""

    def replace(_module: object, _args: object, out: Any) -> Any:
        x = out[0] if isinstance(out, tuple) else out
        return (change(x), *out[1:]) if isinstance(out, tuple) else change(x)

    handle = lm.model.model.layers[1].register_forward_hook(replace) if change else None
    with torch.no_grad():
        logits = lm.model(input_ids=torch.from_numpy(ids)).logits.double().numpy()
    if handle:
        handle.remove()
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = [log_p[i, t, ids[i, t + 1]] for i in range(len(ids)) for t in range(ids.shape[1] - 1)]
    return -float(np.mean(picked)), log_p[:, :-1]


def test_losses_against_a_computation_by_hand(lm, contexts):
    sae = tiny_sae()
    replaced = np.ones(contexts.shape, dtype=bool)
    replaced[:, 0] = False
    replaced[2, 5] = False
    mask = torch.from_numpy(replaced).unsqueeze(-1)
    original, log_p = ce_by_hand(lm, contexts)
    spliced, log_q = ce_by_hand(lm, contexts, lambda x: torch.where(mask, sae(x), x))
    ablated, log_0 = ce_by_hand(lm, contexts, lambda x: torch.where(mask, 0.0, x))
    metrics = evaluate(sae, [data()], lm=lm, contexts=contexts, replaced=replaced, batch_contexts=2)
    found = values(metrics)
    average = data().mean(0)
    mean, _ = ce_by_hand(lm, contexts, lambda x: torch.where(mask, average, x))
    kl, kl_zero = ((np.exp(log_p) * (log_p - other)).sum(-1).mean() for other in (log_q, log_0))
    expected = {
        "ce_original": original,
        "ce_with_sae": spliced,
        "ce_zero_ablated": ablated,
        "ce_mean_ablated": mean,
        "ce_recovered_mean": (mean - spliced) / (mean - original),
        "ce_increase": spliced - original,
        "ce_recovered": (ablated - spliced) / (ablated - original),
        "kl": kl,
        "kl_zero_ablated": kl_zero,
        "kl_recovered": 1 - kl / kl_zero,
    }
    assert len({round(value, 4) for value in (original, spliced, ablated)}) == 3
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4), name
        assert metrics[name]["n"] == 5 * 11 and metrics[name]["definition"] in DEFINITIONS
    assert found["l0"] > 0


def test_contexts_that_an_ablation_leaves_alike_share_a_pass(lm, contexts):
    replaced = np.ones(contexts.shape, dtype=bool)
    replaced[4, 3] = False  # something is left of the last one
    mask = torch.from_numpy(replaced).unsqueeze(-1)
    passes: list[int] = []
    handle = lm.model.model.norm.register_forward_hook(lambda module, args, output: passes.append(len(output)))
    found = values(evaluate(tiny_sae(), [data()], lm=lm, contexts=contexts, replaced=replaced, batch_contexts=3))
    handle.remove()
    assert passes == [3, 3, 1, 1, 2, 2, 1, 1], "plain, spliced, zeros, mean: once, and once for the odd one"
    average = data().mean(0)
    _, log_p = ce_by_hand(lm, contexts)
    zero, log_0 = ce_by_hand(lm, contexts, lambda x: torch.where(mask, 0.0, x))
    mean, _ = ce_by_hand(lm, contexts, lambda x: torch.where(mask, average, x))
    assert found["ce_zero_ablated"] == pytest.approx(zero, rel=1e-4)
    assert found["ce_mean_ablated"] == pytest.approx(mean, rel=1e-4)
    assert found["kl_zero_ablated"] == pytest.approx((np.exp(log_p) * (log_p - log_0)).sum(-1).mean(), rel=1e-4)


@pytest.mark.parametrize("hook_name", ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out"])
def test_every_place_gives_what_whole_passes_give(lm, contexts, hook_name, monkeypatch):
    measure = partial(evaluate, tiny_sae(), [data()], lm=lm, contexts=contexts, hook_name=hook_name)
    shared = values(measure())
    monkeypatch.setattr("training.numerics.replay.FAMILIES", {})
    whole = values(measure())
    predicted = [name for name in whole if name.startswith(("ce_", "kl"))]
    assert len(predicted) == 10
    for name in predicted:
        assert shared[name] == pytest.approx(whole[name], rel=1e-5, abs=1e-6), name


def test_an_identity_recovers_everything_and_zeros_nothing(lm, contexts):
    perfect = values(evaluate(identity_sae(), [data()], lm=lm, contexts=contexts))
    assert perfect["ce_recovered"] == 1 and perfect["ce_increase"] == 0 and perfect["kl"] == 0
    nothing = values(evaluate(zero_sae(), [data()], lm=lm, contexts=contexts))
    assert nothing["ce_recovered"] == 0 and nothing["ce_with_sae"] == nothing["ce_zero_ablated"]
    assert nothing["kl_recovered"] == pytest.approx(0, abs=1e-9)


def test_replacing_nothing_changes_nothing(lm, contexts):
    nowhere = np.zeros(contexts.shape, dtype=bool)
    found = values(evaluate(zero_sae(), [data()], lm=lm, contexts=contexts, replaced=nowhere))
    assert found["ce_original"] == found["ce_with_sae"] == found["ce_zero_ablated"]
    assert found["ce_recovered"] is None


def test_contexts_too_short_to_predict(lm):
    with pytest.raises(EvaluationError, match="at least two tokens"):
        evaluate(tiny_sae(), [data(10)], lm=lm, contexts=np.zeros((3, 1), dtype=np.int64))


# -- from a capture ------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(lm: LM, tmp_path_factory: pytest.TempPathFactory) -> Capture:
    folder = tmp_path_factory.mktemp("evaluate") / "c"
    texts = [f"{i}: {TEXT}" for i in range(60)]
    capture(lm, texts, [RESID], folder, policy=TokenPolicy(context_length=16))
    return open_capture(folder)


def test_a_capture_is_evaluated_on_its_held_out_contexts(lm, made):
    sae, seen = tiny_sae(), []
    metrics = measure_capture(sae, made, lm=lm, max_contexts=3, progress=lambda *args: seen.append(args)).metrics
    held_out = torch.cat([x for x, _, _ in made.rows(RESID, "held_out")])
    assert metrics["explained_variance"]["n"] == len(held_out) == made.split_rows("held_out") > 50
    assert values(metrics)["explained_variance"] == pytest.approx(explained_variance(sae, held_out), rel=1e-6)
    numbers = np.flatnonzero(is_held_out(np.arange(made.n_contexts)))[:3]
    contexts = made.contexts()[numbers].astype(np.int64)
    special = np.isin(contexts, [lm.tokenizer.bos_token_id, lm.tokenizer.eos_token_id])
    by_hand = evaluate(sae, [held_out], lm=lm, contexts=contexts, replaced=~special)
    assert values(metrics)["ce_recovered"] == pytest.approx(values(by_hand)["ce_recovered"], rel=1e-6)
    assert metrics["ce_recovered"]["n"] == 3 * 15
    assert metrics["l0"]["data"] == "held-out contexts of capture c"
    assert seen[0][1] == len(held_out) and seen[-1] == (3, 3, "comparing predictions")


def test_fewer_rows_on_request(made):
    metrics = measure_capture(tiny_sae(), made, split="train", max_rows=100).metrics
    assert metrics["l0"]["n"] == 100 and metrics["l0"]["data"] == "train contexts of capture c"


# -- on texts --------------------------------------------------------------------------


def test_texts_give_what_a_capture_of_them_gives(lm, made):
    """The same tokens, once from stored shards and once straight from the model."""
    sae, texts = tiny_sae(), [f"{i}: {TEXT}" for i in range(60)]
    stored = measure_capture(sae, made, split="all", lm=lm, max_contexts=5)
    live = measure_texts(sae, lm, texts, TokenPolicy(context_length=16), max_contexts=5, data="texts")
    assert live.n == stored.n == made.split_rows("all") and live.metrics["l0"]["data"] == "texts"
    assert torch.equal(live.firing.tokens, stored.firing.tokens)
    assert torch.equal(live.firing.contexts, stored.firing.contexts)
    for name, metric in stored.metrics.items():
        if name != "density_histogram":
            assert live.metrics[name]["value"] == pytest.approx(metric["value"], rel=1e-5), name
            assert live.metrics[name]["n"] == metric["n"]


def test_padding_is_neither_predicted_nor_measured(lm, tmp_path):
    sae, texts = tiny_sae(), [f"{i}: {TEXT[: 20 + 3 * i]}" for i in range(40)]
    policy = TokenPolicy(context_length=32, packed=False)
    capture(lm, texts, [RESID], tmp_path / "padded", policy=policy)
    source = open_capture(tmp_path / "padded")
    stored = measure_capture(sae, source, split="all", lm=lm, max_contexts=7)
    live = measure_texts(sae, lm, texts, policy, max_contexts=7)
    lengths = source.lengths()
    assert lengths is not None and lengths.min() < 32
    assert live.n == stored.n and stored.metrics["ce_original"]["n"] == int((lengths[:7] - 1).sum())
    one_by_one = [
        (ce_by_hand(lm, ids[None, :length].astype(np.int64))[0], length - 1)
        for ids, length in zip(source.contexts()[:7], lengths[:7], strict=True)
    ]
    expected = sum(ce * n for ce, n in one_by_one) / sum(n for _, n in one_by_one)
    assert values(stored.metrics)["ce_original"] == pytest.approx(expected, rel=1e-5)
    for name, metric in stored.metrics.items():
        if name != "density_histogram":
            assert live.metrics[name]["value"] == pytest.approx(metric["value"], rel=1e-5), name


def test_texts_are_read_no_further_than_asked(lm):
    read: list[int] = []

    def texts():
        for i in range(1000):
            read.append(i)
            yield f"{i}: {TEXT}"

    found = measure_texts(tiny_sae(), lm, texts(), TokenPolicy(context_length=16), max_tokens=100, max_contexts=2)
    assert 100 <= found.n < 100 + 16 and len(read) < 1000
    assert found.metrics["ce_original"]["n"] == 2 * 15
    for batch in (1, 8):
        again = measure_texts(
            tiny_sae(), lm, texts(), TokenPolicy(context_length=16), max_tokens=found.n, batch_contexts=batch
        )
        assert again.n == found.n, "the number itself is enough"


def test_a_context_counts_once_for_a_feature_however_its_rows_are_cut():
    sae, x = tiny_sae("standard"), data(100)
    context = np.repeat(np.arange(10), 10)
    expected = (sae.encode(x) != 0).view(10, 10, -1).any(1).sum(0)
    for size in (100, 7, 1):
        parts = [Rows(x[i : i + size], None, context[i : i + size]) for i in range(0, 100, size)]
        found = reconstruction(sae, parts)
        assert found is not None and torch.equal(found.firing.contexts, expected)


# -- transcoders -------------------------------------------------------------------------


def test_a_transcoder_is_compared_with_what_it_predicts(lm, tmp_path):
    into, out = "blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"
    sae = Transcoder(SAEConfig("transcoder", D_MODEL, 96, hook_name=into, apply_b_dec_to_input=False))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.ndim), std=0.1)
    texts = [f"{i}: {TEXT}" for i in range(30)]
    capture(lm, texts, [into, out], tmp_path / "t", policy=TokenPolicy(context_length=16))
    source = open_capture(tmp_path / "t")
    found = measure_capture(sae, source, into, goal_hook=out, split="all", lm=lm, max_contexts=3)
    x = torch.cat([x for x, _, _ in source.rows(into)])
    y = torch.cat([x for x, _, _ in source.rows(out)])
    with torch.no_grad():
        error = (sae(x) - y).double().square().sum(-1).mean()
    assert values(found.metrics)["mse"] == pytest.approx(float(error), rel=1e-5)
    live = measure_texts(sae, lm, texts, TokenPolicy(context_length=16), goal_hook=out, max_contexts=3)
    assert values(live.metrics)["fvu"] == pytest.approx(values(found.metrics)["fvu"], rel=1e-5)

    ids = source.contexts()[:3].astype(np.int64)
    replaced = torch.from_numpy(~np.isin(ids, [lm.tokenizer.bos_token_id, lm.tokenizer.eos_token_id])).unsqueeze(-1)
    seen = lm.activations(torch.from_numpy(ids), [into])[into]
    with torch.no_grad():
        y_hat = sae(seen)
    spliced, _ = ce_by_hand(lm, ids, lambda y: torch.where(replaced, y_hat, y))
    assert values(found.metrics)["ce_with_sae"] == pytest.approx(spliced, rel=1e-5)
    assert values(found.metrics)["ce_with_sae"] != values(found.metrics)["ce_zero_ablated"]
