"""Sweeps against single generations, and what is measured of a text."""

import math
import zlib
from typing import Any

import pytest
import torch

from inference.numerics.generate import PromptError, generate
from inference.numerics.quality import plain_reading, zlib_ratio
from inference.numerics.steer import Edit, Steering, SteeringError
from inference.numerics.sweep import scaled, sweep
from tests.tiny_models import RESID, tiny_sae

PROMPT = "Paris is the capital of"
LOW = "blocks.0.hook_resid_post"


def test_strengths_are_multiples_and_a_factor_is_counted_from_one() -> None:
    assert [scaled(Edit(1, mode, 4.0), 0.5).value for mode in ("add", "clamp", "cap", "scale")] == [2.0, 2.0, 2.0, 2.5]
    assert scaled(Edit(1, "ablate"), 3.0) == Edit(1, "ablate") and scaled(Edit(1, "scale", 9.0), 0).value == 1.0


def test_every_point_is_the_generation_of_its_strength(llama: Any) -> None:
    steering = [
        Steering(tiny_sae(), LOW, [Edit(11, "add", 8.0)]),
        Steering(tiny_sae("standard"), RESID, [Edit(5, "clamp", 6.0)]),
    ]
    points = list(sweep(llama, PROMPT, steering, [0, 1, 2.5], max_new_tokens=8))
    assert [point.factor for point in points] == [0, 1, 2.5]
    made = generate(llama, PROMPT, steering=steering, max_new_tokens=8)
    assert points[1].ids == made.ids and points[1].text == made.text
    assert len({tuple(point.ids) for point in points}) == 3
    for point in points:
        read = plain_reading(llama, made.prompt_ids, point.ids, steering)
        assert point.mean_plain_logprob == pytest.approx(sum(read.logprobs) / len(read.logprobs))
        assert point.effect == pytest.approx((read.effects[0][0] + read.effects[1][0]) / 2)


def test_a_strength_that_breaks_the_model_is_a_point_that_says_so(llama: Any) -> None:
    steering = [Steering(tiny_sae(), LOW, [Edit(i, "add", 3e38) for i in range(20)])]
    points = list(sweep(llama, PROMPT, steering, [1, 0.0], max_new_tokens=4))
    assert "no longer finite numbers" in points[0].error and points[0].mean_plain_logprob is None
    assert points[1].error == "" and len(points[1].ids) == 4


def test_what_is_wrong_whatever_the_strength_is_raised(llama: Any) -> None:
    with pytest.raises(SteeringError, match="no feature 96"):
        list(sweep(llama, PROMPT, [Steering(tiny_sae(), LOW, [Edit(96, "add", 1.0)])], [1]))
    with pytest.raises(PromptError):
        list(sweep(llama, "", [], [1]))


def test_effects_are_the_codes_of_the_plain_model(llama: Any) -> None:
    sae, prompt, new = tiny_sae("standard"), [0, 20, 30, 40], [50, 60, 20]
    steering = [
        Steering(sae, RESID, [Edit(3, "add", 1.0), Edit(9, "ablate")]),
        Steering(tiny_sae(), RESID, [Edit(4, "add", 1.0)]),
    ]
    read = plain_reading(llama, prompt, new, steering)
    x = llama.activations(torch.tensor([prompt + new]), [RESID])[RESID][0, len(prompt) :]
    assert read.effects[0] == pytest.approx(sae.encode(x)[:, [3, 9]].mean(0).tolist(), rel=1e-4)
    assert read.effects[1] == pytest.approx(tiny_sae().encode(x)[:, [4]].mean(0).tolist(), rel=1e-4)
    assert plain_reading(llama, prompt, [], steering).effects == [[], []]


def test_zlib_ratio() -> None:
    assert zlib_ratio("") is None
    text = "the same words " * 40
    assert zlib_ratio(text) == len(zlib.compress(text.encode(), 9)) / len(text) < 0.1
    assert math.isclose(zlib_ratio("日本"), len(zlib.compress("日本".encode(), 9)) / 6)
