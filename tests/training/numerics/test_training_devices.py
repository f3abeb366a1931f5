"""From a capture to a steered generation on a second device (tests/two_devices.py), with the numbers of the first."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from concepts.numerics.harvest import harvest
from concepts.numerics.logit_lens import logit_lens
from inference.numerics.generate import generate
from inference.numerics.infer import Reader, infer, infer_many
from inference.numerics.quality import plain_reading
from inference.numerics.steer import MODES, Edit, Steering
from saes.numerics.architectures import build_sae
from saes.numerics.lm import load_lm
from saes.numerics.sae import SAE, SAEConfig
from tests.conftest import TEXT
from tests.two_devices import OnGpu, two_devices
from training.numerics import gradients
from training.numerics.capture import capture
from training.numerics.evaluate import measure_capture, measure_texts
from training.numerics.shards import open_capture
from training.numerics.stream import StreamedCapture
from training.numerics.tokens import TokenPolicy
from training.numerics.train import StepReport, TrainConfig, train

HOOK = "blocks.1.hook_resid_post"
TEXTS = [f"Text {i}. {TEXT}" for i in range(20)]
D, D_OUT, D_SAE, ROWS = 16, 8, 64, 64
KINDS = {
    "topk": {"k": 4},
    "batchtopk": {"k": 4},
    "matryoshka": {"k": 4, "options": {"matryoshka_widths": [16, D_SAE]}},
    "jumprelu": {},
    "standard": {},
    "gated": {},
    "topk_skip_transcoder": {"k": 4, "d_out": D_OUT, "apply_b_dec_to_input": False},
    "jumprelu_skip_transcoder": {"d_out": D_OUT, "apply_b_dec_to_input": False},
}


@contextmanager
def device(name: str) -> Iterator[str]:
    if name == "cpu":
        yield name
        return
    with two_devices() as gpu:
        yield gpu


def values(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.held if isinstance(tensor, OnGpu) else tensor.detach()


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled kernels are for CPUs: both sides are computed by torch."""
    monkeypatch.setattr(gradients, "kernels", lambda: False)


def test_tensors_of_two_devices_do_not_mix() -> None:
    with two_devices() as gpu:
        x = torch.ones(3, 4, device=gpu)
        assert x.device.type == "cuda" and x.cpu().device.type == "cpu" and (x * torch.tensor(2.0)).device == x.device
        for mixed in (
            lambda: x + torch.ones(4),
            lambda: x @ torch.ones(4, 2),
            lambda: torch.cat([x, torch.ones(1, 4)]),
        ):
            with pytest.raises(RuntimeError, match="two devices"):
                mixed()
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_training_with_an_interruption_gives_the_weights_of_the_cpu(kind: str, tmp_path: Path) -> None:
    here, there = (trained(kind, name, tmp_path / name) for name in ("cpu", "cuda"))
    assert all(torch.equal(here[name], there[name]) for name in here)


def trained(kind: str, where: str, checkpoints: Path) -> dict[str, torch.Tensor]:
    """Weights after 12 steps, stopped at the 6th and resumed; features count as dead soon, so that theirs are used."""
    architecture = "batchtopk" if kind == "matryoshka" else kind
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(12 * ROWS, D + (D_OUT if "transcoder" in kind else 0), generator=generator)
    config = TrainConfig(steps=12, batch_size=ROWS, log_every=3, precision="float32", dead_after_tokens=2 * ROWS)
    seen: list[StepReport] = []
    with device(where) as name:
        for stop in (lambda: len(seen) == 2, None):
            sae = build_sae(SAEConfig(architecture, D, D_SAE, **KINDS[kind]), seed=0, device=name)  # type: ignore[arg-type]
            batches = lambda start: iter(rows[start:].clone().split(ROWS))  # noqa: E731
            train(sae, batches, config, seen.append, checkpoints, held_out=rows[:ROWS], should_stop=stop)
        assert sae.W_dec.device.type == where
        assert len(seen) == 4 and seen[-1].dead is not None
        return {name: values(parameter) for name, parameter in sae.named_parameters()}


def test_everything_that_is_done_with_an_sae_gives_the_numbers_of_the_cpu(tiny_model_dir: Path, tmp_path: Path) -> None:
    here, there = (used(tiny_model_dir, name, tmp_path / name) for name in ("cpu", "cuda"))
    assert here.keys() == there.keys()
    torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-6, equal_nan=True)  # a CPU encodes sparsely


def used(model: Path, where: str, folder: Path) -> dict[str, Any]:
    """Numbers of a capture, an evaluation, a view, a reading and steered generations."""
    folder.mkdir()
    found: dict[str, Any] = {}
    lm = load_lm(model, device="cpu")  # transformers lays models out on a third device first
    with device(where) as name:
        lm.model.to(name)
        assert lm.device.type == where
        ways: dict[str, dict[str, Any]] = {
            "packed": {},
            "outliers": {"max_norm_ratio": 1.3},
            "padded": {"policy": TokenPolicy(16, packed=False)},
            "streamed": {"stored": False, "max_norm_ratio": 1.5},
        }
        for way, changes in ways.items():
            manifest = capture(
                lm, TEXTS, [HOOK], folder / way, **{"policy": TokenPolicy(16), "shard_tokens": 200} | changes
            )
            made = (
                StreamedCapture(folder / way, manifest or {}, lm) if way == "streamed" else open_capture(folder / way)
            )
            found[way] = values(next(made.batches(HOOK, 50))).numpy()
        sae = build_sae(SAEConfig("topk", lm.d_model, D_SAE, k=4, hook_name=HOOK), seed=0, device=name)
        made = open_capture(folder / "packed")
        measured = (
            measure_capture(sae, made, HOOK, lm=lm).metrics | measure_texts(sae, lm, TEXTS, TokenPolicy(16)).metrics
        )
        found |= {metric: value["value"] for metric, value in measured.items()}
        harvest(sae, made, HOOK, folder / "view", k=5, tokenizer=lm.tokenizer)
        logit_lens(sae, lm, folder / "view", k=5, neighbours=5)
        found |= {file.name: np.load(file) for file in sorted((folder / "view").glob("*.npy"))}
        found |= read_and_steered(lm, sae)
    return found


def read_and_steered(lm: Any, sae: SAE) -> dict[str, Any]:
    found: dict[str, Any] = {}
    ids = lm.tokenizer("The cat sat on the mat")["input_ids"]
    readers = [Reader(sae, HOOK)]
    read = infer(lm, readers, ids, likely=3)
    assert read.likely is not None
    found["likely"] = read.likely.logits
    for number, codes in enumerate([read.codes[0], *(one[0] for one in infer_many(lm, readers, [ids, ids[:3]]))]):
        found[f"codes {number}"] = codes.values
    for mode in MODES:
        steering = [Steering(sae, HOOK, [Edit(3, mode, 2.0)], "not_special")]
        written = generate(lm, "The cat", steering=steering, max_new_tokens=4, temperature=0.7)
        found[f"generated, {mode}"] = np.array([*written.ids, *written.logprobs])
        found[f"read plainly, {mode}"] = np.array(plain_reading(lm, ids, written.ids, steering).logprobs)
    return found
