"""Run by a Python that has the package: loads every SAE in a folder with it and writes the numbers it computes.

python dictionary_peer.py dictionary_learning|sparsify FOLDER     FOLDER/x.safetensors, FOLDER/<sae>/...
"""

import sys
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


def main(package: str, root: Path) -> None:
    x = load_file(root / "x.safetensors")["x"]
    numbers = {"dictionary_learning": dictionary_learning, "sparsify": sparsify}[package]
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        with torch.no_grad():
            made = numbers(folder, x)
        save_file({name: tensor.contiguous().clone() for name, tensor in made.items()}, folder / "numbers.safetensors")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
