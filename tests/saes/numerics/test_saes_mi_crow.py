"""mi_crow's checkpoints: its equation, what its files leave out, and what they cannot hold."""

import json
from math import exp
from pathlib import Path
from typing import Any

import pytest
import torch

from saes.numerics.formats import FormatError, MissingFact, NotRepresentable, detect_format, load_sae, save_sae
from saes.numerics.sae import SAE
from tests.saes.numerics.test_saes_saelens import assert_same_bits, random_sae

D_IN, D_SAE = 6, 20


def unit_sae(architecture: str = "topk", dtype: torch.dtype = torch.float32, **options: Any) -> SAE:
    """One that mi_crow can hold: unit rows, no bias of the decoder."""
    k = 4 if architecture == "topk" else None
    sae = random_sae(architecture, dtype, **{"k": k, "apply_b_dec_to_input": False} | options)
    sae.W_dec.div_(sae.W_dec.float().norm(dim=-1, keepdim=True))
    sae.b_dec.zero_()
    return sae


def checkpoint(path: Path, metadata: dict[str, Any] | None = None, **state: Any) -> dict[str, torch.Tensor]:
    """A file as mi_crow writes it; returns its tensors."""
    draw = torch.Generator().manual_seed(2)
    tensors = {
        "encoder.final_block.0.weight": torch.randn(D_SAE, D_IN, generator=draw),
        "encoder.final_block.0.bias": torch.randn(D_SAE, generator=draw),
        "dictionary._weights": torch.randn(D_SAE, D_IN, generator=draw),
        "dictionary.multiplier": torch.tensor(0.3),
    } | state
    ones = torch.ones(D_SAE)
    said = {
        "concepts_state": {"multiplication": ones, "bias": ones}, "n_latents": D_SAE, "n_inputs": D_IN, "k": 4,
        "device": "cpu", "layer_signature": "gpt2lmheadmodel_transformer_h_3", "model_id": "gpt2",
    }  # fmt: skip
    torch.save({"sae_state_dict": tensors, "mi_crow_metadata": said | (metadata or {})}, path)
    return tensors


def test_its_dictionary_is_normalised_and_multiplied(tmp_path):
    t = checkpoint(tmp_path / "model.pt")
    assert detect_format(tmp_path) == detect_format(tmp_path / "model.pt") == "mi_crow"
    sae = load_sae(tmp_path)
    x = torch.randn(9, D_IN)
    z = (x @ t["encoder.final_block.0.weight"].T + t["encoder.final_block.0.bias"]).relu()
    acts = z * (z >= z.topk(4).values[:, -1:])
    rows = t["dictionary._weights"] / (t["dictionary._weights"].norm(dim=-1, keepdim=True) + 1e-8) * exp(0.3)
    torch.testing.assert_close(sae.encode(x), acts)
    torch.testing.assert_close(sae(x), acts @ rows)
    assert (sae.config.k, sae.config.model_name, sae.config.apply_b_dec_to_input) == (4, "gpt2", False)
    assert sae.config.metadata["layer_signature"] == "gpt2lmheadmodel_transformer_h_3"


def test_the_state_of_its_concepts_is_kept(tmp_path):
    scales = torch.arange(D_SAE, dtype=torch.float32)
    checkpoint(tmp_path / "model.pt", {"concepts_state": {"multiplication": scales, "bias": torch.ones(D_SAE)}})
    kept = load_sae(tmp_path).config.metadata["concepts_state"]
    assert kept == {"multiplication": scales.tolist(), "bias": 1.0}
    sae = unit_sae(metadata={"concepts_state": kept})
    save_sae(sae, tmp_path / "again", "mi_crow")
    written = torch.load(tmp_path / "again" / "model.pt", weights_only=True)["mi_crow_metadata"]["concepts_state"]
    assert torch.equal(written["multiplication"], scales) and torch.equal(written["bias"], torch.ones(D_SAE))
    with pytest.raises(NotRepresentable, match="19 numbers for 20 features"):
        save_sae(unit_sae(metadata={"concepts_state": {"bias": [1.0] * 19}}), tmp_path / "no", "mi_crow")


