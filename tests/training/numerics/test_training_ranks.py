"""Two real processes that train one SAE take the steps that one process takes; a run of several starts, stops and resumes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from saes.numerics.architectures import build_sae
from saes.numerics.sae import SAEConfig
from tests.conftest import free_port
from tests.training.numerics.test_training_train import D_SAE, D, rows
from training.numerics.ranks import ALONE, Ranks
from training.numerics.train import TrainConfig, TrainResult, train

ROOT = Path(__file__).parents[3]
CASES = {
    "topk": ({"architecture": "topk", "k": 3}, {"dead_after_tokens": 100}),
    "batchtopk": ({"architecture": "batchtopk", "k": 2.5, "options": {"matryoshka_widths": [16, D_SAE]}}, {}),
    "standard": ({"architecture": "standard"}, {"l1_coefficient": 0.3, "clip": 1.0}),
    "gated": ({"architecture": "gated"}, {"l1_coefficient": 0.3}),
    "transcoder": (
        {"architecture": "topk_skip_transcoder", "k": 3, "d_in": D - 4, "d_out": 4, "apply_b_dec_to_input": False},
        {},
    ),
    "jumprelu": ({"architecture": "jumprelu"}, {"l0_coefficient": 0.01, "target_l0": 5.0}),
}
ROWS, BATCH = 64 * 30 + 1, 64  # the last batch has one row, fewer than there are ranks


def trained(case: str, x: torch.Tensor, ranks: Ranks = ALONE, **more: Any) -> TrainResult:
    shape, changes = CASES[case]
    given = {"n_tokens": ROWS, "batch_size": BATCH, "lr": 3e-3, "log_every": 1, "precision": "float32", "seed": 1}
    sae = build_sae(SAEConfig(**{"d_in": D, "d_sae": D_SAE} | shape), seed=1)
    return train(sae, iter(x.split(BATCH)), TrainConfig(**given | changes | more), held_out=x[:32], ranks=ranks)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case trained by two processes; the folder of what they wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(rows(ROWS), folder / "x.pt")
    given = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "PYTHONPATH": str(ROOT)}
    script = [sys.executable, str(Path(__file__).with_name("ranks_peer.py")), str(folder)]
    started = [subprocess.Popen(script, env=os.environ | given | {"RANK": str(rank)}) for rank in range(2)]
    try:
        assert [process.wait(900) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
    return folder


@pytest.mark.parametrize("case", CASES)
def test_the_loss_curve_of_two_ranks_is_that_of_one_process(two, case):
    alone = trained(case, torch.load(two / "x.pt"))
    found = json.loads((two / f"{case}.json").read_text())
    assert found["tokens"] == alone.tokens == ROWS and len(found["history"]) == len(alone.history) == 31
    for ours, theirs in zip(alone.history, found["history"], strict=True):
        assert theirs["loss"] == pytest.approx(ours.loss, rel=1e-4), ours.step
        assert theirs["parts"] == pytest.approx(ours.parts, rel=1e-3, abs=1e-6)
        assert theirs["explained_variance"] == pytest.approx(ours.explained_variance, abs=1e-4)
        assert theirs["held_out_explained_variance"] == pytest.approx(ours.held_out_explained_variance, abs=1e-4)
        assert theirs["l0"] == pytest.approx(ours.l0, rel=1e-3) and theirs["dead"] == ours.dead
    states = [torch.load(two / f"{case}-{rank}.pt") for rank in range(2)]
    for name, tensor in alone.sae.state_dict().items():
        assert torch.equal(states[0][name], states[1][name]), "the ranks hold the same weights"
        torch.testing.assert_close(states[0][name], tensor, rtol=1e-3, atol=2e-4)


def test_dead_features_were_there_to_be_shared(two):
    """The dead features' term divides by a sum over the batch: the case has it, or nothing was shown of it."""
    assert any("aux" in report["parts"] for report in json.loads((two / "topk.json").read_text())["history"])


def test_shares_are_all_of_a_batch_in_order():
    x = torch.arange(11)
    parts = [Ranks(rank, 4).share(x) for rank in range(4)]
    assert torch.equal(torch.cat(parts), x) and {len(part) for part in parts} == {2, 3}
    assert sum(rank.weight for rank in (made for made in (Ranks(r, 4) for r in range(4)) if len(made.share(x)))) == 1
    assert ALONE.share(x) is x and ALONE.total(11) == 11
