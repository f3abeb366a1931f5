"""Makes the golden SAEs beside this file: small ones written by SAELens, with the numbers SAELens computes from them.

Needs SAELens in an environment of its own (it is no dependency of this project):

    python3 -m venv /tmp/saelens && /tmp/saelens/bin/pip install torch==2.13.0 sae-lens==6.54.12
    /tmp/saelens/bin/python tests/golden/make_golden.py

Each case is a folder with SAELens' own cfg.json and sae_weights.safetensors, and golden.safetensors with
x (rows, d_in), feature_acts = encode(x) and x_hat = decode(feature_acts).
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
from safetensors.torch import save_file

HERE = Path(__file__).parent
D_IN, D_SAE, ROWS = 12, 32, 16
MARGIN = 1e-3  # no feature may sit on its threshold, so that the active set is the same on every machine


def main() -> None:
    torch.manual_seed(0)
    make("saelens_standard", StandardSAE, StandardSAEConfig(**options()))
    make("saelens_topk", TopKSAE, TopKSAEConfig(**options(), k=5))
    make("saelens_topk_rescale", TopKSAE, TopKSAEConfig(**options(), k=5, rescale_acts_by_decoder_norm=True))


def options() -> dict[str, Any]:
    return {"d_in": D_IN, "d_sae": D_SAE}


def make(name: str, cls: type, config: Any) -> None:
    config.metadata.model_name = "gpt2-small"
    config.metadata.hook_name = "blocks.3.hook_resid_post"
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    sae = cls(config)
    for parameter in sae.parameters():  # decoder rows of unequal norms, biases that are not zero
        parameter.data = torch.randn_like(parameter) * 0.5
    sae.save_model(folder)
    sae = SAE.load_from_disk(folder)
    x = clear_inputs(sae)
    acts = sae.encode(x)
    save_file(
        {"x": x, "feature_acts": acts.detach(), "x_hat": sae.decode(acts).detach()}, folder / "golden.safetensors"
    )


def clear_inputs(sae: Any) -> torch.Tensor:
    """Rows for which a little noise does not change which features fire."""
    rows: list[torch.Tensor] = []
    while len(rows) < ROWS:
        x = torch.randn(1, D_IN)
        near = sae.encode(x + MARGIN * torch.randn(200, D_IN)) > 0
        if bool((near == near[0]).all()):
            rows.append(x)
    return torch.cat(rows)


if __name__ == "__main__":
    main()
