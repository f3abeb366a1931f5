"""SAEBench's core JSON: the keys of its own schema, and numbers held against computations by hand.

With SAEBENCH set to a Python that has sae-bench (pip install --no-deps sae-bench pydantic), its own classes read the file.
"""

import json
import os
import subprocess

import pytest
import torch

from tests.tiny_models import tiny_sae
from tests.training.numerics.test_training_evaluate import data
from training.numerics.definitions import metric
from training.numerics.evaluate import Measured
from training.numerics.reconstruction import Rows, reconstruction
from training.numerics.saebench import CHUNK, Facts, core_output, largest_cosine

CATEGORIES = {
    "model_behavior_preservation": {"kl_div_score", "kl_div_with_ablation", "kl_div_with_sae"},
    "model_performance_preservation": {
        "ce_loss_score", "ce_loss_with_ablation", "ce_loss_with_sae", "ce_loss_without_sae",
    },
    "reconstruction_quality": {"explained_variance", "explained_variance_legacy", "mse", "cossim"},
    "shrinkage": {"l2_norm_in", "l2_norm_out", "l2_ratio", "relative_reconstruction_bias"},
    "sparsity": {"l0", "l1"},
    "token_stats": {"total_tokens_eval_reconstruction", "total_tokens_eval_sparsity_variance"},
    "misc_metrics": {
        "freq_over_1_percent", "freq_over_10_percent", "normalized_freq_over_1_percent", "normalized_freq_over_10_percent",
        "average_max_encoder_cosine_sim", "average_max_decoder_cosine_sim", "frac_alive",
    },
}  # fmt: skip
DETAILS = {
    "index", "feature_density", "consistent_activation_heuristic", "encoder_bias", "encoder_norm",
    "encoder_decoder_cosine_sim", "max_decoder_cosine_sim", "max_encoder_cosine_sim",
}  # fmt: skip
TOP = {
    "eval_type_id", "eval_config", "eval_id", "datetime_epoch_millis", "eval_result_metrics", "eval_result_details",
    "sae_bench_commit_hash", "sae_lens_id", "sae_lens_release_id", "sae_lens_version", "sae_cfg_dict",
    "eval_result_unstructured",
}  # fmt: skip
FACTS = Facts("tiny", "sentences", 10, 4, True, sae_id="an-sae", sae_config={"d_in": 32})


@pytest.fixture
def made():
    sae, x = tiny_sae("standard"), data(100) - data(100).mean(0)
    with torch.no_grad():
        sae.b_enc[3] = -1e6
    found = reconstruction(sae, [Rows(x, None, torch.arange(100).numpy() // 10)])
    metrics = {name: metric(name, value, found.n, "rows") for name, value in found.values.items()}
    metrics |= {name: metric(name, 0.5, 36, "rows") for name in ("ce_original", "ce_with_sae", "ce_zero_ablated", "kl")}
    return sae, x, core_output(sae, Measured(metrics, found.firing, found.n), FACTS)


def test_the_keys_are_those_of_the_schema(made):
    sae, _, output = made
    assert set(output) == TOP and output["eval_type_id"] == "core"
    assert {name: set(numbers) for name, numbers in output["eval_result_metrics"].items()} == CATEGORIES
    assert [set(row) for row in output["eval_result_details"]] == [DETAILS] * sae.config.d_sae
    json.dumps(output, allow_nan=False)


def test_the_numbers_are_those_of_the_metrics_and_of_the_weights(made):
    sae, x, output = made
    metrics, details = output["eval_result_metrics"], output["eval_result_details"]
    with torch.no_grad():
        fired = sae.encode(x) != 0
    density = fired.double().mean(0)
    assert metrics["sparsity"]["l0"] == pytest.approx(float(fired.sum(1).double().mean()))
    assert metrics["token_stats"] == {
        "total_tokens_eval_reconstruction": 40, "total_tokens_eval_sparsity_variance": 100,
    }  # fmt: skip
    misc = metrics["misc_metrics"]
    assert misc["frac_alive"] == pytest.approx(float((density > 0).double().mean())) and misc["frac_alive"] < 1
    assert misc["freq_over_10_percent"] == pytest.approx(float((density > 0.1).double().mean()))
    assert misc["normalized_freq_over_1_percent"] == pytest.approx(float(density[density > 0.01].sum() / density.sum()))
    per_context = fired.view(10, 10, -1).any(1).sum(0)
    live = int(density.argmax())
    assert details[live]["consistent_activation_heuristic"] == pytest.approx(
        float(fired[:, live].sum() / per_context[live]), abs=1e-5
    )
    assert details[3]["feature_density"] == 0 and details[3]["consistent_activation_heuristic"] == -1
    assert details[5]["encoder_norm"] == pytest.approx(float(sae.W_enc[:, 5].norm()), abs=1e-5)
    assert metrics["model_behavior_preservation"]["kl_div_score"] == -1, "what was not measured is not made up"


def test_the_largest_cosine_with_another_row(monkeypatch):
    rows = torch.randn(37, 8, generator=torch.Generator().manual_seed(0))
    cosines = torch.cosine_similarity(rows[:, None], rows[None], dim=-1).fill_diagonal_(-2)
    for chunk in (CHUNK, 5):
        monkeypatch.setattr("training.numerics.saebench.CHUNK", chunk)
        torch.testing.assert_close(largest_cosine(rows), cosines.amax(1))


READ = """
import json, sys
from pydantic import TypeAdapter
from sae_bench.evals.core.eval_output import CoreEvalOutput
found = TypeAdapter(CoreEvalOutput).validate_python(json.load(open(sys.argv[1])))
print(found.eval_result_metrics.sparsity.l0, len(found.eval_result_details))
"""


@pytest.mark.skipif("SAEBENCH" not in os.environ, reason="needs SAEBENCH=a Python with sae-bench and pydantic")
def test_saebench_itself_reads_it(made, tmp_path):
    sae, _, output = made
    (tmp_path / "core.json").write_text(json.dumps(output))
    read = subprocess.run(
        [os.environ["SAEBENCH"], "-c", READ, str(tmp_path / "core.json")], capture_output=True, text=True, check=True
    )
    l0, features = read.stdout.split()
    assert float(l0) == pytest.approx(output["eval_result_metrics"]["sparsity"]["l0"])
    assert int(features) == sae.config.d_sae
