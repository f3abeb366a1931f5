"""dictionary_learning and sparsify load what we write and compute the same numbers.

They run in an interpreter of their own (tests/peers.py), where it has them.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from saes.numerics.architectures import sae_class
from saes.numerics.formats import save_sae
from saes.numerics.sae import SAE, SAEConfig

SCRIPT = Path(__file__).with_name("dictionary_peer.py")
D, M, ROWS = 12, 60, 40
X = torch.randn(ROWS, D, generator=torch.Generator().manual_seed(4))
DETAILS = {"training_architecture_details": {"k": 6}}
NESTED = {"training_architecture_details": {"k": 6, "matryoshka_widths": [20, 60]}}
CASES: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "dictionary_learning": {
        "standard": ("standard", {}),
        "standard_new": ("standard", {"apply_b_dec_to_input": False}),
        "gated": ("gated", {}),
        "topk": ("topk", {"k": 6}),
        "jumprelu": ("jumprelu", {"apply_b_dec_to_input": False}),
        "batchtopk": ("jumprelu", {"metadata": DETAILS}),
        "matryoshka": ("jumprelu", {"metadata": NESTED}),
    },
    "sparsify": {
        "layers.1": ("topk", {"k": 6}),
        "layers.2": ("groupmax", {"k": 6}),
        "layers.3.mlp": ("topk_transcoder", {"k": 6, "apply_b_dec_to_input": False}),
        "layers.4.mlp": ("topk_skip_transcoder", {"k": 6, "apply_b_dec_to_input": False}),
        "layers.5.mlp": ("topk_skip_transcoder", {"k": 6}),
    },
}


def random_sae(architecture: str, options: dict[str, Any]) -> SAE:
    config = SAEConfig(architecture, D, M, hook_name="blocks.2.hook_resid_post", model_name="gpt2", **options)
    sae, generator = sae_class(architecture)(config), torch.Generator().manual_seed(3)
    for name, parameter in sae.named_parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        if name == "threshold":
            parameter.data.copy_(parameter.abs() if not config.apply_b_dec_to_input else torch.full((M,), 0.4))
    # Rows of norm 1: the package's own loader would scale others, and the codes with them.
    sae.W_dec.data.copy_(torch.nn.functional.normalize(sae.W_dec.data, dim=-1))
    return sae


@pytest.fixture(scope="module")
def read(ask_peers, tmp_path_factory):
    """A folder of SAEs that we wrote for each package, beside the numbers it computed of them."""
    folder = tmp_path_factory.mktemp("read")
    save_file({"x": X}, folder / "x.safetensors")
    for package, cases in CASES.items():
        for name, case in cases.items():
            save_sae(random_sae(*case), folder / package / name, format=package)
    ask_peers(SCRIPT, folder)
    return folder


@pytest.mark.parametrize("package", CASES)
def test_the_package_reads_what_we_write(package, read):
    x = X
    saes = {name: random_sae(*case) for name, case in CASES[package].items()}
    if not any((read / package).glob("*/numbers.safetensors")):
        pytest.skip(f"the peers' Python has no {package}")
    for name, sae in saes.items():
        theirs = load_file(read / package / name / "numbers.safetensors")
        with torch.no_grad():
            acts, x_hat = sae.encode(x), sae(x)
        assert torch.equal(acts != 0, theirs["feature_acts"] != 0), name
        torch.testing.assert_close(acts, theirs["feature_acts"], rtol=1e-4, atol=2e-5, msg=name)
        torch.testing.assert_close(x_hat, theirs["x_hat"], rtol=1e-4, atol=5e-5, msg=name)
