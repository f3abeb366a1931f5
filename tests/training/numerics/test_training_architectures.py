"""Training of the architectures beside TopK and ReLU: they learn, resume to the bit, and their thresholds mean something."""

from pathlib import Path

import pytest
import torch

from saes.numerics.architectures import build_sae
from saes.numerics.sae import SAE, SAEConfig
from saes.numerics.topk import BatchTopKSAE
from training.numerics.reconstruction import explained_variance
from training.numerics.train import TrainConfig, train

D, D_SAE, K = 16, 64, 3
DICTIONARY = torch.nn.functional.normalize(torch.randn(48, D, generator=torch.Generator().manual_seed(0)), dim=1)
KINDS = {
    "batchtopk": {"k": K},
    "matryoshka": {"k": K, "options": {"matryoshka_widths": [16, 32, D_SAE]}},
    "jumprelu": {},
    "gated": {},
}


def rows(n: int, seed: int = 0, scale: float = 4.0) -> torch.Tensor:
    """Activations made of 3 of 48 directions each, off centre."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(n, 48, generator=generator).topk(3, dim=1).indices
    codes = torch.zeros(n, 48).scatter_(1, chosen, 1 + torch.rand(n, 3, generator=generator))
    return scale * (codes @ DICTIONARY + 0.5)


def made(kind: str) -> SAE:
    return build_sae(SAEConfig("batchtopk" if kind == "matryoshka" else kind, D, D_SAE, **KINDS[kind]))


def config(**changes) -> TrainConfig:
    return TrainConfig(**{"steps": 40, "batch_size": 64, "lr": 3e-3, "log_every": 5} | changes)


def stream(scale: float = 4.0):
    x = rows(20_000, 0, scale)
    return lambda start: iter(x[start:].split(64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 200.0])
def test_it_learns_at_any_scale_of_the_activations(kind, scale):
    sae, held_out = made(kind), rows(512, 1, scale)
    before = explained_variance(sae, held_out)
    train(sae, stream(scale), config(steps=300, l1_coefficient=0.3, l0_coefficient=0.1))
    assert explained_variance(sae, held_out) > 0.75 > before
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_equals_an_uninterrupted_one_to_the_bit(kind, tmp_path: Path):
    whole, parts, resumed = (made(kind) for _ in range(3))
    settings = config(checkpoint_every=8, dead_after_tokens=64)
    train(whole, stream(), settings, checkpoint_dir=tmp_path / "whole")
    asked = iter(range(100))
    train(parts, stream(), settings, checkpoint_dir=tmp_path / "parts", should_stop=lambda: next(asked) >= 21)
    train(resumed, stream(), settings, checkpoint_dir=tmp_path / "parts")
    for name, tensor in whole.named_parameters():
        assert torch.equal(tensor, resumed.get_parameter(name)), name
    assert not torch.equal(whole.W_dec, parts.W_dec)


@pytest.mark.parametrize("kind", ["batchtopk", "matryoshka"])
def test_the_threshold_keeps_about_k_features_a_row(kind):
    sae = made(kind)
    train(sae, stream(), config(steps=300))
    assert isinstance(sae, BatchTopKSAE)
    x = rows(2000, 1)
    alone = sae.for_inference()
    l0 = float((alone.encode(x) > 0).sum(1).float().mean())
    assert l0 == pytest.approx(K, rel=0.15)
    assert explained_variance(alone, x) == pytest.approx(explained_variance(sae, x), abs=0.05)
    assert torch.equal(alone.encode(x[:5]), alone.encode(x)[:5])  # a row's codes no longer depend on its neighbours


def test_a_nested_sae_explains_more_with_its_first_features():
    """The same first 16 features, of an SAE trained to need all of them and of one trained to be cut."""
    x = rows(2000, 1)
    found = {}
    for kind in ("batchtopk", "matryoshka"):
        sae = made(kind)
        train(sae, stream(), config(steps=300))
        with torch.no_grad():
            x_hat = sae.encode(x)[:, :16] @ sae.W_dec[:16] + sae.b_dec
        found[kind] = 1 - float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum())
    assert found["matryoshka"] > found["batchtopk"] + 0.05


def test_a_stronger_penalty_or_a_smaller_target_gives_a_smaller_l0():
    def l0(**changes) -> float:
        sae = made("jumprelu")
        train(sae, stream(), config(steps=300, **changes))
        return float((sae.encode(rows(500, 1)) > 0).sum(1).float().mean())

    assert l0(l0_coefficient=0.0) > l0(l0_coefficient=3.0)
    assert abs(l0(l0_coefficient=3.0, target_l0=6.0) - 6.0) < abs(l0(l0_coefficient=0.0) - 6.0)
