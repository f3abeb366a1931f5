"""Losses against numpy, the sparse TopK step against autograd, and the fast topk against torch's."""

import dataclasses

import numpy as np
import pytest
import torch

from saes.numerics.architectures import build_sae
from saes.numerics.sae import SAE, SAEConfig
from training.numerics.dead_features import auxk
from training.numerics.gradients import autograd_gradients, gradients
from training.numerics.losses import Terms, l1_penalty, squared_error, variance
from training.numerics.topk_plain import topk, topk_codes, topk_gradients

D, D_SAE, K, N = 24, 160, 5, 200
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


def made(architecture: str = "topk", **options) -> SAE:
    sae = build_sae(SAEConfig(architecture, D, D_SAE, k=K if architecture == "topk" else None, **options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for bias in (sae.b_enc, sae.b_dec):
            bias.copy_(0.3 * torch.randn(bias.shape, generator=generator))
    return sae


def data(n: int = N) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return 3 * torch.randn(n, D, generator=generator) + torch.randn(D, generator=generator)


NO_DEAD = torch.empty(0, dtype=torch.int64)
DEAD = torch.tensor([3, 4, 17, 99, 158])


def terms(dead: torch.Tensor = NO_DEAD, **changes) -> Terms:
    return dataclasses.replace(Terms(dead, scale=2.5, variance=210.0, l1=3.0, aux=1 / 32), **changes)


# -- formulas ------------------------------------------------------------------------


def test_formulas_against_numpy():
    x, x_hat, acts, W = (torch.randn(*shape) for shape in ((7, D), (7, D), (7, D_SAE), (D_SAE, D)))
    a, b = x.double().numpy(), x_hat.double().numpy()
    assert float(squared_error(x_hat, x)) == pytest.approx(((a - b) ** 2).sum(1).mean(), rel=1e-5)
    assert float(variance(x)) == pytest.approx(a.var(0).sum(), rel=1e-5)
    norms = np.linalg.norm(W.numpy(), axis=1)
    assert float(l1_penalty(acts, W)) == pytest.approx((np.abs(acts.numpy()) @ norms).mean(), rel=1e-5)


@pytest.mark.parametrize("m", [3, 12, 40])  # fewer dead features than k_aux = 12, as many, more
def test_auxk_against_numpy(m):
    error, z, W = (torch.randn(*shape, dtype=torch.float64) for shape in ((9, D), (9, m), (m, D)))
    k_aux = 12
    f = np.zeros((9, m))
    for row in range(9):
        best = np.argsort(z[row].numpy())[::-1][:k_aux]
        f[row, best] = z[row].numpy()[best]
    e = error.numpy()
    expected = min(m / k_aux, 1) * ((e - f @ W.numpy()) ** 2).sum() / (e**2).sum()
    assert float(auxk(error, z, W, k_aux)) == pytest.approx(expected, rel=1e-12)


def test_auxk_by_norm_chooses_what_adds_most():
    error, z = torch.tensor([[0.0, 6.0]]), torch.tensor([[3.0, 2.0]])
    W = torch.tensor([[1.0, 0.0], [0.0, 3.0]])  # the second feature has the smaller code, and adds twice as much
    assert float(auxk(error, z, W, 1)) == pytest.approx((3**2 + 6**2) / 6**2)
    assert float(auxk(error, z, W, 1, by_norm=True)) == pytest.approx(0)


def test_auxk_of_dead_features_that_explain_the_error_is_zero():
    W = torch.eye(D)
    error = torch.rand(9, D).sub(0.5)
    error[:, D // 2 :] = 0
    assert float(auxk(error, error[:, : D // 2], W[: D // 2], D // 2)) == pytest.approx(0, abs=1e-12)


def test_the_losses_are_the_documented_ones():
    x = data()
    sae = made("standard")
    parts = autograd_gradients(sae, x, terms()).parts
    acts = sae.encode(x).detach()
    error = (sae.decode(acts) - x).square().sum(-1).mean().detach()
    assert parts["mse"] == pytest.approx(float(error) / 2.5**2, rel=1e-5)
    assert parts["l1"] == pytest.approx(
        3.0 * float((acts * sae.W_dec.detach().norm(dim=1)).sum(-1).mean()) / 2.5, rel=1e-5
    )
    sae = made("topk")
    outcome = topk_gradients(sae, x, terms())
    assert outcome.parts == {"fvu": pytest.approx(float((sae(x) - x).detach().square().sum(-1).mean()) / 210, rel=1e-5)}
    assert outcome.loss == sum(outcome.parts.values())
    assert torch.equal(outcome.fired, (sae.encode(x) > 0).sum(0))


# -- gradients -----------------------------------------------------------------------


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("dead", [NO_DEAD, DEAD], ids=["none dead", "some dead"])
@pytest.mark.parametrize("n", [N, 1])
def test_the_sparse_step_equals_autograd(centred, dead, n):
    sae, x = made(apply_b_dec_to_input=centred), data(n)
    reference, sparse = autograd_gradients(sae, x, terms(dead)), topk_gradients(sae, x, terms(dead))
    assert sparse.parts == pytest.approx(reference.parts, rel=1e-5)
    assert ("aux" in sparse.parts) == bool(len(dead))
    assert torch.equal(sparse.fired, reference.fired)
    assert sparse.squared_error == pytest.approx(reference.squared_error, rel=1e-5)
    for name in NAMES:
        size = reference.grads[name].norm()
        assert size > 0, name
        assert (sparse.grads[name] - reference.grads[name]).norm() < 1e-5 * size, name


def test_rows_with_fewer_than_k_positive_features():
    sae, x = made(), data()
    with torch.no_grad():
        sae.b_enc.sub_(5)
    reference, sparse = autograd_gradients(sae, x, terms()), topk_gradients(sae, x, terms())
    assert 0 < int(sparse.fired.sum()) < K * N and torch.equal(sparse.fired, reference.fired)
    for name in NAMES:
        assert (sparse.grads[name] - reference.grads[name]).norm() <= 1e-5 * reference.grads[name].norm(), name


@pytest.mark.parametrize("architecture", ["topk", "standard"])
def test_gradients_against_finite_differences(architecture):
    sae, x = made(architecture).double(), data(40).double()
    given = terms(aux=0.0)
    outcome = gradients(sae, x, given)
    generator = torch.Generator().manual_seed(0)
    for name in NAMES:
        tensor = getattr(sae, name).data
        direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        grad = outcome.grads[name].t() if name == "W_enc" else outcome.grads[name]
        losses = []
        for sign in (1, -1):
            tensor.add_(direction, alpha=sign * 1e-7)
            losses.append(gradients(sae, x, given).loss)
            tensor.sub_(direction, alpha=sign * 1e-7)
        assert (losses[0] - losses[1]) / 2e-7 == pytest.approx(float((grad * direction).sum()), rel=1e-4), name


@pytest.mark.parametrize("architecture", ["topk", "standard"])
def test_the_dead_term_reaches_only_dead_features(architecture):
    sae, x = made(architecture), data()
    without, with_dead = (gradients(sae, x, terms(DEAD, aux=aux)) for aux in (0.0, 1 / 32))
    live = torch.ones(D_SAE, dtype=torch.bool)
    live[DEAD] = False
    for name in ("W_enc", "b_enc", "W_dec"):
        change = (with_dead.grads[name] - without.grads[name]).flatten(1) if name != "b_enc" else None
        change = change if change is not None else (with_dead.grads[name] - without.grads[name]).unsqueeze(1)
        assert (change[live] == 0).all() and (change[DEAD].norm(dim=1) > 0).all(), name
    assert torch.equal(with_dead.grads["b_dec"], without.grads["b_dec"])


def test_the_result_is_reproducible():
    sae, x = made(), data()
    first, second = (topk_gradients(sae, x, terms(DEAD)) for _ in range(2))
    assert all(torch.equal(first.grads[name], second.grads[name]) for name in NAMES)


# -- the choice of k -----------------------------------------------------------------


@pytest.mark.parametrize(("m", "k"), [(4608, 32), (1024, 63), (1024, 64), (100, 7), (64, 64), (48, 1)])
def test_two_stage_topk_is_exact(m, k):
    z = torch.randn(50, m, generator=torch.Generator().manual_seed(0))
    values, indices = topk(z, k)
    expected = z.topk(k, dim=-1)
    order = values.argsort(dim=-1, descending=True)
    assert torch.equal(values.gather(1, order), expected.values)
    assert torch.equal(indices.gather(1, order), expected.indices)


def test_codes_in_chunks_are_those_of_the_sae(monkeypatch):
    monkeypatch.setattr("training.numerics.topk_plain.CHUNK_ROWS", 64)
    sae, x = made(), data()
    with torch.no_grad():
        values, indices = topk_codes(x - sae.b_dec, sae.W_enc, sae.b_enc, K)
        acts = torch.zeros(N, D_SAE).scatter(1, indices, values.relu())
        torch.testing.assert_close(acts, sae.encode(x))
