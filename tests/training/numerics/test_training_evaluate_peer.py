"""Metrics against SAELens' own evaluation of the same SAE on the same activations, in an interpreter that has it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saes.numerics.formats import save_sae
from saes.numerics.sae import SAE
from tests.tiny_models import tiny_sae
from tests.training.numerics.test_training_evaluate import data
from training.numerics.reconstruction import Rows, reconstruction

SAME = {
    "l0": "l0", "l1": "l1", "mse": "mse", "cossim": "cosine", "l2_norm_in": "l2_norm_in", "l2_norm_out": "l2_norm_out",
    "l2_ratio": "l2_ratio", "relative_reconstruction_bias": "relative_reconstruction_bias",
    "explained_variance": "explained_variance", "explained_variance_legacy": "explained_variance_legacy",
}  # fmt: skip
ARCHITECTURES = ("topk", "standard")


@pytest.fixture(scope="module")
def answers(ask_peers, tmp_path_factory) -> dict[str, tuple[SAE, dict[str, Any]]]:
    """An SAE of each architecture and what SAELens says of it."""
    folder = tmp_path_factory.mktemp("evaluated")
    saes = {architecture: tiny_sae(architecture) for architecture in ARCHITECTURES}
    for architecture, sae in saes.items():
        save_sae(sae, folder / architecture)
    np.save(folder / "x.npy", data(500).numpy())
    ask_peers(Path(__file__).with_name("evaluate_peer.py"), folder)
    said = json.loads((folder / "metrics.json").read_text())
    return {architecture: (sae, said[architecture]) for architecture, sae in saes.items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_metrics_are_those_of_saelens(architecture, answers):
    (sae, theirs), x = answers[architecture], data(500)
    found = reconstruction(sae, [Rows(x, None, np.arange(500) // 10)])
    assert found is not None
    for name, ours in SAME.items():
        assert found.values[ours] == pytest.approx(theirs[name], rel=2e-5), name
    density = torch.tensor(theirs["feature_density"])
    torch.testing.assert_close(found.firing.tokens / found.n, density)
    heuristic = found.firing.tokens / found.firing.contexts
    torch.testing.assert_close(heuristic.nan_to_num(-1), torch.tensor(theirs["consistent_activation_heuristic"]))
