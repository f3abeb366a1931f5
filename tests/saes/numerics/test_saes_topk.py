"""TopK against a plain Python reading of its equation."""

import pytest
import torch

from saes.numerics.architectures import build_sae
from saes.numerics.sae import SAEConfig, SAEError


def naive_topk(z: list[float], k: int) -> list[float]:
    largest = sorted(range(len(z)), key=lambda i: z[i], reverse=True)[:k]
    return [z[i] if i in largest and z[i] > 0 else 0.0 for i in range(len(z))]


@pytest.mark.parametrize("k", [1, 5, 32])
@pytest.mark.parametrize("bias", [0.0, -4.0])
def test_codes_equal_the_naive_reading(k, bias):
    torch.manual_seed(0)
    sae = build_sae(SAEConfig("topk", 8, 32, k=k)).requires_grad_(False)
    sae.b_enc.fill_(bias)
    x = 4 * torch.randn(20, 8)
    expected = [naive_topk(row, k) for row in sae.pre_activations(x).tolist()]
    assert sae.encode(x).tolist() == expected


def test_fewer_than_k_fire_when_too_few_are_positive():
    sae = build_sae(SAEConfig("topk", 8, 32, k=10)).requires_grad_(False)
    sae.b_enc.fill_(-100)
    sae.b_enc[3] = 50
    values, indices = sae.encode_sparse(torch.randn(4, 8))
    assert values.shape == (4, 10)
    assert bool((values > 0).sum(1).eq(1).all())
    assert indices[:, 0].tolist() == [3] * 4
    assert not indices[:, 1:].any()


@pytest.mark.parametrize(
    ("k", "sentence"),
    [
        (None, "needs k"),
        (0, "k must be a whole number of at least 1, but is 0"),
        (2.0, "k must be"),
        (True, "k must be"),
        (33, "k is 33, but this SAE has only 32 features"),
    ],
)
def test_impossible_k_is_refused(k, sentence):
    with pytest.raises(SAEError, match=sentence):
        build_sae(SAEConfig("topk", 8, 32, k=k))
