"""An evaluation in the form of SAEBench's core results, so that it can stand beside published ones.

The keys are those of sae_bench.evals.core.eval_output.CoreEvalOutput (sae-bench 0.6). Two of its numbers are not what
their names say there, and are what they say here: explained_variance (its total variance squares before it averages) and
mse (divided by the batch's tokens once more). What SAEBench would have printed for the former is among the unstructured
results, with the definitions.
"""

import math
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saes.numerics.sae import SAE
from training.numerics.definitions import DEFINITIONS
from training.numerics.evaluate import Measured

UNDEFINED = -1.0  # what stands for a number that does not exist, as in SAELens' and SAEBench's own files
BATCH_PROMPTS = 4
CHUNK = 1024  # features whose cosines with all others are computed at once

CATEGORIES: dict[str, dict[str, str]] = {
    "model_behavior_preservation": {
        "kl_div_score": "kl_recovered",
        "kl_div_with_ablation": "kl_zero_ablated",
        "kl_div_with_sae": "kl",
    },
    "model_performance_preservation": {
        "ce_loss_score": "ce_recovered",
        "ce_loss_with_ablation": "ce_zero_ablated",
        "ce_loss_with_sae": "ce_with_sae",
        "ce_loss_without_sae": "ce_original",
    },
    "reconstruction_quality": {
        "explained_variance": "explained_variance",
        "explained_variance_legacy": "explained_variance_legacy",
        "mse": "mse",
        "cossim": "cosine",
    },
    "shrinkage": {
        "l2_norm_in": "l2_norm_in",
        "l2_norm_out": "l2_norm_out",
        "l2_ratio": "l2_ratio",
        "relative_reconstruction_bias": "relative_reconstruction_bias",
    },
    "sparsity": {"l0": "l0", "l1": "l1"},
}


@dataclass(frozen=True)
class Facts:
    """What the numbers do not tell: on what they were measured, and of which SAE. n_contexts: whose predictions were
    compared."""

    model_name: str
    dataset: str
    context_length: int
    n_contexts: int
    exclude_special: bool
    llm_dtype: str = "float32"
    sae_id: str | None = None
    release: str | None = None
    made_by: str = "SAEHub"
    sae_config: dict[str, Any] = field(default_factory=dict)


