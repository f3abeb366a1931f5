"""Training: it learns, it resumes to the bit, it survives kill -9, it stops when asked, and it says what is wrong."""

import dataclasses
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saes.numerics.architectures import build_sae
from saes.numerics.sae import SAE, SAEConfig
from training.numerics import train_state
from training.numerics.checkpoint import FILE, TrainingError, load_checkpoint, save_checkpoint
from training.numerics.reconstruction import explained_variance
from training.numerics.shard_writer import ShardWriter
from training.numerics.shards import open_capture
from training.numerics.train import StepReport, TrainConfig, Training, capture_batches, train

D, D_SAE, K = 16, 64, 3
ROOT = Path(__file__).resolve().parents[3]
DICTIONARY = torch.nn.functional.normalize(torch.randn(48, D, generator=torch.Generator().manual_seed(0)), dim=1)


def rows(n: int, seed: int = 0, scale: float = 4.0) -> torch.Tensor:
    """Activations made of 3 of 48 directions each, off centre: what an SAE can explain and a mean cannot."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.zeros(n, 48)
    chosen = torch.rand(n, 48, generator=generator).topk(3, dim=1).indices
    codes.scatter_(1, chosen, 1 + torch.rand(n, 3, generator=generator))
    return scale * (codes @ DICTIONARY + 0.5)


def sae_of(architecture: str = "topk", **options) -> SAE:
    return build_sae(SAEConfig(architecture, D, D_SAE, k=K if "topk" in architecture else None, **options))


def config(**changes) -> TrainConfig:
    return TrainConfig(**{"steps": 40, "batch_size": 64, "lr": 3e-3, "log_every": 5} | changes)


def stream(seed: int = 0, batch_size: int = 64):
    """A function from the first row to batches: the form of `batches` that can be resumed."""
    x = rows(20_000, seed)
    return lambda start: iter(x[start:].split(batch_size))


def weights(sae: SAE) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in sae.named_parameters()}


def equal(a: SAE, b: SAE) -> bool:
    return all(torch.equal(tensor, weights(b)[name]) for name, tensor in weights(a).items())


# -- it learns -----------------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "least"), [("topk", 0.8), ("standard", 0.8)])
@pytest.mark.parametrize("scale", [1.0, 200.0])
def test_it_learns_at_any_scale_of_the_activations(architecture, least, scale):
    x, held_out = rows(64 * 300, 0, scale), rows(500, 1, scale)
    sae = sae_of(architecture)
    before = explained_variance(sae, held_out)
    result = train(sae, iter(x.split(64)), config(steps=300, l1_coefficient=0.3), held_out=held_out)
    after = explained_variance(sae, held_out)
    assert result.sae is sae and not result.stopped and result.steps == 300 and result.tokens == len(x)
    assert after > least > before
    assert result.history[-1].held_out_explained_variance == pytest.approx(after, abs=1e-6)  # norms are folded between
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    assert sae.W_enc.is_contiguous()


def test_both_precisions_learn_the_same():
    values = []
    for precision in ("fast", "float32"):
        sae = sae_of()
        train(sae, stream()(0), config(steps=200, precision=precision))
        values.append(explained_variance(sae, rows(500, 1)))
    assert values[0] == pytest.approx(values[1], abs=0.03)


def test_a_stronger_penalty_gives_a_smaller_l0():
    l0 = []
    for l1 in (0.1, 1.0, 10.0):
        sae = sae_of("standard")
        train(sae, stream()(0), config(steps=200, l1_coefficient=l1))
        l0.append(float((sae.encode(rows(500, 1)) > 0).sum(1).float().mean()))
    assert l0[0] > l0[1] > l0[2]


def test_the_decoder_bias_starts_at_the_mean_of_the_first_batch_unless_it_is_set():
    x = rows(64)
    sae = sae_of()
    train(sae, iter([x]), config(lr=0.0, steps=1))
    torch.testing.assert_close(sae.b_dec.data, x.mean(0))
    with torch.no_grad():
        sae.b_dec.fill_(7.0)
    train(sae, iter([x]), config(lr=0.0, steps=1))
    assert (sae.b_dec == 7.0).all()


@pytest.mark.parametrize("normalisation", ["layer_norm", "constant_norm_rescale"])
def test_an_sae_that_normalises_its_input_is_trained_in_that_space(normalisation):
    sae = sae_of(normalize_activations=normalisation)
    train(sae, stream()(0), config(steps=300))
    assert explained_variance(sae, rows(500, 1)) > 0.8


# -- dead features -------------------------------------------------------------------


def half_dead(architecture: str) -> SAE:
    """An SAE half of whose features have an encoder bias so low that they never fire."""
    sae = sae_of(architecture)
    with torch.no_grad():
        sae.b_enc[: D_SAE // 2] = -20.0
    return sae


@pytest.mark.parametrize("architecture", ["topk", "standard"])
def test_dead_features_come_back_to_life_only_with_their_term(architecture):

    def dead_after_training(aux: float) -> int:
        sae = half_dead(architecture)
        made = config(steps=300, aux_coefficient=aux, dead_after_tokens=640, lr=0.03, l1_coefficient=0.1)
        history = train(sae, stream()(0), made).history
        assert max(report.dead for report in history) >= D_SAE // 2
        assert any("aux" in report.parts for report in history) == (aux > 0)
        return history[-1].dead

    assert dead_after_training(0.0) >= D_SAE // 2
    assert dead_after_training(1 / 32) < D_SAE // 4


def test_callbacks_keep_the_caller_s_gradient_mode():
    modes: list[bool] = []
    train(sae_of(), stream()(0), config(steps=5), lambda report: modes.append(torch.is_grad_enabled()))
    assert modes == [True] and torch.is_grad_enabled()


def test_silence_is_counted_in_tokens():
    sae = sae_of()
    with torch.no_grad():
        sae.b_enc[5] = -1e6
    state = train(sae, stream()(0), config(steps=7, lr=0.0)).state
    assert state.silent[5] == 7 * 64 and (state.silent == 0).any()


# -- reports -------------------------------------------------------------------------


def test_reports():
    reports: list[StepReport] = []
    held_out = rows(100, 1)
    result = train(sae_of(), stream()(0), config(steps=12), reports.append, held_out=held_out)
    assert [report.step for report in reports] == [5, 10, 12] and result.history == reports
    last = reports[-1]
    assert last.tokens == 12 * 64 and last.loss == sum(last.parts.values()) and last.l0 <= K
    assert last.explained_variance < 1 and last.tokens_per_second > 0 and last.lr > 0
    assert train(sae_of(), stream()(0), config(steps=5)).history[-1].held_out_explained_variance is None
    json.dumps([dataclasses.asdict(report) for report in reports], allow_nan=False)


def test_the_reported_numbers_are_those_of_the_last_batch():
    sae = sae_of()
    x = rows(64)
    report = train(sae, iter([x]), config(steps=1, lr=0.0, precision="float32")).history[-1]
    error = float((sae(x) - x).detach().square().sum(1).mean())
    assert report.parts["fvu"] == pytest.approx(error / float(x.var(0, correction=0).sum()), rel=1e-5)
    assert report.explained_variance == pytest.approx(explained_variance(sae, x), rel=1e-5)
    assert report.l0 == pytest.approx(float((sae.encode(x) > 0).sum(1).float().mean()))


def test_learning_rate_warms_up_and_decays():
    reports: list[StepReport] = []
    train(sae_of(), stream()(0), config(steps=10, lr_warmup=0.2, lr_decay=0.2, log_every=1), reports.append)
    assert [report.lr for report in reports] == pytest.approx([1.5e-3] + [3e-3] * 8 + [1.5e-3])


# -- stopping and resuming -----------------------------------------------------------


class Killed(Exception):
    pass


def kill_at(step: int):
    def on_step(report: StepReport) -> None:
        if report.step >= step:
            raise Killed

    return on_step


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "standard"])
def test_an_interrupted_run_equals_an_uninterrupted_one_to_the_bit(architecture, tmp_path):
    made = config(checkpoint_every=8, dead_after_tokens=64)  # so that the dead features' term is part of it
    whole, parts, resumed = (half_dead(architecture) for _ in range(3))
    uninterrupted = train(whole, stream(), made, checkpoint_dir=tmp_path / "whole")
    with pytest.raises(Killed):
        train(parts, stream(), made, kill_at(20), checkpoint_dir=tmp_path / "parts")
    result = train(resumed, stream(), made, checkpoint_dir=tmp_path / "parts")
    assert result.steps == 40 and equal(whole, resumed) and not equal(whole, parts)
    assert torch.equal(result.state.silent, uninterrupted.state.silent)
    curves = [[(r.step, r.loss, r.l0, r.dead) for r in each.history] for each in (uninterrupted, result)]
    assert curves[0] == curves[1] and any("aux" in report.parts for report in result.history)
    assert result.seconds > result.history[0].seconds


def test_stop_and_keep_then_continue_with_an_iterator_that_begins_there(tmp_path):
    asked = iter(range(100))
    first = train(sae_of(), stream(), config(), checkpoint_dir=tmp_path, should_stop=lambda: next(asked) >= 13)
    assert first.stopped and first.steps == 13 and load_checkpoint(tmp_path)[1]["tokens"] == 13 * 64
    again, whole = sae_of(), sae_of()
    train(again, stream()(13 * 64), config(), checkpoint_dir=tmp_path)
    train(whole, stream(), config())
    assert equal(again, whole)


def test_a_finished_run_is_returned_without_training_on(tmp_path):
    whole = sae_of()
    train(whole, stream(), config(), checkpoint_dir=tmp_path)
    again = sae_of()
    result = train(again, iter(()), config(), checkpoint_dir=tmp_path)
    assert equal(whole, again) and result.steps == 40 and not result.stopped and len(result.history) == 8


def test_batches_that_run_out_end_the_run_early():
    result = train(sae_of(), iter(rows(200).split(64)), config())
    assert result.stopped and result.steps == 4 and result.tokens == 200


CHILD = """
import sys
from tests.training.numerics.test_training_train import config, sae_of, stream
from training.numerics.train import train
train(sae_of(), stream(), config(steps=300, checkpoint_every=1), checkpoint_dir=sys.argv[1],
      on_step=lambda report: (print(report.step, flush=True), report.step < 60 or sys.stdin.read()))