@pytest.mark.parametrize("architecture", ["standard", "topk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trip_is_exact(architecture, dtype, tmp_path):
    sae = unit_sae(architecture, dtype, metadata={"dataset_path": "c4", "seeds": [1, 2]})
    sae.log_sparsity = torch.linspace(-5, 0, D_SAE)
    save_sae(sae, tmp_path / "sae", "mi_crow")
    assert detect_format(tmp_path / "sae") == "mi_crow"
    again = load_sae(tmp_path / "sae", dtype=None)
    assert_same_bits(sae, again)
    assert torch.equal(again.log_sparsity, sae.log_sparsity)
    for name in ("layer_signature", "concepts_state"):
        again.config.metadata.pop(name)
    assert again.config == sae.config


def test_one_norm_of_all_rows_is_its_multiplier(tmp_path):
    sae = unit_sae("standard")
    sae.W_dec.mul_(2.5)
    save_sae(sae, tmp_path / "sae", "mi_crow")
    state = torch.load(tmp_path / "sae" / "model.pt", weights_only=True)["sae_state_dict"]
    assert exp(float(state["dictionary.multiplier"])) == pytest.approx(2.5)
    torch.testing.assert_close(load_sae(tmp_path / "sae").W_dec, sae.W_dec)


def test_a_mapped_sae_is_written_alone_without_the_file_it_is_mapped_from(tmp_path):
    save_sae(unit_sae(), tmp_path / "ours")
    save_sae(load_sae(tmp_path / "ours"), tmp_path / "theirs", "mi_crow")
    assert (tmp_path / "theirs" / "model.pt").stat().st_size < 6000


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda sae: sae.b_dec.fill_(0.1), "no bias of the decoder"),
        (lambda sae: sae.W_dec[3].mul_(2), "norms of 1 to 2"),
        (lambda sae: sae.W_dec.zero_(), "norms of 0 to 0"),
        (lambda sae: sae.b_enc.fill_(torch.nan), "not finite"),
        (lambda sae: sae.config.metadata.update(x=object()), "cannot be written as plain values"),
    ],
)
def test_what_it_cannot_hold_is_refused(spoil, sentence, tmp_path):
    sae = unit_sae()
    spoil(sae)
    with pytest.raises(NotRepresentable, match=sentence):
        save_sae(sae, tmp_path / "sae", "mi_crow")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("architecture", "options", "sentence"),
    [
        ("jumprelu", {}, "no jumprelu SAE; it has standard and topk"),
        ("standard", {"normalize_activations": "layer_norm"}, "no normalisation, and this SAE has layer_norm"),
        ("standard", {"d_out": 5}, "d_out other than d_in"),
        ("standard", {"options": {"glu": True}}, "no encoder with a gate"),
    ],
)
def test_what_it_has_no_word_for_is_refused(architecture, options, sentence, tmp_path):
    with pytest.raises(NotRepresentable, match=sentence):
        save_sae(unit_sae(architecture, **options), tmp_path / "sae", "mi_crow")


def test_a_bfloat16_dictionary_that_it_would_change_is_refused(tmp_path):
    with pytest.raises(NotRepresentable, match="all have one norm"):  # rounded rows are not of norm 1
        save_sae(unit_sae(dtype=torch.bfloat16), tmp_path / "sae", "mi_crow")


def test_its_trainers_files_lack_k(tmp_path):
    checkpoint(tmp_path / "model.pt", {"k": None})
    assert load_sae(tmp_path).config.architecture == "standard"
    (tmp_path / "meta.json").write_text(json.dumps({"sae_type": "TopKSae"}))
    with pytest.raises(MissingFact) as caught:
        load_sae(tmp_path)
    assert caught.value.names == ("k",)
    assert load_sae(tmp_path / "model.pt", facts={"k": 3}).config.k == 3
    (tmp_path / "meta.json").write_text(json.dumps({"sae_type": "L1Sae"}))
    assert load_sae(tmp_path, facts={"k": 3}).config.architecture == "standard"


@pytest.mark.parametrize(
    ("metadata", "state", "sentence"),
    [
        ({"n_latents": 21}, {}, "d_sae 21"),
        ({"n_inputs": "6"}, {}, "n_inputs in mi_crow_metadata must be a whole number"),
        ({"k": 2.5}, {}, "k in mi_crow_metadata must be of type int"),
        ({}, {"dictionary.multiplier": torch.tensor(1e9)}, "one number that an exponential can take"),
        ({}, {"dictionary.multiplier": torch.ones(2)}, "one number"),
        ({}, {"dictionary._weights": torch.ones(D_SAE, D_IN, dtype=torch.int64)}, "dictionary._weights"),
        ({}, {"encoder.final_block.0.bias": 3}, "lacks encoder.final_block.0.bias"),
        ({}, {"dictionary._weights": torch.full((D_SAE, D_IN), torch.nan)}, "W_dec holds 120 values"),
        ({}, {"encoder.final_block.0.weight": torch.ones(D_IN, D_SAE)}, "W_enc has the shape 20 x 6"),
    ],
)
def test_a_checkpoint_that_is_wrong_is_refused(metadata, state, sentence, tmp_path):
    checkpoint(tmp_path / "model.pt", metadata, **state)
    with pytest.raises(FormatError, match=sentence):
        load_sae(tmp_path)
