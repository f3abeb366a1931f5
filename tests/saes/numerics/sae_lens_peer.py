"""What test_saes_peers asks of SAELens itself, in an interpreter that has it (tests/peers.py).

make FOLDER     one small SAE of every architecture, saved by SAELens, with the numbers it computes
read FOLDER     for every folder in FOLDER that holds an SAE and x.safetensors: the numbers SAELens computes from it
"""

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

from sae_lens import SAE  # noqa: E402
from sae_lens.registry import get_sae_class, get_sae_training_class  # noqa: E402
from sae_lens.saes.sae import TrainingSAE  # noqa: E402
from sae_lens.training.activation_scaler import ActivationScaler, ActivationWhitening  # noqa: E402
from sae_lens_cases import D_IN, D_SAE, HEADS, INFERENCE, ROWS, TRAINING  # noqa: E402  # beside this file


def main(command: str, folder: str) -> None:
    torch.manual_seed(0)
    {"make": make, "read": read}[command](Path(folder))


@torch.no_grad()
def make(folder: Path) -> None:
    for name, (architecture, options) in INFERENCE.items():
        cls, config = get_sae_class(architecture)
        sae = randomised(cls, config, options)
        sae.save_model(folder / name)
        loaded = SAE.load_from_disk(folder / name, dtype="float32")  # numbers in float32, whatever the storage
        save_file(numbers(loaded, inputs(architecture)), folder / name / "numbers.safetensors")
    for name, (architecture, options) in TRAINING.items():
        cls, config = get_sae_training_class(architecture)
        sae = randomised(cls, config, options)
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold.fill_(0.7)
        sae.save_model(folder / name)
        scaler = scaler_of(name)
        scaler.save(str(folder / name / "activation_scaler.json"))
        (folder / name / "trainer_state.pt").write_bytes(b"never opened")
        save_file(training_numbers(sae, scaler, folder / name), folder / name / "numbers.safetensors")


def randomised(cls: Any, config: Any, options: dict[str, Any]) -> Any:
    """Decoder rows of unequal norms, biases that are not zero, thresholds above 0."""
    sae = cls(config(d_in=D_IN, d_sae=D_SAE, **options))
    sae.cfg.metadata.model_name = "gpt2-small"
    sae.cfg.metadata.hook_name = (
        "blocks.3.attn.hook_z" if "reshape_activations" in options else "blocks.3.hook_resid_post"
    )
    for name, parameter in sae.named_parameters():
        parameter.data = (torch.randn(parameter.shape) * (0.2 if "r_mag" in name else 0.5)).to(parameter.dtype)
        if "threshold" in name:
            parameter.data.abs_()
    if sae.cfg.architecture() == "matching_pursuit":
        sae.W_dec.data /= sae.W_dec.data.norm(dim=-1, keepdim=True)
    return sae


def inputs(architecture: str) -> torch.Tensor:
    return torch.randn(2, ROWS, D_IN) if architecture == "temporal" else torch.randn(ROWS, D_IN)


def numbers(sae: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What SAELens makes of x (n, d_in); hook_z SAEs are given the heads apart and put together again."""
    hook_z = sae.cfg.reshape_activations == "hook_z"
    given = x.unflatten(-1, (HEADS, -1)) if hook_z else x
    acts, x_hat = sae.encode(given), sae(given)
    return {"x": x, "feature_acts": acts.float(), "x_hat": (x_hat.flatten(-2) if hook_z else x_hat).float()}


def scaler_of(name: str) -> ActivationScaler:
    if name.startswith("scaled"):
        return ActivationScaler(scaling_factor=0.37)
    if not name.startswith("whitened"):
        return ActivationScaler()
    matrix = torch.eye(D_IN, dtype=torch.float64) + 0.1 * torch.randn(D_IN, D_IN, dtype=torch.float64)
    mean = torch.randn(D_IN, dtype=torch.float64)
    return ActivationScaler(whitening=ActivationWhitening(mean, matrix, torch.linalg.inv(matrix).contiguous()))


def training_numbers(sae: Any, scaler: ActivationScaler, folder: Path) -> dict[str, torch.Tensor]:
    """What SAELens makes of x with the scaler folded in: by the SAE in training, and by the one that is saved after it."""
    x = torch.randn(ROWS, D_IN)
    if scaler.scaling_factor is not None:
        sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
    if scaler.whitening is not None:
        white = scaler.whitening
        sae.fold_activation_whitening(white.mean, white.matrix, white.inverse_matrix)
    sae.save_inference_model(folder.with_name(folder.name + "_done"))
    done = SAE.load_from_disk(folder.with_name(folder.name + "_done"))
    save_file(numbers(done, x), folder.with_name(folder.name + "_done") / "numbers.safetensors")
    acts = sae.encode(x)
    return {"x": x, "feature_acts": acts, "x_hat": sae.decode(acts)}


@torch.no_grad()
def read(folder: Path) -> None:
    for place in sorted(path.parent for path in folder.glob("*/x.safetensors")):
        cfg_only = SAE.load_from_disk(place, dtype="float32")
        assert not isinstance(cfg_only, TrainingSAE)
        save_file(numbers(cfg_only, load_file(place / "x.safetensors")["x"]), place / "numbers.safetensors")
