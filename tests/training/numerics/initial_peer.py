"""Run by a Python that has peers (tests/peers.py): the weights that their own classes begin with, and the generator's state before.

OUT     writes OUT/<peer>/<architecture>.safetensors for every peer that is installed
"""

from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_file

D_IN, D_SAE, K, SEED = 24, 96, 4, 7


def saelens(architecture: str) -> dict[str, torch.Tensor]:
    import sae_lens

    kinds = {
        "standard": ("Standard", {}), "gated": ("Gated", {}), "jumprelu": ("JumpReLU", {}), "topk": ("TopK", {"k": K}),
        "batchtopk": ("BatchTopK", {"k": K}),
        "matryoshka": ("MatryoshkaBatchTopK", {"k": K, "matryoshka_widths": [32, D_SAE]}),
    }  # fmt: skip
    name, more = kinds[architecture]
    config = getattr(sae_lens, f"{name}TrainingSAEConfig")(d_in=D_IN, d_sae=D_SAE, **more)
    torch.manual_seed(SEED)
    return named(getattr(sae_lens, f"{name}TrainingSAE")(config))


def named(sae: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in sae.named_parameters()}


def sparsify(architecture: str) -> dict[str, torch.Tensor]:
    from sparsify import SparseCoder, SparseCoderConfig

    torch.manual_seed(SEED)
    coder = SparseCoder(D_IN, SparseCoderConfig(num_latents=D_SAE, k=K))
    return {"W_enc": coder.encoder.weight.T, "W_dec": coder.W_dec, "b_enc": coder.encoder.bias}


def dictionary_learning(architecture: str) -> dict[str, torch.Tensor]:
    from dictionary_learning.dictionary import AutoEncoder, GatedAutoEncoder, JumpReluAutoEncoder
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    torch.manual_seed(SEED)
    if architecture in ("standard", "gated"):  # both make two Linears first, whose weights they throw away
        torch.nn.Linear(D_IN, D_SAE, bias=architecture == "standard")
        torch.nn.Linear(D_SAE, D_IN, bias=False)
        STATES[architecture] = torch.get_rng_state()
        torch.manual_seed(SEED)
    made = {
        "standard": lambda: AutoEncoder(D_IN, D_SAE),
        "gated": lambda: GatedAutoEncoder(D_IN, D_SAE),
        "jumprelu": lambda: JumpReluAutoEncoder(D_IN, D_SAE),
        "topk": lambda: AutoEncoderTopK(D_IN, D_SAE, K),
        "batchtopk": lambda: BatchTopKSAE(D_IN, D_SAE, K),
        "matryoshka": lambda: MatryoshkaBatchTopKSAE(D_IN, D_SAE, K, [32, D_SAE - 32]),
    }[architecture]()
    found = named(made)
    if "W_enc" in found:
        return found
    return {"W_enc": made.encoder.weight.T, "W_dec": made.decoder.weight.T}


STATES: dict[str, torch.Tensor] = {}


def median(x: torch.Tensor) -> torch.Tensor:
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer

    return BatchTopKTrainer.geometric_median(x)


def begin(peer: str, out: Path) -> None:
    kinds = ["topk"] if peer == "sparsify" else ["standard", "gated", "jumprelu", "topk", "batchtopk", "matryoshka"]
    make = PEERS[peer][1]
    for kind in kinds:
        torch.manual_seed(SEED)
        STATES[kind] = torch.get_rng_state()
        tensors = make(kind)
        tensors = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
        save_file(tensors | {"state": STATES[kind]}, out / f"{kind}.safetensors")
    if peer == "dictionary_learning":
        x = torch.randn(200, D_IN) * torch.rand(D_IN) + torch.randn(D_IN)
        save_file({"x": x, "median": median(x)}, out / "median.safetensors")


PEERS = {
    "saelens": ("sae_lens", saelens),
    "sparsify": ("sparsify", sparsify),
    "dictionary_learning": ("dictionary_learning", dictionary_learning),
}


def main(out: str) -> None:
    for peer, (module, _) in PEERS.items():
        if find_spec(module):
            (folder := Path(out) / peer).mkdir()
            begin(peer, folder)
