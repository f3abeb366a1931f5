"""The compiled sparse step against autograd, torch's topk and the plain optimiser; the same to the bit on any threads."""

import copy
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from saes.numerics.architectures import build_sae
from saes.numerics.sae import SAE, SAEConfig
from saes.numerics.topk import BatchTopKSAE, ByNorm
from training.numerics import sparse
from training.numerics.gradients import autograd_gradients, gradients, pair_gradients
from training.numerics.losses import Terms
from training.numerics.optim import Optimizer, fold_norms, matmul_precision
from training.numerics.row_gradients import PairGradients, SummedGradients
from training.numerics.sparse import Encoder, batchtopk_pairs, topk_pairs
from training.numerics.threads import Scratch
from training.numerics.topk_plain import topk_gradients
from training.numerics.train import TrainConfig, train

D, D_SAE, K, N = 24, 170, 5, 600  # rows and features that are no multiple of a run, columns of no group
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
NO_DEAD = torch.empty(0, dtype=torch.int64)
DEAD = torch.tensor([3, 4, 17, 99, 158])


def made(architecture: str = "topk", k: float = K, **options) -> SAE:
    if architecture == "nested":
        architecture, options["options"] = "batchtopk", {"matryoshka_widths": [20, 21, 90, D_SAE]}
    sae = build_sae(SAEConfig(architecture, D, D_SAE, k=k, **options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for bias in (sae.b_enc, sae.b_dec):
            bias.copy_(0.3 * torch.randn(bias.shape, generator=generator))
    return sae


def data(n: int = N, seed: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(n, D, generator=generator) + torch.randn(D, generator=generator)


def terms(dead: torch.Tensor = NO_DEAD, **changes) -> Terms:
    return dataclasses.replace(Terms(dead, scale=2.5, variance=210.0, aux=1 / 32), **changes)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# -- gradients -----------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "nested"])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("dead", [NO_DEAD, DEAD], ids=["none dead", "some dead"])
@pytest.mark.parametrize("n", [N, 1])
def test_gradients_equal_autograd(architecture, centred, dead, n):
    sae, x = made(architecture, apply_b_dec_to_input=centred), data(n)
    reference, outcome = autograd_gradients(sae, x, terms(dead)), gradients(sae, x, terms(dead))
    assert isinstance(outcome.grads, PairGradients) and set(outcome.grads) == set(reference.grads) == set(NAMES)
    assert outcome.parts == pytest.approx(reference.parts, rel=1e-5) and ("aux" in outcome.parts) == bool(len(dead))
    assert torch.equal(outcome.fired, reference.fired)
    assert outcome.squared_error == pytest.approx(reference.squared_error, rel=1e-5)
    assert outcome.least == (None if architecture == "topk" else pytest.approx(reference.least, rel=1e-5))
    for name in NAMES:
        assert reference.grads[name].norm() > 0, name
        torch.testing.assert_close(outcome.grads[name], reference.grads[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "nested"])
def test_fewer_positive_features_than_k(architecture):
    sae, x = made(architecture), data()
    with torch.no_grad():
        sae.b_enc.sub_(6)
    reference, outcome = autograd_gradients(sae, x, terms()), gradients(sae, x, terms())
    assert 0 < int(outcome.fired.sum()) < K * N and torch.equal(outcome.fired, reference.fired)
    for name in NAMES:
        torch.testing.assert_close(outcome.grads[name], reference.grads[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "nested"])
def test_no_positive_feature_at_all(architecture):
    sae, x = made(architecture), data()
    with torch.no_grad():
        sae.b_enc.sub_(1000)
    outcome = gradients(sae, x, terms())
    assert int(outcome.fired.sum()) == 0 and outcome.least is None and not outcome.grads["W_enc"].any()
    assert outcome.squared_error == pytest.approx(float((x - sae.b_dec.detach()).square().sum(-1).mean()), rel=1e-5)


@pytest.mark.skipif(not torch.cpu.get_capabilities().get("avx512_bf16"), reason="no bfloat16 products here")
@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "nested"])
def test_rounded_products_change_gradients_by_little(architecture):
    sae, x = made(architecture), data()
    exact = gradients(sae, x, terms())
    with matmul_precision("fast"):
        fast = gradients(sae, x, terms())
    assert fast.grads.x.dtype == torch.bfloat16 and exact.grads.x.dtype == torch.float32
    assert fast.squared_error == pytest.approx(exact.squared_error, rel=0.01)
    for name in NAMES:
        assert 0 < (fast.grads[name] - exact.grads[name]).norm() < 0.1 * exact.grads[name].norm(), name


CUTS = {
    "standard": {"l1": 3.0},
    "jumprelu": {"l0": 0.3, "bandwidth": 0.5},
    "jumprelu_target": {"l0": 0.2, "bandwidth": 0.5, "target_l0": 40.0},
    "gated": {"l1": 3.0},
}


@pytest.mark.skipif(not torch.cpu.get_capabilities().get("avx512_bf16"), reason="no bfloat16 products here")
@pytest.mark.parametrize("kind", CUTS)
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("dead", [NO_DEAD, DEAD], ids=["none dead", "some dead"])
def test_dense_steps_are_autograd_s_but_for_bfloat16(kind, centred, dead):
    """Every number near the exact one: what rounding inputs to 8 bits changes, and nothing else."""
    sae = build_sae(SAEConfig(kind.partition("_")[0], D, D_SAE, apply_b_dec_to_input=centred))
    with torch.no_grad():
        for seed, name in enumerate(
            sorted({"b_enc", "b_gate", "b_mag", "r_mag"} & dict(sae.named_parameters()).keys())
        ):
            sae.tensor(name).copy_(0.3 * torch.randn(D_SAE, generator=torch.Generator().manual_seed(1 + seed)))
        sae.b_dec.copy_(data().mean(0))
        if "jumprelu" in kind:
            sae.tensor("threshold").copy_(torch.rand(D_SAE, generator=torch.Generator().manual_seed(3)))
    given = terms(dead, **CUTS[kind])
    exact = autograd_gradients(sae, data(), given)
    with matmul_precision("fast"):
        outcome = gradients(sae, data(), given)
    assert isinstance(outcome.grads, SummedGradients) and set(outcome.grads) == set(exact.grads)
    assert outcome.parts == pytest.approx(exact.parts, rel=5e-3)
    assert outcome.squared_error == pytest.approx(exact.squared_error, rel=5e-3)
    assert (outcome.fired - exact.fired).abs().sum() < 0.005 * exact.fired.sum()
    for name, grad in exact.grads.items():
        assert 0 < (outcome.grads[name] - grad).norm() < (0.06 if name == "threshold" else 0.015) * grad.norm(), name


def free(architecture: str) -> SAE:
    """An SAE in training whose decoder rows have norms from 0.5 to 2."""
    sae = made(architecture)
    with torch.no_grad():
        sae.W_dec.mul_(
            torch.linspace(0.5, 2, D_SAE)[torch.randperm(D_SAE, generator=torch.Generator().manual_seed(4))].unsqueeze(
                1
            )
        )
    assert isinstance(sae, ByNorm)
    sae.by_norm = True
    return sae


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "nested"])
@pytest.mark.parametrize("dead", [NO_DEAD, DEAD], ids=["none dead", "some dead"])
def test_codes_chosen_by_decoder_norm(architecture, dead):
    """Against autograd, whose choice is that of the same SAE with its norms folded; and folding changes no output."""
    sae, x = free(architecture), data()
    reference, outcome = autograd_gradients(sae, x, terms(dead)), gradients(sae, x, terms(dead))
    assert torch.equal(outcome.fired, reference.fired)
    assert outcome.least == (None if architecture == "topk" else pytest.approx(reference.least, rel=1e-5))
    assert outcome.parts == pytest.approx(reference.parts, rel=1e-5)
    for name in NAMES:
        torch.testing.assert_close(outcome.grads[name], reference.grads[name], rtol=1e-4, atol=1e-6, msg=name)
    before, codes = sae(x), sae.encode(x)
    fold_norms(sae)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    torch.testing.assert_close(sae(x), before, rtol=1e-4, atol=1e-4)
    assert torch.equal(sae.encode(x) > 0, codes > 0) and outcome.fired.equal((codes > 0).sum(0))


