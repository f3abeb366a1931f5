"""SAEs trained side by side are those that would have been trained one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from saes.numerics.architectures import build_sae
from saes.numerics.sae import SAE, SAEConfig
from training.numerics.checkpoint import TrainingError
from training.numerics.together import Member, train_together
from training.numerics.train import TrainConfig, Training, TrainResult, train

D, BATCH = 24, 128
HOOKS = ("a", "b")
KINDS = [
    ("a", "topk", 96, {"k": 4}, {"seed": 0}),
    ("a", "topk", 96, {"k": 8}, {"seed": 1}),
    ("b", "topk", 192, {"k": 4}, {"seed": 0}),
    ("a", "batchtopk", 96, {"k": 4}, {"seed": 2}),
    ("b", "standard", 96, {}, {"l1_coefficient": 1.0}),
    ("a", "jumprelu", 96, {}, {"l0_coefficient": 0.5}),
    ("a", "gated", 96, {}, {"l1_coefficient": 1.0}),
]


def rows(hook: str, start: int, n: int = 40 * BATCH) -> torch.Tensor:
    generator = torch.Generator().manual_seed(HOOKS.index(hook))
    basis = torch.randn(60, D, generator=generator)
    codes = torch.rand(n, 60, generator=generator) * (torch.rand(n, 60, generator=generator) < 0.05)
    return (codes @ basis + 0.1 * torch.randn(n, D, generator=generator) + 1.0)[start:]


def streams(start: int) -> Iterator[Mapping[str, torch.Tensor]]:
    for xs in zip(*(rows(hook, start).split(BATCH) for hook in HOOKS), strict=True):
        yield dict(zip(HOOKS, xs, strict=True))


def config(**changes: Any) -> TrainConfig:
    given = {"steps": 30, "batch_size": BATCH, "lr": 3e-3, "order_seed": 0, "log_every": 7, "checkpoint_every": 10}
    return TrainConfig(**given | {"dead_after_tokens": 4 * BATCH} | changes)


def sae_of(architecture: str, d_sae: int, options: dict[str, Any], seed: int) -> SAE:
    return build_sae(SAEConfig(architecture=architecture, d_in=D, d_sae=d_sae, **options), seed=seed)


def member(number: int, folder: Path | None = None, **changes: Any) -> Member:
    hook, architecture, d_sae, options, more = KINDS[number]
    wanted = config(**more | changes)
    sae = sae_of(architecture, d_sae, options, wanted.seed)
    where = folder / str(number) if folder else None
    return Member(number, hook, Training(sae, wanted, checkpoint_dir=where))


def alone(number: int) -> TrainResult:
    hook, architecture, d_sae, options, more = KINDS[number]
    wanted = config(**more)
    sae = sae_of(architecture, d_sae, options, wanted.seed)
    return train(sae, lambda start: iter(rows(hook, start).split(BATCH)), wanted)


def run(members: list[Member], **more: Any) -> dict[Any, TrainResult | TrainingError]:
    ended: dict[Any, TrainResult | TrainingError] = {}
    train_together(members, streams, on_end=lambda m, outcome: ended.update({m.key: outcome}), **more)
    return ended


def weights(result: Any) -> dict[str, torch.Tensor]:
    assert isinstance(result, TrainResult), result
    return {name: tensor.detach().clone() for name, tensor in result.sae.named_parameters()}


def same(one: Any, other: Any) -> None:
    for name, tensor in weights(one).items():
        assert torch.equal(tensor, weights(other)[name]), name


def test_each_is_to_the_bit_what_it_is_alone():
    ended = run([member(i) for i in range(len(KINDS))])
    for i in range(len(KINDS)):
        same(ended[i], alone(i))
        reports = [(r.step, r.loss, r.l0, r.dead) for r in ended[i].history]
        assert reports == [(r.step, r.loss, r.l0, r.dead) for r in alone(i).history]


def test_all_go_on_from_checkpoints_of_different_ages(tmp_path):
    """As a process that was killed between two writes leaves them: to the bit as without the interruption."""
    numbers = (0, 2, 3)
    for number, last in zip(numbers, (10, 20, 20), strict=True):
        group = [member(number, tmp_path)]
        stop = {number: last}
        run(group, should_stop=lambda m: m.training.state.step >= stop[m.key])  # noqa: B023
    ended = run([member(number, tmp_path) for number in numbers])
    for number in numbers:
        same(ended[number], alone(number))


def test_one_that_diverges_ends_alone(tmp_path):
    ended = run([member(0, tmp_path), member(1, tmp_path, lr=1e6)])
    assert isinstance(ended[1], TrainingError)
    assert "lower the learning rate" in str(ended[1])
    same(ended[0], alone(0))


def test_one_is_stopped_and_kept_while_the_others_go_on():
    ended = run([member(0), member(1)], should_stop=lambda m: m.key == 1 and m.training.state.step == 12)
    assert isinstance(ended[1], TrainResult)
    assert (ended[1].steps, ended[1].stopped) == (12, True)
    assert ended[1].sae.W_enc.is_contiguous()
    same(ended[0], alone(0))


def test_a_stream_that_ends_early_ends_all_with_what_they_have():
    def short(start: int) -> Iterator[Mapping[str, torch.Tensor]]:
        for number, xs in enumerate(streams(start)):
            if number == 9:
                return
            yield xs

    ended: dict[Any, Any] = {}
    train_together([member(0), member(1)], short, on_end=lambda m, outcome: ended.update({m.key: outcome}))
    assert [(ended[i].steps, ended[i].stopped) for i in (0, 1)] == [(9, True), (9, True)]


def test_nothing_to_read_and_unlike_batches_get_a_sentence():
    with pytest.raises(TrainingError, match="There are no activations to train on"):
        train_together([member(0)], lambda start: iter(()), on_end=lambda m, outcome: None)
    with pytest.raises(TrainingError, match="one batch size, one order of rows"):
        run([member(0), member(1, batch_size=64)])
    with pytest.raises(TrainingError, match="one batch size, one order of rows"):
        run([member(0), member(1, order_seed=None)])
