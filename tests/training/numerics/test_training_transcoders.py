"""Training of transcoders: losses against second implementations, the kernels against autograd, what they learn, their
units, resuming, saving."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import normalize

from saes.numerics.architectures import build_sae
from saes.numerics.formats import load_sae, save_sae
from saes.numerics.sae import SAE, SAEConfig
from training.numerics.checkpoint import TrainingError
from training.numerics.gradients import autograd_gradients, gradients
from training.numerics.losses import Terms
from training.numerics.optim import matmul_precision
from training.numerics.reconstruction import ExplainedVariance
from training.numerics.row_gradients import PairGradients, SummedGradients
from training.numerics.shards import CaptureError
from training.numerics.stream import StreamedCapture
from training.numerics.topk_plain import topk_gradients
from training.numerics.train import TrainConfig, train
from training.numerics.transcoding import Units, sides

GOLDEN = load_file(Path(__file__).parents[2] / "golden" / "transcoders.safetensors")
KINDS = ("topk_transcoder", "topk_skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
D, D_OUT, D_SAE, K = 16, 12, 64, 3
READ = torch.eye(D)
WRITTEN = normalize(torch.randn(D, D_OUT, generator=torch.Generator().manual_seed(1)), dim=1)
LINEAR = torch.randn(D, D_OUT, generator=torch.Generator().manual_seed(2))


def rows(n: int, seed: int = 0, read: float = 4.0, written: float = 0.5, linear: float = 0.0) -> torch.Tensor:
    """x of 2 of 16 directions each, beside what each direction writes elsewhere, off centre; (n, D + D_OUT)."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(n, D, generator=generator).topk(2, dim=1).indices
    codes = torch.zeros(n, D).scatter_(1, chosen, 1 + torch.rand(n, 2, generator=generator))
    x = codes @ READ
    return torch.cat([read * (x + 0.5), written * ((codes > 1.3) * codes @ WRITTEN + linear * x @ LINEAR - 0.3)], dim=1)


def made(kind: str, **changes) -> SAE:
    given = {"d_out": D_OUT, "k": K if "topk" in kind else None, "apply_b_dec_to_input": False, "hook_name_out": "out"}
    return build_sae(SAEConfig(kind, D, D_SAE, **given | changes))


def config(**changes) -> TrainConfig:
    return TrainConfig(**{"steps": 40, "batch_size": 64, "lr": 3e-3, "log_every": 20, "l0_coefficient": 0.05} | changes)


def stream(**changes):
    x = rows(64 * 250, **changes)
    return lambda start: iter(x[start:].split(64))


def explained(sae: SAE, held_out: torch.Tensor) -> float:
    """Of the output, by the SAE's own forward in the language model's space."""
    x, goal = sides(sae, held_out)
    running = ExplainedVariance()
    with torch.no_grad():
        running.add(goal, sae(x))
    return running.value


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_sparsify_and_saelens(kind):
    golden = {name.removeprefix(f"{kind}."): tensor for name, tensor in GOLDEN.items() if name.startswith(f"{kind}.")}
    x, y = golden["x"], golden["y"]
    sae = build_sae(
        SAEConfig(kind, x.shape[1], 24, d_out=y.shape[1], k=3 if "topk" in kind else None, apply_b_dec_to_input=False)
    )
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(golden[name])
    spread = float((y - y.mean(0)).square().sum(-1).mean())
    terms = Terms(torch.empty(0, dtype=torch.int64), variance=spread, l0=0.3, bandwidth=0.5)
    outcome = autograd_gradients(sae, torch.cat([x, y], dim=1), terms)
    assert outcome.loss == pytest.approx(float(golden["loss"]), rel=1e-5)
    assert set(outcome.grads) == {name.removeprefix("grad.") for name in golden if name.startswith("grad.")}
    for name, grad in outcome.grads.items():
        expected = golden[f"grad.{name}"].t() if name == "W_enc" else golden[f"grad.{name}"]
        assert expected.norm() > 0 and (grad - expected).norm() < 1e-5 * expected.norm(), name


def near(found, expected, most: float) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert tensor.norm() > 0 and (found[name] - tensor).norm() < most * tensor.norm(), name


