"""Writes transcoders.safetensors: losses and gradients of transcoders by sparsify and SAELens, of random weights.

    python tests/golden/make_transcoder_golden.py      (with sae-lens 6 and eai-sparsify 1.3 installed)

TopK is sparsify's own training loss (transcode, with and without skip_connection). SAELens trains no transcoders: its
JumpReLU ones are its transcoders' weights under its JumpReLU training loss, whose target is then another tensor.
"""

from pathlib import Path

import torch
from sae_lens.saes.jumprelu_sae import JumpReLU, Step
from sae_lens.saes.transcoder import (
    JumpReLUSkipTranscoder,
    JumpReLUSkipTranscoderConfig,
    JumpReLUTranscoder,
    JumpReLUTranscoderConfig,
)
from safetensors.torch import save_file
from sparsify.config import SparseCoderConfig
from sparsify.sparse_coder import SparseCoder

D, D_OUT, D_SAE, N, K = 8, 6, 24, 32, 3
BANDWIDTH, L0 = 0.5, 0.3
JUMPRELU = {
    "jumprelu_transcoder": (JumpReLUTranscoder, JumpReLUTranscoderConfig),
    "jumprelu_skip_transcoder": (JumpReLUSkipTranscoder, JumpReLUSkipTranscoderConfig),
}


def randomise(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter))


def topk(skip: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    config = SparseCoderConfig(num_latents=D_SAE, k=K, transcode=True, skip_connection=skip, normalize_decoder=False)
    sae = SparseCoder(D, config, dtype=torch.float32)
    randomise(sae)
    x, y = torch.randn(N, D), torch.randn(N, D) + 1
    output = sae(x, y)
    output.fvu.backward()
    names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc"}
    found = {"x": x, "y": y, "loss": output.fvu.detach().reshape(1)}
    for name, parameter in sae.named_parameters():
        turned = (lambda t: t.t()) if name == "encoder.weight" else (lambda t: t)
        found[names.get(name, name)] = turned(parameter.detach())
        found[f"grad.{names.get(name, name)}"] = turned(parameter.grad)
    return found


def jumprelu(name: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    cls, config = JUMPRELU[name]
    sae = cls(config(d_in=D, d_out=D_OUT, d_sae=D_SAE, dtype="float32", device="cpu", apply_b_dec_to_input=False))
    randomise(sae)
    with torch.no_grad():
        sae.threshold.copy_(0.2 + 0.4 * torch.rand(D_SAE))
    x, y = torch.randn(N, D), torch.randn(N, D_OUT)
    z = sae.process_sae_in(x) @ sae.W_enc + sae.b_enc
    acts = JumpReLU.apply(z, sae.threshold, BANDWIDTH, False)
    y_hat = sae.decode(acts) + (x @ sae.W_skip.T if "skip" in name else 0)
    assert torch.equal(y_hat, sae(x)), "what SAELens' forward gives"
    loss = (y_hat - y).pow(2).sum(-1).mean() + L0 * Step.apply(z, sae.threshold, BANDWIDTH, False).sum(-1).mean()
    loss.backward()
    found = {"x": x, "y": y, "loss": loss.detach().reshape(1)}
    for key, parameter in sae.named_parameters():
        found |= {key: parameter.detach(), f"grad.{key}": parameter.grad}
    return found


def main() -> None:
    cases = {"topk_transcoder": topk(False), "topk_skip_transcoder": topk(True)}
    cases |= {name: jumprelu(name) for name in JUMPRELU}
    save_file(
        {f"{case}.{name}": tensor.contiguous() for case, found in cases.items() for name, tensor in found.items()},
        Path(__file__).with_name("transcoders.safetensors"),
    )
    print({case: round(float(found["loss"]), 4) for case, found in cases.items()})


if __name__ == "__main__":
    main()
