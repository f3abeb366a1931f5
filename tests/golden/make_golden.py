"""Makes the golden SAEs beside this file: small ones written by SAELens, with the numbers SAELens computes from them.

Needs SAELens in an environment of its own (it is no dependency of this project):

    make peers && .venv-peers/bin/python tests/golden/make_golden.py

Each case is a folder with SAELens' own cfg.json and sae_weights.safetensors, and golden.safetensors with
x (rows, d_in), feature_acts = encode(x) and x_hat = forward(x). The legacy case has the flat cfg.json that SAELens 5
wrote, by hand, and the numbers of what SAELens 6 makes of it.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
from sae_lens.registry import get_sae_class
from safetensors.torch import save_file

HERE = Path(__file__).parent
D_IN, D_SAE, ROWS = 12, 32, 16
MARGIN = 1e-3  # no feature may sit on its threshold, so that the active set is the same on every machine

MORE: dict[str, dict[str, Any]] = {
    "jumprelu": {"normalize_activations": "layer_norm"},
    "gated": {"apply_b_dec_to_input": False},
    "jumprelu_skip_transcoder": {"d_out": 10, "apply_b_dec_to_input": False},
    "matching_pursuit": {"max_iterations": 5, "residual_threshold": 0.1},
}
LEGACY = {
    "architecture": "standard",
    "activation_fn_str": "topk",
    "activation_fn_kwargs": {"k": 5},
    "hook_name": "blocks.3.hook_resid_post",
    "hook_layer": 3,
    "model_name": "gpt2-small",
    "d_in": D_IN,
    "d_sae": D_SAE,
    "dtype": "torch.float32",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "finetuning_scaling_factor": False,
    "sae_lens_training_version": "5.11.0",
}


def main() -> None:
    torch.manual_seed(0)
    make("saelens_standard", StandardSAE, StandardSAEConfig(**options()))
    make("saelens_topk", TopKSAE, TopKSAEConfig(**options(), k=5))
    make("saelens_topk_rescale", TopKSAE, TopKSAEConfig(**options(), k=5, rescale_acts_by_decoder_norm=True))
    for architecture, more in MORE.items():
        cls, config = get_sae_class(architecture)
        make(f"saelens_{architecture}", cls, config(**options(), **more))
    make("saelens_legacy_topk", StandardSAE, StandardSAEConfig(**options()), LEGACY)


def options() -> dict[str, Any]:
    return {"d_in": D_IN, "d_sae": D_SAE}


def make(name: str, cls: type, config: Any, legacy: dict[str, Any] | None = None) -> None:
    config.metadata.model_name = "gpt2-small"
    config.metadata.hook_name = "blocks.3.hook_resid_post"
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    sae = cls(config)
    for key, parameter in sae.named_parameters():  # decoder rows of unequal norms, biases that are not zero
        parameter.data = torch.randn_like(parameter) * 0.5
        if key == "threshold":
            parameter.data.abs_()
    if name == "saelens_matching_pursuit":
        sae.W_dec.data /= sae.W_dec.data.norm(dim=-1, keepdim=True)
    sae.save_model(folder)
    if legacy is not None:
        (folder / "cfg.json").write_text(json.dumps(legacy))
    sae = SAE.load_from_disk(folder)
    x = clear_inputs(sae)
    acts = sae.encode(x)
    save_file({"x": x, "feature_acts": acts.detach(), "x_hat": sae(x).detach()}, folder / "golden.safetensors")


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
