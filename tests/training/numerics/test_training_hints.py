"""Hints: each trouble gets its sentence, a sound run gets none, and a page can ask without torch."""

import subprocess
import sys
from dataclasses import asdict

import pytest
import torch

from saes.numerics.architectures import build_sae
from saes.numerics.sae import SAEConfig
from training.numerics.hints import hints
from training.numerics.train import TrainConfig, train

STEPS = 100


def history(done: float = 0.7, **columns) -> list[dict]:
    """A sound run up to `done` of its steps; a column is a function of the share done."""
    sound = {
        "loss": lambda t: 1 - t / 2,
        "l0": lambda t: 32.0,
        "dead": lambda t: 10,
        "explained_variance": lambda t: 0.5 + t / 3,
        "held_out_explained_variance": lambda t: 0.48 + t / 3,
    } | columns
    shares = [step / STEPS for step in range(4, int(done * STEPS) + 1, 4)]
    return [
        {"step": round(t * STEPS), "tokens": round(t * STEPS) * 64} | {key: make(t) for key, make in sound.items()}
        for t in shares
    ]


def said(rows, architecture: str = "topk", k: int | None = 32, **config) -> list[str]:
    return hints(rows, {"steps": STEPS} | config, {"architecture": architecture, "d_sae": 1000, "k": k})


def test_a_sound_or_a_young_run_gets_none():
    assert said(history()) == []
    assert said(history(1.0)) == []
    assert said(history(dead=lambda t: 200)) == [], "a few that become no more"
    assert said(history(dead=lambda t: int(200 + 20 * t))) == [], "nor a few that become hardly more"
    assert said(history(0.2, dead=lambda t: 900 * t, loss=lambda t: 1 + 50 * (t > 0.19))) == []


@pytest.mark.parametrize(
    ("columns", "changes", "sentence"),
    [
        ({"dead": lambda t: int(600 * t)}, {}, "features are dead and their number climbs: lower the learning rate"),
        ({"dead": lambda t: 370}, {}, "370 of 1,000 features are dead and do not come back: lower the learning rate"),
        ({"dead": lambda t: int(600 * t)}, {"aux_coefficient": 0.0}, "give the dead features' loss a weight"),
        (
            {"dead": lambda t: int(600 * t)},
            {"aux_coefficient": 0.0, "lr": 0.05},
            "give the dead features' loss a weight, and lower the learning rate",
        ),
        ({"loss": lambda t: 9 if t == 0.4 else 1.0}, {}, "The loss jumped at step 40: lower the learning rate"),
        ({"l0": lambda t: 12.0}, {}, "Only 12 of k = 32 codes"),
        ({"held_out_explained_variance": lambda t: 0.3}, {}, "the same rows are read too often"),
        ({"explained_variance": lambda t: 0.8, "held_out_explained_variance": lambda t: 0.79}, {}, "stands at 0.790"),
    ],
)
def test_each_trouble_gets_its_sentence(columns, changes, sentence):
    found = said(history(**columns), **changes)
    assert any(sentence in line for line in found), found


@pytest.mark.parametrize(
    ("l0", "changes", "sentence"),
    [
        (90.0, {"target_l0": 30.0}, "L0 is 90, far above its target of 30: raise l0_coefficient"),
        (10.0, {"target_l0": 30.0}, "L0 is 10, far below its target of 30"),
        (33.0, {"target_l0": 30.0}, None),
        (500.0, {}, "L0 is 500, 50% of all features, which is hardly sparse: raise l0_coefficient"),
        (0.5, {}, "nearly all features out; lower l0_coefficient"),
    ],
)
def test_l0_far_from_its_target(l0, changes, sentence):
    found = said(history(l0=lambda t: l0), "jumprelu", None, **changes)
    assert found == [] if sentence is None else sentence in found[0]
    assert said(history(0.4, l0=lambda t: l0), "jumprelu", None, **changes) == []  # it may still get there


def test_no_plateau_is_seen_while_l0_is_off_or_moves():
    flat = {"explained_variance": lambda t: 0.8, "held_out_explained_variance": lambda t: 0.79}
    assert any("stands at" in line for line in said(history(**flat), "jumprelu", None))
    falling = history(l0=lambda t: 90 * (1 - t), **flat)
    assert said(falling, "jumprelu", None) == [], "L0 that falls takes explained variance along"
    (line,) = said(history(l0=lambda t: 500.0, **flat), "jumprelu", None)
    assert "hardly sparse" in line


def test_a_real_run_without_a_penalty_is_told_so():
    x = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0)) + 1
    sae = build_sae(SAEConfig("standard", 16, 64))
    config = TrainConfig(steps=60, batch_size=64, log_every=2, lr=3e-3, l1_coefficient=0.0)
    rows = [asdict(report) for report in train(sae, iter(x.split(64)), config).history]
    assert any(
        "hardly sparse: raise l1_coefficient" in line
        for line in hints(rows, asdict(config), {"architecture": "standard", "d_sae": 64})
    )


def test_a_page_may_ask_without_torch():
    code = "import sys; from training.numerics.hints import hints; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
