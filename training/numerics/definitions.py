"""What every measured number means. A metric is stored as {"value", "definition", "n", "data"}; the formulas are here.

The definitions are the field's (SAELens' for explained variance and the CE score). Where others print something else
under the same name it is here under a name of its own, so that a published number can be found again.
"""

import math
from typing import Any

Metric = dict[str, Any]

INTERVENED = "positions of tokens whose activations the token policy does not store are left as they are"

DEFINITIONS: dict[str, str] = {
    "l0": "mean over tokens of the number of features with acts_i != 0",
    "l1": "mean over tokens of sum_i |acts_i|",
    "mse": "mean over tokens of sum_d (x_hat - x)^2",
    "mse_per_dimension": "mse / d_out",
    "explained_variance": "1 - E|x - x_hat|^2 / (E|x|^2 - |E x|^2)",
    "fvu": "E|x - x_hat|^2 / (E|x|^2 - |E x|^2) = 1 - explained_variance",
    "explained_variance_per_dimension": "mean over dimensions d of 1 - E(x_d - x_hat_d)^2 / Var(x_d); those that never "
    "vary left out",
    "explained_variance_centred": "1 - sum_d Var(x_d - x_hat_d) / sum_d Var(x_d), blind to an error of the mean "
    "(dictionary_learning's frac_variance_explained)",
    "explained_variance_legacy": "mean over tokens of 1 - |x - x_hat|^2 / |x - mean x|^2, the mean that of 4,096 tokens "
    "(SAELens until 2025; SAEBench still prints it)",
    "explained_variance_saebench": "1 - E|x - x_hat|^2 / (E|x|^2 - (E|x|^2 / d_out)^2), as SAEBench 0.6 computes it: may "
    "exceed 1",
    "cosine": "mean over tokens of cos(x, x_hat)",
    "l2_norm_in": "mean over tokens of |x|",
    "l2_norm_out": "mean over tokens of |x_hat|",
    "l2_ratio": "mean over tokens of |x_hat| / |x|",
    "relative_reconstruction_bias": "E|x_hat|^2 / E[x . x_hat]; below 1 means shrinkage",
    "dead_features": "number of features with acts_i = 0 on every one of the n tokens (more tokens, fewer dead)",
    "alive_fraction": "1 - dead_features / d_sae",
    "dense_features": "number of features firing on more than 10 % of the n tokens",
    "density_histogram": "features by log10(firing rate), firing rate = tokens with acts_i != 0 / n; dead ones apart",
    "ce_original": "mean cross-entropy (nats) of the next token, model untouched",
    "ce_with_sae": f"the same with x replaced by x_hat at the hook point; {INTERVENED}",
    "ce_zero_ablated": f"the same with x replaced by 0 at the hook point; {INTERVENED}",
    "ce_increase": "ce_with_sae - ce_original",
    "ce_recovered": "(ce_zero_ablated - ce_with_sae) / (ce_zero_ablated - ce_original)",
    "ce_mean_ablated": f"the same with x replaced by its mean over the n tokens of the reconstruction; {INTERVENED}",
    "ce_recovered_mean": "(ce_mean_ablated - ce_with_sae) / (ce_mean_ablated - ce_original)",
    "kl": "mean over predictions of KL(p_original || p_with_sae), nats",
    "kl_zero_ablated": "mean over predictions of KL(p_original || p_zero_ablated), nats",
    "kl_recovered": "1 - kl / kl_zero_ablated",
}


class EvaluationError(ValueError):
    """An evaluation that cannot be made; the message is one sentence."""


def metric(name: str, value: Any, n: int, data: str) -> Metric:
    """One number with what it means; null where it is not defined."""
    defined = None if isinstance(value, float) and not math.isfinite(value) else value
    return {"value": defined, "definition": name, "n": n, "data": data}
