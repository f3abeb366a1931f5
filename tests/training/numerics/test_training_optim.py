"""The optimiser against torch's Adam with the decoder's constraint written out, and the schedules."""

import pytest
import torch

from saes.numerics.architectures import build_sae
from saes.numerics.sae import SAE, SAEConfig
from training.numerics.optim import Optimizer, matmul_precision, ramp, remove_parallel

D, D_SAE = 12, 40
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


def made() -> SAE:
    return build_sae(SAEConfig("standard", D, D_SAE))


def random_grads(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (D_SAE, D), "b_enc": (D_SAE,), "W_dec": (D_SAE, D), "b_dec": (D,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_steps_equal_adam_with_the_constraint_written_out():
    sae, plain = made(), made()
    optimizer = Optimizer(sae, (0.9, 0.999), bias_scale=3.0)
    weights, biases = [plain.W_enc, plain.W_dec], [plain.b_enc, plain.b_dec]
    adam = torch.optim.Adam([{"params": weights}, {"params": biases, "lr": 3e-3}], lr=1e-3, foreach=False)
    for step in range(5):
        optimizer.step(random_grads(step), lr=1e-3)
        grads = random_grads(step)
        with torch.no_grad():
            along = (grads["W_dec"] * plain.W_dec).sum(1, keepdim=True)
            grads["W_dec"] -= along * plain.W_dec / plain.W_dec.norm(dim=1, keepdim=True) ** 2
        for name in NAMES:
            getattr(plain, name).grad = grads[name].t() if name == "W_enc" else grads[name]
        adam.step()
        with torch.no_grad():
            plain.W_dec.div_(plain.W_dec.norm(dim=1, keepdim=True))
    optimizer.release()
    for name in NAMES:
        torch.testing.assert_close(getattr(sae, name), getattr(plain, name), rtol=0, atol=2e-6)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))


def test_the_layout_while_training_is_invisible_from_outside():
    sae, x = made(), torch.randn(3, D)
    before = sae(x)
    optimizer = Optimizer(sae, (0.9, 0.999), 1.0)
    assert sae.W_enc.shape == (D, D_SAE) and sae.W_enc.t().is_contiguous()
    torch.testing.assert_close(sae(x), before)
    optimizer.step(random_grads(0), lr=1e-2)
    assert not torch.allclose(sae(x), before)
    optimizer.release()
    assert sae.W_enc.is_contiguous()


def test_state_round_trip_continues_identically():
    first = made()
    optimizer = Optimizer(first, (0.9, 0.999), 2.0)
    optimizer.step(random_grads(0), lr=1e-2)
    second = made()
    second.load_state_dict(first.state_dict())
    other = Optimizer(second, (0.9, 0.999), 2.0)
    other.load_state({name: tensor.clone() for name, tensor in optimizer.state().items()})
    for one in (optimizer, other):
        one.step(random_grads(1), lr=1e-2)
    assert all(torch.equal(getattr(first, name), getattr(second, name)) for name in NAMES)


def test_clipping_bounds_the_norm_of_all_gradients_together():
    optimizer = Optimizer(made(), (0.9, 0.999), 1.0)
    grads = random_grads(0)
    optimizer.step(grads, lr=0.0, clip=0.5)
    assert float(torch.cat([g.flatten() for g in grads.values()]).norm()) == pytest.approx(0.5, rel=1e-4)


def test_remove_parallel_leaves_what_is_perpendicular():
    W = torch.nn.functional.normalize(torch.randn(D_SAE, D), dim=1)
    grad = torch.randn(D_SAE, D)
    result = remove_parallel(grad.clone(), W)
    torch.testing.assert_close((result * W).sum(1), torch.zeros(D_SAE), atol=1e-5, rtol=0)
    torch.testing.assert_close(result + (grad * W).sum(1, keepdim=True) * W, grad)


def test_ramp():
    assert [ramp(step, 10, 0.4, 0.2) for step in range(10)] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 0.5])
    assert [ramp(step, 3, 0.0) for step in range(3)] == [1, 1, 1]
    assert all(0 < ramp(step, 7, 1.0, 1.0) <= 1 for step in range(7))


def test_matmul_precision_is_put_back():
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    with pytest.raises(KeyError), matmul_precision("fast"):
        raise KeyError
    assert setting.fp32_precision == before
    with matmul_precision("float32"):
        assert setting.fp32_precision == before


def test_fast_products_are_close_where_the_processor_has_bfloat16():
    x, W = torch.randn(512, 256), torch.randn(256, 512)
    exact = x @ W
    with matmul_precision("fast"):
        fast = x @ W
    assert (fast - exact).norm() < 0.01 * exact.norm()
    if torch.cpu.get_capabilities().get("avx512_bf16"):
        assert not torch.equal(fast, exact)
