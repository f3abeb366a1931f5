"""Run by a Python that has sae-lens (tests/peers.py): SAELens' own evaluation of SAEs, of what they reconstruct and predict.

FOLDER: FOLDER/x.npy (n, d), FOLDER/saes/*/ (SAELens format); writes {name: metrics} as FOLDER/metrics.json. The "model" is one
hook point behind a lookup table, so that every token's activation is a row of x. For predictions FOLDER/lm/ is a transformers
model, FOLDER/ids.npy (c, t) its contexts; `module` is where the SAE is."""

import json
from pathlib import Path

import numpy as np
import torch
from sae_lens.evals import get_recons_loss, get_sparsity_and_variance_metrics
from sae_lens.load_model import HookedProxyLM
from sae_lens.saes.sae import SAE
from sae_lens.training.activation_scaler import ActivationScaler
from transformer_lens.hook_points import HookedRootModule, HookPoint
from transformers import AutoModelForCausalLM, AutoTokenizer


class Table(HookedRootModule):
    def __init__(self, rows: torch.Tensor, hook_name: str) -> None:
        super().__init__()
        self.rows = rows
        self.point = HookPoint()
        self.setup()
        self.hook_dict = {hook_name: self.point}
        self.mod_dict = {hook_name: self.point}
        self.point.name = hook_name

    def forward(self, tokens: torch.Tensor, **_: object) -> torch.Tensor:
        return self.point(self.rows[tokens])


class Store:
    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens

    def get_batch_tokens(self, _: int) -> torch.Tensor:
        return self.tokens


@torch.no_grad()
def metrics(sae: SAE, x: torch.Tensor) -> dict[str, object]:
    tokens = torch.arange(len(x)).view(-1, 10)
    found, features = get_sparsity_and_variance_metrics(
        sae, Table(x, sae.cfg.metadata.hook_name), Store(tokens), ActivationScaler(), n_batches=1,
        compute_l2_norms=True, compute_sparsity_metrics=True, compute_variance_metrics=True,
        compute_featurewise_density_statistics=True, eval_batch_size_prompts=len(tokens), model_kwargs={},
    )  # fmt: skip
    return found | {name: np.nan_to_num(values, nan=-1).tolist() for name, values in features.items()}


@torch.no_grad()
def predictions(sae: SAE, folder: Path, module: str) -> dict[str, float]:
    sae.cfg.metadata.hook_name = module
    model = AutoModelForCausalLM.from_pretrained(folder / "lm", dtype=torch.float32)
    lm = HookedProxyLM(model, AutoTokenizer.from_pretrained(folder / "lm"), hook_names=[module])
    ids = torch.from_numpy(np.load(folder / "ids.npy"))
    each = get_recons_loss(sae, lm, ActivationScaler(), ids, compute_kl=True, compute_ce_loss=True)
    n = ids.shape[1] - 1  # KL comes at the last token too, which predicts nothing that is known
    return {name: float(values[:, :n].mean()) for name, values in each.items()}


def main(given: str, module: str) -> None:
    folder = Path(given)
    x = torch.from_numpy(np.load(folder / "x.npy"))
    saes = {path.name: SAE.load_from_disk(path) for path in (folder / "saes").iterdir()}
    found = {name: metrics(sae, x) | predictions(sae, folder, module) for name, sae in saes.items()}
    (folder / "metrics.json").write_text(json.dumps(found))