"""  # at step 60 it waits: however slow who kills it is, it does not reach its end


def test_kill_9_leaves_a_checkpoint_that_continues_to_the_same_weights(tmp_path):
    made = config(checkpoint_every=1, steps=300)
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
    )
    assert child.stdout is not None
    while (line := child.stdout.readline().strip()) != "20":
        assert line, "the child ended by itself"
    time.sleep(0.01 * (time.time() % 1))  # anywhere in a step, also while a checkpoint is written
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    found = load_checkpoint(tmp_path)
    assert found is not None and 19 <= found[1]["step"] <= 60  # a step is reported before its checkpoint is written
    resumed, whole = sae_of(), sae_of()
    train(resumed, stream(), made, checkpoint_dir=tmp_path)
    train(whole, stream(), made)
    assert equal(resumed, whole)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    train(sae_of(), stream(), config(steps=2), checkpoint_dir=tmp_path)
    with pytest.raises(TrainingError, match="made with another steps and lr; choose a new folder"):
        train(sae_of(), stream(), config(steps=3, lr=1e-4), checkpoint_dir=tmp_path)
    with pytest.raises(TrainingError, match="made with another architecture and k"):
        train(sae_of("standard"), stream(), config(steps=2), checkpoint_dir=tmp_path)
    assert train(sae_of(), stream(), config(steps=2, log_every=1), checkpoint_dir=tmp_path).steps == 2


def test_damaged_checkpoints_and_full_disks(tmp_path, monkeypatch):
    train(sae_of(), stream(), config(steps=2), checkpoint_dir=tmp_path)
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(TrainingError, match="x became NaN or infinite at step 3"):
        save_checkpoint(tmp_path, {"x": torch.tensor([math.nan])}, {"step": 3})
    assert (tmp_path / FILE).read_bytes() == before
    (tmp_path / FILE).write_bytes(before[:-4])
    with pytest.raises(TrainingError, match="is damaged"):
        train(sae_of(), stream(), config(steps=2), checkpoint_dir=tmp_path)


# -- what goes wrong -----------------------------------------------------------------


def test_a_diverging_run_says_so_and_keeps_the_last_checkpoint(tmp_path):
    def batches(start: int) -> Iterator[torch.Tensor]:
        for step, x in enumerate(stream()(start)):
            yield x if step < 10 else x * math.inf

    with pytest.raises(TrainingError, match=r"not a finite number at step 11; lower the learning rate.*is kept"):
        train(sae_of(), batches, config(checkpoint_every=4), checkpoint_dir=tmp_path)
    assert load_checkpoint(tmp_path)[1]["step"] == 8


@pytest.mark.parametrize(
    ("batches", "sentence"),
    [
        ([], "There are no activations to train on"),
        ([torch.randn(8, D + 1)], r"takes activations of width 16, but a batch has shape \(8, 17\)"),
        ([torch.ones(8, D)], "The first batch has no variance"),
        ([torch.full((8, D), math.nan)], "The first batch has no variance, or is not finite"),
    ],
)
def test_bad_batches_get_one_sentence(batches, sentence):
    with pytest.raises(TrainingError, match=sentence):
        train(sae_of(), iter(batches), config())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"lr": math.nan}, "lr is nan"),
        ({"l1_coefficient": -1}, "l1_coefficient is -1"),
        ({"lr_decay": 2.0}, "lr_decay is 2.0; it is a share of the steps"),
        ({"precision": "float8"}, 'precision is "float8"'),
    ],
)
def test_bad_settings_get_one_sentence(changes, sentence):
    with pytest.raises(TrainingError, match=sentence):
        config(**changes)


def test_saes_that_cannot_be_trained_are_refused():
    with pytest.raises(TrainingError, match="reads 16 numbers and writes 20"):
        train(build_sae(SAEConfig("topk", D, D_SAE, d_out=20, k=K, apply_b_dec_to_input=False)), stream(), config())
    with pytest.raises(TrainingError, match="float32 weights"):
        train(build_sae(SAEConfig("topk", D, D_SAE, k=K), dtype=torch.bfloat16), stream(), config())


# -- from a capture ------------------------------------------------------------------


def test_training_from_a_capture_goes_through_its_training_rows_in_the_seed_s_order(tmp_path):
    facts = {"policy": {"context_length": 10}, "hook_points": [{"name": "h", "d": D}], "dtype": "float32"}
    writer = ShardWriter(tmp_path / "c", facts, {"h": D}, "float32", 500)
    x = rows(1000)
    for i in range(0, 1000, 50):
        stored = np.ones((5, 10), dtype=bool)
        writer.add(np.zeros((5, 10)), stored, {"h": x[i : i + 50]}, np.zeros(5), 0)
    writer.finish(run_id="c", held_out_fraction=0.05)
    capture = open_capture(tmp_path / "c")
    made = TrainConfig(n_tokens=1500, batch_size=64, seed=3)
    batches = capture_batches(capture, "h", made)
    seen = torch.cat(list(batches(0)))
    assert len(seen) == 1500 and made.total_steps == 24
    assert torch.equal(torch.cat(list(batches(700))), seen[700:])
    assert not torch.equal(seen, torch.cat(list(capture_batches(capture, "h", dataclasses.replace(made, seed=4))(0))))
    result = train(sae_of(), batches, made)
    assert (result.steps, result.tokens, result.stopped) == (24, 1500, False)


def test_two_runs_do_not_write_to_one_place(tmp_path):
    first = Training(sae_of("topk"), config(), checkpoint_dir=tmp_path)
    with pytest.raises(TrainingError, match="Another run is writing to"):
        train(sae_of("topk"), stream(), config(), checkpoint_dir=tmp_path)
    first.close()
    assert train(sae_of("topk"), stream(), config(), checkpoint_dir=tmp_path).steps == config().total_steps


@pytest.mark.parametrize("architecture", ["topk", "standard", "jumprelu", "gated"])
def test_a_batch_in_parts_is_the_same_batch(architecture, monkeypatch):
    """An allocator that fails for more than 20 rows at once: the batch of 64 goes through in parts of 16."""
    from training.numerics import micro

    whole, said = train(sae_of(architecture), stream(), config(precision="float32")), []
    real = micro.gradients

    def small_memory(sae, x, terms, scratch):
        if len(x) > 20:
            raise MemoryError
        return real(sae, x, terms, scratch)

    monkeypatch.setattr(micro, "gradients", small_memory)
    parts = train(sae_of(architecture), stream(), config(precision="float32"), say=said.append)
    assert [sentence.rpartition("parts of ")[2] for sentence in said] == [
        f"{rows} rows, whose gradients are added up." for rows in (32, 16)
    ]
    for one, other in zip(whole.history[:2], parts.history[:2], strict=True):
        assert one.loss == pytest.approx(other.loss, rel=2e-3)
        assert one.l0 == pytest.approx(other.l0, rel=2e-2)
    monkeypatch.setattr(micro, "gradients", lambda *given: small_memory(given[0], torch.zeros(99, 1), *given[2:]))
    with pytest.raises(TrainingError, match="Memory ran out at step 1, even with 16 rows at once"):
        train(sae_of(architecture), stream(), config())


LIMITED = """
import resource, sys
import torch
from saes.numerics.architectures import build_sae
from saes.numerics.sae import SAEConfig
from training.numerics.train import TrainConfig, train