@pytest.mark.parametrize("kind", ["standard", "gated", "jumprelu"])
def test_folding_the_norms_changes_no_output(kind):
    sae, x = build_sae(SAEConfig(kind, D, D_SAE)), data()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.3 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(4)))
    before, fired = sae(x), sae.encode(x) > 0
    fold_norms(sae)
    torch.testing.assert_close(sae(x), before, rtol=1e-4, atol=1e-3)
    assert (fired != (sae.encode(x) > 0)).sum() <= 2  # a code on its threshold may fall to either side


def test_a_threshold_learned_by_norm_chooses_the_same_after_folding():
    sae, x = free("batchtopk"), data()
    assert isinstance(sae, BatchTopKSAE)
    norms = sae.W_dec.detach().norm(dim=1)
    with torch.no_grad():
        sae.threshold.fill_(1.0)
        before = copy.deepcopy(sae)
        before.threshold.div_(norms)  # z |W_dec row| > T where z > T / |W_dec row|
    expected = before.for_inference()
    fold_norms(sae)
    found = sae.for_inference()
    fired = expected.encode(x) > 0
    assert 0 < fired.sum() < fired.numel() / 2 and ((found.encode(x) > 0) != fired).sum() <= 2
    torch.testing.assert_close(found(x), expected(x), rtol=1e-4, atol=1e-2)


