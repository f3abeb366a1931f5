"""Writes training.safetensors: losses and gradients of SAELens' own training classes on copied weights.

    python tests/golden/make_training_golden.py        (with sae-lens 6 installed)

For each case: x, the parameters, the loss parts and the gradient of their sum. Inputs are drawn so that no
pre-activation lies on its threshold.
"""

from pathlib import Path

import torch
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.gated_sae import GatedTrainingSAE, GatedTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput
from safetensors.torch import save_file

D, D_SAE, N, K = 8, 24, 32, 3
COMMON = {"d_in": D, "d_sae": D_SAE, "dtype": "float32", "device": "cpu", "normalize_activations": "none"}
TOPK = {"k": K, "aux_loss_coefficient": 0.0, "rescale_acts_by_decoder_norm": False}
JUMP = {"jumprelu_bandwidth": 0.5, "jumprelu_init_threshold": 0.4}
CASES = {
    "gated": (GatedTrainingSAE, GatedTrainingSAEConfig, {"l1_coefficient": 0.7}, {"l1": 0.7}),
    "jumprelu": (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig, {"l0_coefficient": 0.3, **JUMP}, {"l0": 0.3}),
    "jumprelu_target": (
        JumpReLUTrainingSAE,
        JumpReLUTrainingSAEConfig,
        {"l0_coefficient": 0.2, "jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 4.0, **JUMP},
        {"l0": 0.2},
    ),
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, TOPK, {}),
    "matryoshka": (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
        {**TOPK, "matryoshka_widths": [6, 12, D_SAE]},
        {},
    ),
}


def main() -> None:
    tensors = {}
    for name, (cls, config, options, coefficients) in CASES.items():
        torch.manual_seed(0)
        sae = cls(config(**COMMON, **options))
        with torch.no_grad():
            for parameter_name, parameter in sae.named_parameters():
                if parameter_name != "threshold":
                    parameter.copy_(0.4 * torch.randn_like(parameter))
        x = torch.randn(N, D)
        step = TrainStepInput(
            sae_in=x, coefficients=coefficients, dead_neuron_mask=torch.zeros(D_SAE, dtype=torch.bool), n_training_steps=0,
            is_logging_step=False,
        )  # fmt: skip
        output = sae.training_forward_pass(step)
        output.loss.backward()
        for parameter_name, parameter in sae.named_parameters():
            tensors[f"{name}.{parameter_name}"] = parameter.detach().clone()
            grad = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            tensors[f"{name}.grad.{parameter_name}"] = grad
        for part, value in output.losses.items():
            tensors[f"{name}.loss.{part}"] = torch.as_tensor(value).detach().reshape(1)
        tensors |= {
            f"{name}.x": x,
            f"{name}.acts": output.feature_acts.detach(),
            f"{name}.loss": output.loss.detach().reshape(1),
        }
        print(name, {part: round(float(value), 4) for part, value in output.losses.items()})
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        Path(__file__).with_name("training.safetensors"),
    )


if __name__ == "__main__":
    main()