@pytest.mark.parametrize("kind", ["topk_transcoder", "topk_skip_transcoder"])
@pytest.mark.parametrize("d_out", [D_OUT, D, 21])
@pytest.mark.parametrize("dead", [[], [3, 4, 17, 60]], ids=["none dead", "some dead"])
def test_sparse_gradients_are_autograd_s(kind, d_out, dead):
    sae, x = made(kind, d_out=d_out), torch.randn(600, D + d_out, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        for name, tensor in sae.named_parameters():
            if name in ("b_enc", "b_dec", "W_skip"):
                tensor.copy_(0.3 * torch.rand(tensor.shape, generator=torch.Generator().manual_seed(5)))
    terms = Terms(torch.tensor(dead, dtype=torch.int64), variance=20.0, aux=1 / 32)
    exact = autograd_gradients(sae, x, terms)
    for found in (gradients(sae, x, terms), topk_gradients(sae, x, terms)):
        assert found.parts == pytest.approx(exact.parts, rel=1e-5) and ("aux" in found.parts) == bool(dead)
        assert torch.equal(found.fired, exact.fired)
        assert found.squared_error == pytest.approx(exact.squared_error, rel=1e-5)
        near(found.grads, exact.grads, 1e-5)
    assert isinstance(gradients(sae, x, terms).grads, PairGradients)


def small(kind: str, seed: int) -> tuple[SAE, torch.Tensor]:
    """A JumpReLU transcoder and rows of small numbers, which bfloat16 holds as they are, and so their few products."""
    generator = torch.Generator().manual_seed(seed)
    sae = made(kind)

    def signs(shape: tuple[int, ...], share: float) -> torch.Tensor:
        kept = torch.rand(shape, generator=generator) < share
        return kept * (2.0 * torch.randint(0, 2, shape, generator=generator) - 1)

    with torch.no_grad():
        for name, share in {"W_enc": 0.3, "b_enc": 0.5, "W_dec": 0.1, "b_dec": 0.5, "W_skip": 0.1}.items():
            if name in dict(sae.named_parameters()):
                sae.tensor(name).copy_(signs(tuple(sae.tensor(name).shape), share))
        sae.tensor("threshold").copy_(1.5 + torch.randint(0, 2, (D_SAE,), generator=generator))
    return sae, signs((8, D + D_OUT), 0.2)


@pytest.mark.skipif(not torch.cpu.get_capabilities().get("avx512_bf16"), reason="no bfloat16 products here")
@pytest.mark.parametrize("kind", ["jumprelu_transcoder", "jumprelu_skip_transcoder"])
@pytest.mark.parametrize("target", [None, 4.0])
def test_dense_gradients_are_autograd_s(kind, target):
    """To 1e-5, although products are in bfloat16: of numbers that it can hold."""
    sae, x = small(kind, 0)
    terms = Terms(torch.empty(0, dtype=torch.int64), l0=0.5, bandwidth=2.0, target_l0=target)
    exact = autograd_gradients(sae, x, terms)
    with matmul_precision("fast"):
        found = gradients(sae, x, terms)
    assert isinstance(found.grads, SummedGradients) and torch.equal(found.fired, exact.fired)
    assert found.parts == pytest.approx(exact.parts, rel=1e-5) and set(found.parts) == {"mse", "l0"}
    near(found.grads, exact.grads, 1e-5)


def trained(kind: str, precision: str = "fast", **changes) -> dict[str, torch.Tensor]:
    """The weights after a few steps in which features are dead and the gradient's norm is bounded."""
    sae, x = made(kind), rows(256 * 8)
    with torch.no_grad():
        sae.b_enc[:5] = -10.0
    settings = {"steps": 8, "batch_size": 256, "dead_after_tokens": 256, "precision": precision, "l0_coefficient": 0.5}
    result = train(sae, iter(x.split(256)), TrainConfig(**{"lr": 3e-3, "log_every": 1, **settings, **changes}))
    assert any("aux" in report.parts for report in result.history)
    return dict(sae.state_dict())


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_several_steps_of_the_kernels_are_those_of_autograd(kind, clip, monkeypatch):
    """TopK's kernels in float32; JumpReLU's, which are for rounded products alone, stay as near as rounding lets them."""
    topk = kind.startswith("topk")
    found = trained(kind, "float32" if topk else "fast", clip=clip)
    monkeypatch.setattr("training.numerics.gradients.kernels", lambda: None)
    plain = trained(kind, "float32", clip=clip)
    monkeypatch.setattr("training.numerics.gradients.topk_gradients", autograd_gradients)
    expected = trained(kind, "float32", clip=clip)
    near(found, expected, 1e-3 if topk else 0.1)
    near(plain, expected, 1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_any_number_of_threads_gives_the_same_weights_to_the_bit(kind, clip):
    before, made = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            made.append(trained(kind, clip=clip))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(made[0][name], other[name]) for other in made[1:] for name in made[0])


@pytest.mark.parametrize("kind", KINDS)
def test_folding_the_units_changes_no_output(kind):
    sae, x = made(kind), rows(200, read=30.0, written=0.01).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in sae.double().parameters():
            tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) - 0.4)
    units = Units.of(sae, x)
    inside = units.apply(sae, x)
    assert torch.allclose(inside.std(0, correction=0).square()[:D].mean(), torch.ones((), dtype=torch.float64))
    assert torch.allclose(inside.std(0, correction=0).square()[D:].mean(), torch.ones((), dtype=torch.float64))
    acts, x_hat = sae.encode(inside[:, :D]), sae(inside[:, :D]) * units.scale_out
    units.fold(sae)
    torch.testing.assert_close(sae.encode(x[:, :D]), acts)
    torch.testing.assert_close(sae(x[:, :D]), x_hat)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("read", "written"), [(1.0, 1.0), (0.01, 300.0)])