def test_a_row_that_is_not_finite_shows_in_the_loss():
    for value in (torch.nan, torch.inf):
        x = data()
        x[7, 3] = value
        assert not torch.tensor(gradients(made(), x, terms()).loss).isfinite()


def test_double_precision_and_other_architectures_go_the_plain_way():
    assert isinstance(gradients(made().double(), data().double(), terms()).grads, dict)
    assert isinstance(gradients(build_sae(SAEConfig("standard", D, D_SAE)), data(), terms()).grads, dict)


# -- the choice ----------------------------------------------------------------------


def dense(pairs: sparse.Pairs, n: int, m: int) -> torch.Tensor:
    acts = torch.zeros(n, m)
    for b in range(n):
        slots = slice(int(pairs.starts[b]), int(pairs.starts[b] + pairs.counts[b]))
        acts[b, pairs.cols[slots].long()] = pairs.values[slots]
    return acts


def encoder_of(z: torch.Tensor) -> Encoder:
    """An encoder whose pre-activations are z."""
    sae = build_sae(SAEConfig("topk", z.shape[1], z.shape[1], k=1, apply_b_dec_to_input=False))
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(z.shape[1]))
    return Encoder(sae, z, False, Scratch())


@pytest.mark.parametrize(("m", "k"), [(1024, 32), (1000, 63), (100, 7), (64, 64), (48, 1)])
def test_topk_is_exact(m, k):
    z = torch.randn(300, m, generator=torch.Generator().manual_seed(0))
    values, indices = z.topk(k)
    expected = torch.zeros_like(z).scatter(1, indices, values.relu())
    assert torch.equal(dense(topk_pairs(encoder_of(z), 300, k, Scratch()), 300, m), expected)


@pytest.mark.parametrize(("m", "k"), [(1024, 300 * 32), (1000, 7), (100, 300 * 60), (48, 300 * 48)])
def test_batchtopk_is_exact(m, k):
    z = torch.randn(300, m, generator=torch.Generator().manual_seed(0))
    z[:20] *= 5  # rows that take more than their share
    values, indices = z.relu().flatten().topk(k)
    expected = torch.zeros(z.numel()).scatter(0, indices, values).view_as(z)
    pairs = batchtopk_pairs(encoder_of(z), 300, k, Scratch())
    assert torch.equal(dense(pairs, 300, m), expected)
    assert pairs.least == float(expected[expected > 0].min())


@pytest.mark.parametrize(("times", "taken"), [(0.9, True), (1.0, True), (1.01, False), (0.01, False)])
def test_batchtopk_chooses_the_same_wherever_it_looks_first(times, taken):
    """A bound that is too high finds too few, one that is too low too many to hold; equal values are among them."""
    m, k = 1000, 300 * 7
    z = (torch.randn(300, m, generator=torch.Generator().manual_seed(0)) * 16).round() / 16
    expected, scratch = batchtopk_pairs(encoder_of(z), 300, k, Scratch()), Scratch()
    scratch.bound = times * expected.least
    assert (sparse._guessed_pairs(encoder_of(z), 300, k, m // 16, scratch) is not None) == taken
    scratch.bound = times * expected.least
    pairs = batchtopk_pairs(encoder_of(z), 300, k, scratch)
    assert torch.equal(dense(pairs, 300, m), dense(expected, 300, m)) and pairs.least == expected.least
    assert torch.equal(pairs.cols[:k], expected.cols[:k]) and scratch.bound == sparse.BELOW * pairs.least


@pytest.mark.parametrize("pairs_of", [topk_pairs, batchtopk_pairs])
def test_equal_values_are_not_chosen_twice_over(pairs_of):
    z = torch.ones(300, 100)
    pairs = pairs_of(encoder_of(z), 300, 7 if pairs_of is topk_pairs else 2100, Scratch())
    assert int(pairs.counts.sum()) == 2100 and float(dense(pairs, 300, 100).sum()) == 2100


# -- the update ----------------------------------------------------------------------


@pytest.mark.parametrize("dead", [NO_DEAD, DEAD], ids=["none dead", "some dead"])
def test_the_fused_update_equals_the_plain_one(dead):
    fused, plain = made(), made()
    optimizers = [Optimizer(sae, (0.9, 0.999), 3.0) for sae in (fused, plain)]
    for step in range(5):
        for sae, optimizer, as_is in zip((fused, plain), optimizers, (True, False), strict=True):
            grads = pair_gradients(sae, data(seed=step), terms(dead), Scratch()).grads
            optimizer.step(grads if as_is else dict(grads), lr=1e-2)
    for name in NAMES:
        torch.testing.assert_close(getattr(fused, name), getattr(plain, name), rtol=0, atol=2e-5, msg=name)
    ours, theirs = (optimizer.state() for optimizer in optimizers)
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-6, msg=name)


def test_clipping_goes_through_the_summed_gradients():
    pairs, plain, free = made(), made(), made()
    found = []
    for sae, as_is, clip in ((pairs, True, 1e-3), (plain, False, 1e-3), (free, True, None)):
        optimizer = Optimizer(sae, (0.0, 0.0), 1.0)
        with torch.no_grad():
            sae.b_enc.zero_()
        grads = gradients(sae, data(), terms()).grads
        optimizer.step(grads if as_is else dict(grads), 1e-2, clip)
        moments = [tensor for name, tensor in optimizer.state().items() if name.endswith("exp_avg")]
        norm = torch.cat([tensor.flatten() for tensor in moments]).norm()
        assert norm == pytest.approx(1e-3, rel=1e-3) if clip else norm > 2e-3
        found.append(torch.cat([tensor.flatten() for tensor in sorted(moments, key=len)]))
    assert (found[0] - found[1]).norm() < 1e-3 * found[1].norm()


# -- the same everywhere -------------------------------------------------------------


def trained(architecture: str, precision: str = "fast", **changes) -> SAE:
    sae = made(architecture)
    settings = {"steps": 12, "batch_size": N, "lr": 3e-3, "dead_after_tokens": N} | changes
    train(sae, iter([data(seed=step) for step in range(12)]), TrainConfig(precision=precision, **settings))
    return sae


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "nested"])
def test_any_number_of_threads_gives_the_same_weights_to_the_bit(architecture, threads):
    made = []
    for number in (1, 2, 3):
        threads(number)
        made.append(trained(architecture))
        assert torch.get_num_threads() == number
    assert all(torch.equal(getattr(made[0], name), getattr(other, name)) for other in made[1:] for name in NAMES)


