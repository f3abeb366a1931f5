"""What all SAEs share: configs, the way from x to codes and back, normalisation, fresh weights."""

import copy
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor

from saes.numerics.architectures import ENCODER_NORM, build_sae
from saes.numerics.sae import NORMALIZATIONS, SAE, SAEConfig, SAEError

D_IN, D_SAE, K, N = 10, 40, 6, 25


def random_sae(architecture: str, **options) -> SAE:
    """An SAE whose biases are not zero and whose decoder rows are not of unit norm."""
    config = SAEConfig(architecture, D_IN, D_SAE, k=K if architecture == "topk" else None, **options)
    sae = build_sae(config).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in sae.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return sae


@pytest.fixture
def x() -> Tensor:
    return 3 * torch.randn(N, D_IN, generator=torch.Generator().manual_seed(2)) + 1


def test_config_fills_in_d_out_and_can_be_copied():
    config = SAEConfig("standard", 4, 8, metadata={"dataset_path": "c4"})
    assert config.d_out == 4
    assert replace(config, d_sae=16).d_out == 4
    assert SAEConfig(**asdict(config)) == config == copy.deepcopy(config)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"d_in": 0}, "d_in must be a whole number of at least 1, but is 0"),
        ({"d_sae": True}, "d_sae must be"),
        ({"d_sae": "8"}, "d_sae must be"),
        ({"d_out": -1}, "d_out must be"),
        ({"d_out": 5}, "apply_b_dec_to_input needs d_out to equal d_in"),
        ({"normalize_activations": "sqrt_magic"}, "'sqrt_magic'.*must be one of none, "),
    ],
)
def test_config_refuses_nonsense(wrong, sentence):
    with pytest.raises(SAEError, match=sentence):
        SAEConfig(**({"architecture": "standard", "d_in": 4, "d_sae": 8} | wrong))


@pytest.mark.parametrize("architecture", ["standard", "topk"])
def test_b_dec_is_subtracted_only_when_the_config_says_so(architecture, x):
    sae = random_sae(architecture)
    torch.testing.assert_close(sae.pre_activations(x), (x - sae.b_dec) @ sae.W_enc + sae.b_enc)
    plain = random_sae(architecture, apply_b_dec_to_input=False)
    torch.testing.assert_close(plain.pre_activations(x), x @ plain.W_enc + plain.b_enc)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("architecture", ["standard", "topk"])
def test_sparse_codes_say_the_same_as_dense_ones(architecture, normalization, x):
    sae = random_sae(architecture, normalize_activations=normalization)
    acts = sae.encode(x)
    values, indices = sae.encode_sparse(x)
    assert indices.dtype == torch.int64
    assert torch.equal(torch.zeros_like(acts).scatter_add(-1, indices, values), acts)
    assert bool((values.diff(dim=-1) <= 0).all()), "largest first"
    assert bool((indices[values == 0] == 0).all())
    torch.testing.assert_close(sae.decode_sparse(values, indices, x), sae.decode(acts, x))
    torch.testing.assert_close(sae(x), sae.decode(acts, x))


def test_relu_codes_are_padded_to_the_largest_l0(x):
    sae = random_sae("standard")
    values, _ = sae.encode_sparse(x)
    assert values.shape[1] == int((sae.encode(x) > 0).sum(1).max())


def test_no_rows_and_no_firing_feature(x):
    sae = random_sae("standard")
    for rows in (x[:0], x):
        sae.b_enc.fill_(-1e4)
        values, indices = sae.encode_sparse(rows)
        assert values.shape == indices.shape == (len(rows), 0)
        torch.testing.assert_close(sae.decode_sparse(values, indices), sae.b_dec.expand(len(rows), -1))


@pytest.mark.parametrize("architecture", ["standard", "topk"])
def test_leading_dimensions_are_kept(architecture, x):
    sae = random_sae(architecture)
    batch = x[:24].view(2, 3, 4, D_IN)
    torch.testing.assert_close(sae(batch).view(24, D_IN), sae(x[:24]))
    values, indices = sae.encode_sparse(batch)
    torch.testing.assert_close(sae.decode_sparse(values, indices), sae(batch))


