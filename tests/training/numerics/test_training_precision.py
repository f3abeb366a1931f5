"""Products in bfloat16 through torch.autocast, where no kernels compute the step; weights and sums stay float32."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from saes.numerics.sae import SAE
from tests.training.numerics.test_training_initial import an_sae, batches, rows
from tests.training.numerics.test_training_ranks import CASES, trained
from training.numerics.gradients import gradients
from training.numerics.losses import LOSSES, Terms
from training.numerics.train import TrainConfig, train

KINDS = ("topk", "batchtopk", "matryoshka", "standard", "gated", "jumprelu")
TERMS = Terms(dead=torch.arange(5), aux=0.03, l1=0.3, l0=0.01, target_l0=6.0, variance=2.0)


@pytest.fixture
def plain(monkeypatch: Any) -> None:
    """As where numba is not installed, or on a GPU."""
    monkeypatch.setattr("training.numerics.gradients.kernels", lambda: None)


def distance(found: Any, exact: Any) -> float:
    return max(float((found[name] - exact[name]).norm() / exact[name].norm().clamp_min(1e-12)) for name in exact)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradients_are_those_of_float32_but_for_rounding(kind: str, plain: None) -> None:
    x, sae = rows(512), an_sae(kind)
    sae.b_dec.data = x.mean(0)
    exact, half = gradients(sae, x, TERMS), gradients(sae, x, replace(TERMS, autocast=True))
    assert 0 < distance(half.grads, exact.grads) < 0.1, "rounded, and no more than that"
    assert half.loss == pytest.approx(exact.loss, rel=0.02)
    assert all(grad.dtype == torch.float32 for grad in half.grads.values())
    assert gradients(sae, x, TERMS).loss == exact.loss, "nothing of it is left switched on"


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_what_float32_learns(kind: str, plain: None) -> None:
    x, reached = rows(256 * 40), {}
    for precision in ("float32", "bfloat16"):
        config = TrainConfig(
            steps=40, batch_size=256, lr=3e-3, precision=precision, l1_coefficient=0.1, l0_coefficient=0.01
        )
        result = train(an_sae(kind), batches(x), config, held_out=x[:512])
        reached[precision] = result.history[-1].held_out_explained_variance
    assert reached["bfloat16"] == pytest.approx(reached["float32"], abs=0.03)
    assert reached["bfloat16"] > 0.1


def test_autocast_is_on_while_the_loss_is_computed_and_only_when_asked(plain: None, monkeypatch: Any) -> None:
    seen: list[bool] = []
    loss = LOSSES["standard"]

    def looked(sae: SAE, made: Any, terms: Terms) -> Any:
        seen.append(torch.is_autocast_enabled("cpu"))
        return loss(sae, made, terms)

    monkeypatch.setitem(LOSSES, "standard", looked)
    for precision in ("fast", "float32", "bfloat16"):
        train(an_sae("standard"), batches(rows(256)), TrainConfig(steps=1, batch_size=256, precision=precision))
    assert seen == [False, False, True]
    assert not torch.is_autocast_enabled("cpu")


def test_a_resumed_run_ends_the_same_to_the_bit(plain: None, tmp_path: Any) -> None:
    x = rows()
    config = TrainConfig(steps=12, batch_size=256, precision="bfloat16", checkpoint_every=5)
    whole, halves = an_sae("topk"), an_sae("topk")
    train(whole, batches(x), config)
    asked = iter([False] * 7 + [True])
    train(halves, batches(x), config, checkpoint_dir=tmp_path, should_stop=lambda: next(asked))
    halves = an_sae("topk")
    train(halves, batches(x), config, checkpoint_dir=tmp_path)
    assert torch.equal(whole.W_enc, halves.W_enc) and torch.equal(whole.W_dec, halves.W_dec)


def test_a_transcoder_learns_in_bfloat16(plain: None) -> None:
    x = torch.randn(64 * 30, CASES["transcoder"][0]["d_in"] + 4, generator=torch.Generator().manual_seed(0))
    x[:, -4:] = x[:, :4] * 2
    exact, half = (
        trained("transcoder", x.clone(), precision=precision).history[-1] for precision in ("float32", "bfloat16")
    )
    assert exact.loss != half.loss == pytest.approx(exact.loss, rel=0.3)
