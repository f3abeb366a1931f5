"""Metrics against SAELens' own evaluation of the same SAE on the same activations, in an interpreter that has it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saes.numerics.formats import save_sae
from saes.numerics.lm import LM
from saes.numerics.sae import SAE
from tests.tiny_models import RESID, tiny_lm, tiny_sae
from tests.training.numerics.test_training_evaluate import data
from training.numerics.evaluate import evaluate
from training.numerics.reconstruction import Rows, reconstruction

SAME = {
    "l0": "l0", "l1": "l1", "mse": "mse", "cossim": "cosine", "l2_norm_in": "l2_norm_in", "l2_norm_out": "l2_norm_out",
    "l2_ratio": "l2_ratio", "relative_reconstruction_bias": "relative_reconstruction_bias",
    "explained_variance": "explained_variance", "explained_variance_legacy": "explained_variance_legacy",
}  # fmt: skip
ARCHITECTURES = ("topk", "standard")


PREDICTED = {
    "ce_loss_without_sae": "ce_original", "ce_loss_with_sae": "ce_with_sae", "ce_loss_with_ablation": "ce_zero_ablated",
    "kl_div_with_sae": "kl", "kl_div_with_ablation": "kl_zero_ablated",
}  # fmt: skip


@pytest.fixture(scope="module")
def lm(tiny_model_dir) -> LM:
    return tiny_lm("llama", tiny_model_dir)


@pytest.fixture(scope="module")
def contexts(lm) -> np.ndarray:
    return np.random.default_rng(1).integers(2, lm.vocab_size, size=(6, 20))


@pytest.fixture(scope="module")
def answers(ask_peers, tmp_path_factory, lm, contexts) -> dict[str, tuple[SAE, dict[str, Any]]]:
    """An SAE of each architecture and what SAELens says of it."""
    folder = tmp_path_factory.mktemp("evaluated")
    lm.model.save_pretrained(folder / "lm")
    lm.tokenizer.save_pretrained(folder / "lm")
    np.save(folder / "ids.npy", contexts)
    saes = {architecture: tiny_sae(architecture) for architecture in ARCHITECTURES}
    for architecture, sae in saes.items():
        save_sae(sae, folder / "saes" / architecture)
    np.save(folder / "x.npy", data(500).numpy())
    ask_peers(Path(__file__).with_name("evaluate_peer.py"), folder, lm.resolve(RESID).module)
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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_predictions_are_those_of_saelens(architecture, answers, lm, contexts):
    sae, theirs = answers[architecture]
    found = evaluate(sae, [data()], lm=lm, contexts=contexts, hook_name=RESID, batch_contexts=4)
    for name, ours in PREDICTED.items():
        assert found[ours]["value"] == pytest.approx(theirs[name], rel=1e-4), name