@torch.no_grad()
def core_output(
    sae: SAE, measured: Measured, facts: Facts, tick: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """The JSON of one core evaluation. tick(done, total) is called while the features' cosines are computed."""
    metrics, n = measured.metrics, measured.n
    features = _features(sae, measured, tick or (lambda done, total: None))
    undefined = [name for name, metric in metrics.items() if metric["value"] is None]
    return {
        "eval_type_id": "core",
        "eval_config": _config(facts, n),
        "eval_id": str(uuid.uuid4()),
        "datetime_epoch_millis": int(time.time() * 1000),
        "eval_result_metrics": {
            category: {theirs: _number(metrics, ours) for theirs, ours in names.items()}
            for category, names in CATEGORIES.items()
        }
        | {
            "token_stats": {
                "total_tokens_eval_reconstruction": facts.n_contexts * facts.context_length,
                "total_tokens_eval_sparsity_variance": n,
            },
            "misc_metrics": _misc(features),
        },
        "eval_result_details": _by_feature(features),
        "sae_bench_commit_hash": f"not run by SAEBench: {facts.made_by}",
        "sae_lens_id": facts.sae_id,
        "sae_lens_release_id": facts.release,
        "sae_lens_version": None,
        "sae_cfg_dict": facts.sae_config,
        "eval_result_unstructured": {
            "definitions": {
                f"{category}.{theirs}": DEFINITIONS[ours]
                for category, names in CATEGORIES.items()
                for theirs, ours in names.items()
            },
            "explained_variance_as_saebench_computes_it": _number(metrics, "explained_variance_saebench"),
            "not_defined_here": undefined,
        },
    }


def _config(facts: Facts, n: int) -> dict[str, Any]:
    asked = ("kl", "ce_loss", "l2_norms", "sparsity_metrics", "variance_metrics", "featurewise_density_statistics")
    return {
        "model_name": facts.model_name,
        "llm_dtype": facts.llm_dtype,
        "batch_size_prompts": BATCH_PROMPTS,
        "n_eval_reconstruction_batches": math.ceil(facts.n_contexts / BATCH_PROMPTS),
        "n_eval_sparsity_variance_batches": math.ceil(n / (facts.context_length * BATCH_PROMPTS)),
        "dataset": facts.dataset,
        "context_size": facts.context_length,
        **{f"compute_{name}": True for name in (*asked, "featurewise_weight_based_metrics")},
        "exclude_special_tokens_from_reconstruction": facts.exclude_special,
        "verbose": False,
    }


def _number(metrics: dict[str, Any], name: str) -> float:
    value = metrics.get(name, {}).get("value")
    return UNDEFINED if value is None else float(value)


# ---------------------------------------------------------------------------------------------------- features


def _features(sae: SAE, measured: Measured, tick: Callable[[int, int], None]) -> dict[str, Tensor]:
    """By SAEBench's names, each (d_sae,) float64."""
    tokens, contexts = measured.firing.tokens.double(), measured.firing.contexts.double()
    W_enc, W_dec = sae.W_enc.t().float(), sae.W_dec.float()
    bias = next((getattr(sae, name) for name in ("b_mag", "b_enc") if hasattr(sae, name)), W_enc.new_zeros(len(W_enc)))
    d_sae = len(W_dec)
    return {
        "feature_density": tokens / measured.n,
        "consistent_activation_heuristic": torch.where(contexts > 0, tokens / contexts, UNDEFINED),
        "encoder_bias": bias.double(),
        "encoder_norm": W_enc.norm(dim=-1).double(),
        "encoder_decoder_cosine_sim": torch.cosine_similarity(W_enc, W_dec, dim=-1).double(),
        "max_decoder_cosine_sim": largest_cosine(W_dec, lambda done: tick(done, 2 * d_sae)).double(),
        "max_encoder_cosine_sim": largest_cosine(W_enc, lambda done: tick(d_sae + done, 2 * d_sae)).double(),
    }


def largest_cosine(rows: Tensor, tick: Callable[[int], None] = lambda done: None) -> Tensor:
    """The largest cosine of each row (m, d) with any other; -1 for a row by itself."""
    unit = torch.nn.functional.normalize(rows, dim=-1)
    found = rows.new_full((len(rows),), UNDEFINED)
    for first in range(0, len(rows) if len(rows) > 1 else 0, CHUNK):
        cosines = unit[first : first + CHUNK] @ unit.t()
        cosines.diagonal(first).fill_(-math.inf)
        found[first : first + CHUNK] = cosines.amax(1)
        tick(min(first + CHUNK, len(rows)))
    return found


def _misc(features: dict[str, Tensor]) -> dict[str, float]:
    density = features["feature_density"]
    total = float(density.sum())
    shares = {}
    for words, bound in (("1_percent", 0.01), ("10_percent", 0.1)):
        above = density > bound
        shares[f"freq_over_{words}"] = float(above.double().mean())
        shares[f"normalized_freq_over_{words}"] = float(density[above].sum()) / total if total else 0.0
    return shares | {
        "average_max_encoder_cosine_sim": float(features["max_encoder_cosine_sim"].mean()),
        "average_max_decoder_cosine_sim": float(features["max_decoder_cosine_sim"].mean()),
        "frac_alive": float((density > 0).double().mean()),
    }


def _by_feature(features: dict[str, Tensor]) -> list[dict[str, float]]:
    columns = {name: [round(value, 6) for value in column.tolist()] for name, column in features.items()}
    return [
        {"index": index} | dict(zip(columns, values, strict=True))
        for index, values in enumerate(zip(*columns.values(), strict=True))
    ]
