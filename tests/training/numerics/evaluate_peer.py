"""Run by a Python that has sae-lens (tests/peers.py): SAELens' own evaluation of an SAE on a table of activations.

FOLDER: FOLDER/x.npy (n, d), FOLDER/*/ SAEs (SAELens format); writes {name: metrics} as FOLDER/metrics.json. The "model" is one
hook point behind a lookup table, so that every token's activation is a row of x."""

import json
from pathlib import Path

import numpy as np
import torch
from sae_lens.evals import get_sparsity_and_variance_metrics
from sae_lens.saes.sae import SAE
from sae_lens.training.activation_scaler import ActivationScaler
from transformer_lens.hook_points import HookedRootModule, HookPoint


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


def main(given: str) -> None:
    folder = Path(given)
    x = torch.from_numpy(np.load(folder / "x.npy"))
    saes = {path.name: SAE.load_from_disk(path) for path in folder.iterdir() if path.is_dir()}
    (folder / "metrics.json").write_text(json.dumps({name: metrics(sae, x) for name, sae in saes.items()}))