def test_it_learns_whatever_the_two_scales_are(kind, read, written):
    sae, held_out = made(kind), rows(512, 1, read, written)
    before = explained(sae, held_out)
    result = train(sae, stream(read=read, written=written), config(steps=250), held_out=held_out)
    found = explained(sae, held_out)
    assert found > 0.75 > before
    assert result.history[-1].held_out_explained_variance == pytest.approx(found, abs=1e-4)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_a_skip_takes_what_is_linear(kind):
    held_out = rows(512, 1, linear=3.0)
    found = {}
    for skip in ("", "_skip"):
        sae = made(f"{kind}{skip}_transcoder")
        train(sae, stream(linear=3.0), config(steps=250))
        found[skip] = explained(sae, held_out)
    assert 1 - found["_skip"] < 0.6 * (1 - found[""])


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_equals_an_uninterrupted_one_to_the_bit(kind, tmp_path):
    whole, parts, resumed, finished = (made(kind) for _ in range(4))
    settings = config(checkpoint_every=8, dead_after_tokens=128)
    result = train(whole, stream(), settings, checkpoint_dir=tmp_path / "whole")
    assert any("aux" in report.parts for report in result.history) or "topk" not in kind
    asked = iter(range(100))
    train(parts, stream(), settings, checkpoint_dir=tmp_path / "parts", should_stop=lambda: next(asked) >= 21)
    train(resumed, stream(), settings, checkpoint_dir=tmp_path / "parts")
    train(finished, stream(), settings, checkpoint_dir=tmp_path / "whole")  # nothing is left to do but to unfold
    for name, tensor in whole.named_parameters():
        assert torch.equal(tensor, resumed.get_parameter(name)), name
        assert torch.equal(tensor, finished.get_parameter(name)), name
    assert not torch.equal(whole.W_dec, parts.W_dec)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_trained_is_saved_and_read_again(kind, tmp_path):
    topk = kind.startswith("topk")
    sae = made(kind, **({"d_out": D} if topk else {}))
    x = rows(64 * 5)
    x = torch.cat([x, x[:, : D - D_OUT]], dim=1) if topk else x
    train(sae, iter(x.split(64)), config(steps=5))
    save_sae(sae, tmp_path / "sae", "sparsify" if topk else "saelens")
    again = load_sae(tmp_path / "sae")
    assert again.config.architecture == kind and again.config.hook_name_out == "out"
    assert torch.equal(again(x[:, :D]), sae(x[:, :D]))


def test_rows_of_one_hook_point_are_refused():
    with pytest.raises(TrainingError, match="takes activations of width 28, but a batch has shape"):
        train(made("topk_transcoder"), iter([rows(64)[:, :D]]), config())


def test_a_goal_that_never_varies_is_refused():
    x = rows(64)
    x[:, D:] = 1.0
    with pytest.raises(TrainingError, match="no variance"):
        train(made("topk_transcoder"), iter([x]), config())


def test_a_stream_that_replaces_outliers_has_no_pairs():
    manifest = {
        "shards": [{"n_rows": 4, "n_held_out": 0}], "hook_points": [{"name": "in", "d": D}, {"name": "out", "d": D_OUT}],
        "policy": {"context_length": 4}, "held_out_fraction": 0.0, "n_contexts": 1, "n_tokens": 4, "dtype": "float32",
    }  # fmt: skip
    limited, free = (StreamedCapture(Path("x"), manifest | {"max_norm_ratio": ratio}) for ratio in (10.0, None))
    limited.batches("in", 2)
    free.batches(("in", "out"), 2)
    with pytest.raises(CaptureError, match="at two of them are not of the same tokens"):
        limited.batches(("in", "out"), 2)
