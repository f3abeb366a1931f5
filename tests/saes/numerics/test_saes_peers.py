"""SAELens as second implementation: what it saves we load, what we save it loads, and the numbers are the same."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from saes.numerics.formats import NotRepresentable, detect_format, load_sae, save_sae
from saes.numerics.sae import SAE
from tests.saes.numerics.sae_lens_cases import INFERENCE, TRAINING

SCRIPT = Path(__file__).with_name("sae_lens_peer.py")
DONE = [f"{name}_done" for name in TRAINING]
# Of these cases miStudio has no form: the architecture, the normalisation, or a b_dec that is not subtracted.
NOT_MISTUDIOS = ("gated", "abstopk", "pursuit", "temporal", "transcoder", "layer_norm", "bf16", "whitened_jumprelu")


@pytest.fixture(scope="module")
def made(ask_peers, tmp_path_factory) -> Path:
    """SAEs that SAELens saved."""
    folder = tmp_path_factory.mktemp("made")
    ask_peers(SCRIPT, "make", folder)
    return folder


@pytest.fixture(scope="module")
def returned(made, ask_peers, tmp_path_factory) -> Path:
    """The same SAEs, loaded and saved by us (the last folder name says in which format), and read by SAELens."""
    folder = tmp_path_factory.mktemp("returned")
    for name in [*INFERENCE, *TRAINING]:
        for form in ("saelens", "mistudio_community"):
            sae = load_sae(made / name, dtype=None)
            try:
                save_sae(sae, folder / f"{name}-{form}", form)
            except NotRepresentable:
                continue
            save_file(
                {"x": load_file(made / name / "numbers.safetensors")["x"]}, folder / f"{name}-{form}" / "x.safetensors"
            )
    ask_peers(SCRIPT, "read", folder)
    return folder


def assert_same(sae: SAE, numbers: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        acts, x_hat = sae.encode(numbers["x"]), sae(numbers["x"])
    assert torch.equal(acts != 0, numbers["feature_acts"] != 0), "the same features fire"
    torch.testing.assert_close(acts, numbers["feature_acts"], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(x_hat, numbers["x_hat"], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", [*INFERENCE, *TRAINING, *DONE])
def test_what_sae_lens_saves_we_load_to_the_same_numbers(name, made):
    assert detect_format(made / name) == ("saelens_training" if name in TRAINING else "saelens")
    assert_same(load_sae(made / name), load_file(made / name / "numbers.safetensors"))


@pytest.mark.parametrize("name", [*INFERENCE, *TRAINING])
def test_what_we_save_sae_lens_loads_to_the_same_numbers(name, returned):
    folder = returned / f"{name}-saelens"
    assert_same(load_sae(folder), load_file(folder / "numbers.safetensors"))


@pytest.mark.parametrize("name", [*INFERENCE, *TRAINING])
def test_what_we_save_for_mistudio_sae_lens_loads_to_the_same_numbers(name, returned):
    folder = returned / f"{name}-mistudio_community"
    if any(word in name for word in NOT_MISTUDIOS):
        assert not folder.exists()
    else:
        assert_same(load_sae(folder), load_file(folder / "numbers.safetensors"))


@pytest.mark.parametrize("name", [n for n in INFERENCE if "rescale" not in n])
def test_weights_come_back_from_us_bit_by_bit(name, made, returned):
    before, after = (
        load_file(place / "sae_weights.safetensors") for place in (made / name, returned / f"{name}-saelens")
    )
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype and torch.equal(after[key], tensor), key


@pytest.mark.parametrize("name", [name for name in TRAINING if "batchtopk" in name or "matryoshka" in name])
def test_training_forms_become_the_inference_form_that_sae_lens_makes(name, made, returned):
    ours, theirs = load_sae(returned / f"{name}-saelens"), load_sae(made / f"{name}_done")
    assert ours.config.architecture == theirs.config.architecture == "jumprelu"
    assert ours.config.metadata["training_architecture"] == theirs.config.metadata["training_architecture"]
    for key, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], tensor, rtol=1e-5, atol=1e-6)