def test_input_of_another_width_is_refused(x):
    with pytest.raises(SAEError, match="reads vectors of 10 numbers, but was given vectors of 9"):
        random_sae("standard").encode(x[:, :9])


def test_input_in_half_precision_gives_results_in_the_weights_own(x):
    sae = random_sae("topk")
    assert sae(x.bfloat16()).dtype == torch.float32
    assert sae.to(torch.bfloat16)(x).dtype == torch.bfloat16


def test_constant_norm_rescale_scales_every_row_to_the_norm_sqrt_d(x):
    sae = random_sae("standard", normalize_activations="constant_norm_rescale")
    plain = random_sae("standard")
    norms = x.norm(dim=1, keepdim=True)
    torch.testing.assert_close(sae.encode(x), plain.encode(x / norms * D_IN**0.5))
    torch.testing.assert_close(sae(x), plain(x / norms * D_IN**0.5) * norms / D_IN**0.5)
    torch.testing.assert_close(sae(7 * x), 7 * sae(x), rtol=1e-3, atol=1e-3)
    assert bool(sae(torch.zeros_like(x)).isfinite().all())


def test_layer_norm_ignores_shift_and_scale_of_a_row(x):
    sae = random_sae("standard", normalize_activations="layer_norm")
    torch.testing.assert_close(sae.encode(5 * x + 2), sae.encode(x), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(sae(5 * x + 2), 5 * sae(x) + 2, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_a_change_of_one_code_moves_the_output_by_scale_times_its_decoder_row(normalization, x):
    sae = random_sae("standard", normalize_activations=normalization)
    acts = sae.encode(x)
    moved = acts.clone()
    moved[:, 7] += 0.5
    scale = sae.decoder_scale(x)
    step = 0.5 * sae.W_dec[7] * (1 if scale is None else scale)
    torch.testing.assert_close(sae.decode(moved, x) - sae.decode(acts, x), step.expand(N, -1), rtol=1e-4, atol=1e-4)


def test_decoding_without_x_is_refused_where_rows_were_normalised(x):
    sae = random_sae("standard", normalize_activations="layer_norm")
    with pytest.raises(SAEError, match=r"call decode\(acts, x\)"):
        sae.decode(sae.encode(x))


def test_fresh_sae_has_unit_decoder_rows_and_a_tied_encoder():
    sae = build_sae(SAEConfig("topk", D_IN, D_SAE, k=K), seed=3)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    torch.testing.assert_close(sae.W_enc, ENCODER_NORM * sae.W_dec.T)
    assert not sae.b_enc.any() and not sae.b_dec.any()
    assert torch.equal(sae.W_dec, build_sae(sae.config, seed=3).W_dec)
    assert not torch.equal(sae.W_dec, build_sae(sae.config, seed=4).W_dec)


def test_fresh_sae_with_another_target_width():
    sae = build_sae(SAEConfig("standard", D_IN, D_SAE, d_out=7, apply_b_dec_to_input=False))
    assert sae(torch.randn(3, D_IN)).shape == (3, 7)
    torch.testing.assert_close(sae.W_enc.norm(dim=0), torch.full((D_SAE,), ENCODER_NORM))


@pytest.mark.parametrize("architecture", ["standard", "topk"])
def test_every_parameter_gets_a_gradient(architecture, x):
    sae = build_sae(SAEConfig(architecture, D_IN, D_SAE, k=K if architecture == "topk" else None))
    sae(x).pow(2).sum().backward()
    for name, parameter in sae.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), name


def test_an_sae_beyond_all_memory_is_refused_in_one_sentence():
    with pytest.raises(SAEError, match="does not fit into the memory of cpu; choose fewer features"):
        build_sae(SAEConfig("standard", 2**20, 2**28))


def test_unknown_architecture_names_the_known_ones():
    with pytest.raises(SAEError, match="'quantum' is not supported, only standard, topk"):
        build_sae(SAEConfig("quantum", D_IN, D_SAE))
