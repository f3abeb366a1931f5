"""Losses and gradients against SAELens' own training classes on copied weights (tests/golden/make_training_golden.py)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from saes.numerics.architectures import build_sae
from saes.numerics.sae import SAE, SAEConfig, SAEError
from training.numerics.gradients import autograd_gradients
from training.numerics.losses import Terms, forward_pass

GOLDEN = load_file(Path(__file__).parents[2] / "golden" / "training.safetensors")
CASES = {
    "gated": ("gated", {}, {"l1": 0.7}),
    "jumprelu": ("jumprelu", {}, {"l0": 0.3, "bandwidth": 0.5}),
    "jumprelu_target": ("jumprelu", {}, {"l0": 0.2, "bandwidth": 0.5, "target_l0": 4.0}),
    "batchtopk": ("batchtopk", {"k": 3}, {}),
    "matryoshka": ("batchtopk", {"k": 3, "options": {"matryoshka_widths": [6, 12, 24]}}, {}),
}


def sae_and_terms(case: str) -> tuple[SAE, Terms]:
    architecture, options, coefficients = CASES[case]
    sae = build_sae(SAEConfig(architecture, 8, 24, **options))
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if f"{case}.{name}" in GOLDEN:
                parameter.copy_(GOLDEN[f"{case}.{name}"])
    return sae, Terms(torch.empty(0, dtype=torch.int64), **coefficients)


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_saelens(case):
    sae, terms = sae_and_terms(case)
    x = GOLDEN[f"{case}.x"]
    assert torch.equal(forward_pass(sae, x, terms).acts != 0, GOLDEN[f"{case}.acts"] != 0)
    outcome = autograd_gradients(sae, x, terms)
    assert outcome.loss == pytest.approx(float(GOLDEN[f"{case}.loss"]), rel=1e-5)
    for name, grad in outcome.grads.items():
        expected = GOLDEN[f"{case}.grad.{name}"]
        expected = expected.t() if name == "W_enc" else expected
        assert expected.norm() > 0 and (grad - expected).norm() < 1e-5 * expected.norm(), name


def test_the_parts_add_up_to_what_each_is_called():
    sae, terms = sae_and_terms("matryoshka")
    parts = autograd_gradients(sae, GOLDEN["matryoshka.x"], terms).parts
    assert parts["fvu"] == pytest.approx(float(GOLDEN["matryoshka.loss.mse_loss"]), rel=1e-5)
    inner = sum(float(GOLDEN[f"matryoshka.loss.inner_mse_loss_{width}"]) for width in (6, 12))
    assert parts["prefixes"] == pytest.approx(inner, rel=1e-5)


@pytest.mark.parametrize("widths", [[12, 6, 24], [6, 12], [6, 6, 24], ["6", 24], [0, 24], 24])
def test_widths_that_cannot_be_are_refused(widths):
    with pytest.raises(SAEError, match="must be whole numbers that rise to d_sae"):
        build_sae(SAEConfig("batchtopk", 8, 24, k=3, options={"matryoshka_widths": widths}))