@pytest.mark.skipif(not torch.cpu.get_capabilities().get("avx512_bf16"), reason="no bfloat16 products here")
@pytest.mark.parametrize("kind", ["standard", "gated", "jumprelu"])
def test_dense_steps_too(kind, threads):
    made = []
    for number in (1, 2, 3):
        threads(number)
        sae = build_sae(SAEConfig(kind, D, D_SAE))
        config = TrainConfig(steps=4, batch_size=N, lr=3e-3, dead_after_tokens=N, precision="fast")
        train(sae, iter([data(seed=step) for step in range(4)]), config)
        made.append(torch.cat([tensor.detach().flatten() for tensor in sae.parameters()]))
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "nested"])
def test_without_numba_training_gives_the_same_but_for_rounding(architecture, monkeypatch):
    compiled = trained(architecture, "float32")
    monkeypatch.setattr("training.numerics.gradients.kernels", lambda: None)
    plain = trained(architecture, "float32")
    assert isinstance(gradients(made(), data(), terms()).grads, dict)
    assert not torch.equal(compiled.W_enc, made(architecture).W_enc)
    for name in NAMES:
        difference = (getattr(compiled, name) - getattr(plain, name)).norm()
        assert difference < 1e-3 * getattr(plain, name).norm(), name


def test_the_plain_step_and_the_compiled_one_agree():
    sae, x = made(), data()
    plain, compiled = topk_gradients(sae, x, terms(DEAD)), pair_gradients(sae, x, terms(DEAD), Scratch())
    assert compiled.loss == pytest.approx(plain.loss, rel=1e-5)
    for name in NAMES:
        torch.testing.assert_close(compiled.grads[name], plain.grads[name], rtol=1e-4, atol=1e-6, msg=name)


COMPILE = """
import numpy as np
from training.numerics import kernels
values = np.array([1.0, 3.0, 2.0], dtype=np.float32)
print(float(kernels.keep_largest(np.array([0]), np.array([3]), np.zeros(3, dtype=np.int32), values, 2)),
      sum(kernels.keep_largest.stats.cache_misses.values()), kernels.numba.config.CACHE_DIR)
"""


def test_processes_that_compile_at_once_share_one_folder_outside_the_source(tmp_path):
    root = Path(__file__).parents[3]
    environment = os.environ | {"SAEHUB_DATA": str(tmp_path), "PYTHONPATH": str(root)}
    environment.pop("NUMBA_CACHE_DIR", None)
    children = [
        subprocess.Popen([sys.executable, "-c", COMPILE], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    answers = [child.communicate()[0].split() for child in children]
    for child, answer in zip(children, answers, strict=True):
        assert child.returncode == 0 and answer[0] == "2.0" and Path(answer[2]).is_relative_to(tmp_path)
    assert sorted(answer[1] for answer in answers) == ["0", "0", "1"], "one compiled, the others waited for it"
    again = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=True)
    assert again.stdout.startswith("2.0 0 ")
    assert list(tmp_path.rglob("kernels.keep_largest*.nbi")) and not list((root / "training").rglob("*.nb[ic]"))