torch.set_num_threads(1)
sae = build_sae(SAEConfig("gated", 32, 4096))
x = torch.randn(4096, 32)
config = TrainConfig(steps=3, batch_size=4096, log_every=1, precision="float32")
train(build_sae(SAEConfig("gated", 32, 64)), iter([x[:512]] * 3), config)  # what torch needs once
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20, -1))
said = []
result = train(sae, iter([x] * 3), config, say=said.append)
print(result.steps, len(said), said[0] if said else "")
"""


def test_a_checkpoint_beyond_the_quota_keeps_the_one_before_it(tmp_path):
    """What RLIMIT_FSIZE says is, but for its number, what a full disk and a used up quota say."""
    train(sae_of(), stream(), config(steps=5), checkpoint_dir=tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # of the whole process: around one call and nothing else
    try:
        with pytest.raises(TrainingError) as error:
            save_checkpoint(tmp_path, {"x": torch.zeros(10_000)}, {"step": 6})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "The checkpoint of step 6 could not be written (the disk is full)" in str(error.value)
    _, facts = load_checkpoint(tmp_path)
    assert facts["step"] == 5 and not list(tmp_path.glob("*.tmp"))


def test_a_process_whose_memory_is_really_limited_trains_in_parts():
    """A gated step on 4,096 rows of 4,096 features needs more than a gigabyte; the process gets 300 MB."""
    child = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, cwd=ROOT)
    assert child.returncode == 0, child.stderr[-2000:]
    steps, halved, sentence = child.stdout.split(maxsplit=2)
    assert int(steps) == 3 and int(halved) >= 1
    assert sentence.startswith("Memory ran out at step 1: batches of 4,096 go through in parts of 2,048 rows")


@pytest.mark.parametrize("architecture", ["standard", "topk", "batchtopk"])
def test_a_rate_of_ten_ends_with_a_sentence_and_the_last_good_checkpoint(tmp_path, architecture):
    """The rate rises to ten, so that the run is good before it diverges; the weights that are kept are of that time."""
    made = config(steps=400, lr=10.0, lr_warmup=1.0, checkpoint_every=1)
    with pytest.raises(TrainingError, match=r"lower the learning rate.*The last checkpoint is kept") as error:
        train(sae_of(architecture), stream(), made, checkpoint_dir=tmp_path)
    kept = train(sae_of(architecture), stream(), made, checkpoint_dir=tmp_path, should_stop=lambda: True)
    assert 1 <= kept.steps < int(re.findall(r"step (\d+)", str(error.value))[0])
    x = next(stream()(0))
    with torch.no_grad():
        unexplained = float((x - kept.sae(x)).square().sum() / (x - x.mean(0)).square().sum())
    assert unexplained < 3


def test_a_rate_of_ten_from_the_first_step_leaves_no_checkpoint_that_is_none(tmp_path):
    with pytest.raises(TrainingError, match=r"lower the learning rate \(now 10\)\.$"):
        train(sae_of("standard"), stream(), config(lr=10.0, lr_warmup=0.0, checkpoint_every=1), checkpoint_dir=tmp_path)
    assert load_checkpoint(tmp_path) is None


def test_memory_for_the_moments_is_taken_before_the_first_gradients():
    """Else a batch that just fits is followed by an update that does not, and halving comes too late."""
    training = Training(sae_of("jumprelu"), config())
    training.prepared(next(stream()(0)))
    assert training._optimizer is not None
    kept = training._optimizer.state()
    assert {name.split(".")[1] for name in kept} == set(training._optimizer.leaves)
    assert not any(tensor.any() for tensor in kept.values())


def test_a_checkpoint_that_memory_had_no_room_for_is_written_once_the_step_gives_its_room_up(tmp_path, monkeypatch):
    asked = []

    def crowded(*given: Any) -> None:
        asked.append(given)
        if len(asked) == 1:
            raise MemoryError
        save_checkpoint(*given)

    monkeypatch.setattr(train_state, "save_checkpoint", crowded)
    result = train(sae_of(), stream(), config(steps=3), checkpoint_dir=tmp_path)
    assert result.steps == 3 and len(asked) == 2 and load_checkpoint(tmp_path)[1]["step"] == 3
