"""The peer of bench_evaluate.py, run by the interpreter that has sae-lens: its own evaluation, of the same model and tokens.

Reads the name of a part a line, answers with its seconds and what it measured, as JSON.
"""

import json
import sys
import time

import numpy as np
import torch
from sae_lens.evals import get_downstream_reconstruction_metrics, get_sparsity_and_variance_metrics
from sae_lens.load_model import HookedProxyLM
from sae_lens.saes.sae import SAE
from sae_lens.training.activation_scaler import ActivationScaler
from transformers import AutoModelForCausalLM, AutoTokenizer


class Store:
    """The tokens, a batch at a time, over and over: what tokenising costs is not measured."""

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids, self.at = ids, 0

    def get_batch_tokens(self, n: int) -> torch.Tensor:
        batch = self.ids[self.at : self.at + n]
        self.at = (self.at + n) % len(self.ids)
        return batch


@torch.no_grad()
def main(given: dict[str, str | int]) -> None:
    model = AutoModelForCausalLM.from_pretrained(given["model"], dtype=torch.float32)
    sae = SAE.load_from_disk(given["sae"])
    sae.cfg.metadata.hook_name = given["module"]
    lm = HookedProxyLM(model, AutoTokenizer.from_pretrained(given["model"]), hook_names=[str(given["module"])])
    ids = torch.from_numpy(np.load(str(given["ids"])).astype(np.int64))
    batch = int(given["batch"])
    common = {
        "sae": sae, "model": lm, "activation_store": Store(ids), "activation_scaler": ActivationScaler(),
        "n_batches": len(ids) // batch, "eval_batch_size_prompts": batch, "model_kwargs": {},
    }  # fmt: skip
    parts = {
        "predictions": lambda: get_downstream_reconstruction_metrics(**common, compute_kl=True, compute_ce_loss=True),
        "reconstruction": lambda: get_sparsity_and_variance_metrics(
            **common, compute_l2_norms=True, compute_sparsity_metrics=True, compute_variance_metrics=True,
            compute_featurewise_density_statistics=True,
        )[0],
    }  # fmt: skip
    for line in sys.stdin:
        began = time.perf_counter()
        found = parts[line.strip()]()
        print(json.dumps({"seconds": time.perf_counter() - began, "found": found}), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(2)
    main(json.loads(sys.argv[1]))
