"""Run by a Python that has peers (tests/peers.py): loads SAEs with them and writes the numbers they compute.

FOLDER     FOLDER/x.safetensors, FOLDER/dictionary_learning/<sae>/..., FOLDER/sparsify/<sae>/...

One that is not installed is left out.
"""

from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def dictionary_learning(folder: Path, x: torch.Tensor) -> dict[str, torch.Tensor]:
    from dictionary_learning.utils import load_dictionary

    ae, _config = load_dictionary(str(folder), "cpu")
    acts = ae.encode(x)
    return {"feature_acts": acts, "x_hat": ae.decode(acts)}


def sparsify(folder: Path, x: torch.Tensor) -> dict[str, torch.Tensor]:
    from sparsify import SparseCoder

    coder = SparseCoder.load_from_disk(folder).float()
    values, indices, _ = coder.encode(x)
    acts = torch.zeros(len(x), coder.num_latents).scatter(-1, indices, values)
    return {"feature_acts": acts, "x_hat": coder(x).sae_out}


def main(given: str) -> None:
    root = Path(given)
    x = load_file(root / "x.safetensors")["x"]
    for numbers in (dictionary_learning, sparsify):
        if not find_spec(numbers.__name__):
            continue
        for folder in sorted((root / numbers.__name__).iterdir()):
            with torch.no_grad():
                made = numbers(folder, x)
            tensors = {name: tensor.contiguous().clone() for name, tensor in made.items()}
            save_file(tensors, folder / "numbers.safetensors")
