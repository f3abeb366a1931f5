"""SAEs in files of people's own, held against the modules that wrote them: plain torch, with names of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from saes.numerics.formats import FormatError, MissingFact, UnknownFormat, detect_format, load_sae, save_sae

N, D, F = 50, 24, 72
SAID = {"hook_name": "blocks.1.hook_resid_post", "model_name": "tiny", "normalize_activations": "none"}


class Own(nn.Module):
    """Somebody's SAE: acts = relu or top-k or jump of encoder(x - pre_bias)."""

    def __init__(self, kind: str = "standard", subtracts: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.kind, self.subtracts = kind, subtracts
        self.encoder, self.decoder = nn.Linear(D, F), nn.Linear(F, D, bias=False)
        self.pre_bias = nn.Parameter(torch.empty(D))
        self.log_threshold = nn.Parameter(torch.empty(F)) if kind == "jumprelu" else None
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)

    def encode(self, x: Tensor) -> Tensor:
        z = self.encoder(x - self.pre_bias if self.subtracts else x)
        if self.log_threshold is not None:
            return z.relu() * (z > self.log_threshold.exp())
        if self.kind == "topk":
            kept = z.relu().topk(5)
            return torch.zeros_like(z).scatter(-1, kept.indices, kept.values)
        return z.relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encode(x)) + self.pre_bias


MAPPING = "W_enc = encoder.weight.T, b_enc=encoder.bias\nW_dec = decoder.weight.T,\n\nb_dec = pre_bias"
MORE = {"standard": {}, "topk": {"k": 5}, "jumprelu": {}}


def mapping(kind: str) -> str:
    return MAPPING + ("\nthreshold = log_threshold.exp()" if kind == "jumprelu" else "")


def write(own: Own, path: Path, above: str = "") -> Path:
    """As people save: safetensors, npz, or torch with the state below a key."""
    state = {above + name: tensor.detach() for name, tensor in own.state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(state, path)
    elif path.suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in state.items()})
    else:
        torch.save({"model": {"state": state}, "step": 7, "lr": 1e-3}, path)
    return path


def facts(kind: str, **changes: Any) -> dict[str, Any]:
    given = SAID | {"architecture": kind, "tensors": mapping(kind), "apply_b_dec_to_input": True} | MORE[kind] | changes
    return {name: value for name, value in given.items() if value is not None}


@pytest.mark.parametrize("kind", list(MORE))
@pytest.mark.parametrize("name", ["own.safetensors", "own.npz", "own.pt"])
def test_it_gives_what_its_author_s_module_gives(kind: str, name: str, tmp_path: Path) -> None:
    own = Own(kind)
    path = write(own, tmp_path / name)
    said = facts(kind)
    if name.endswith(".pt"):
        for theirs in ("encoder.weight", "encoder.bias", "decoder.weight", "pre_bias", "log_threshold"):
            said["tensors"] = said["tensors"].replace(theirs, f"model.state.{theirs}")
    x = torch.randn(N, D)
    for place in (path, tmp_path):
        assert detect_format(place) == "named_tensors"
        sae = load_sae(place, facts=said)
        acts, x_hat = own.encode(x), own(x)
        assert torch.equal(sae.encode(x) != 0, acts != 0) and 0 < (acts != 0).float().mean() < 1
        torch.testing.assert_close(sae.encode(x), acts, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(sae(x), x_hat, rtol=1e-5, atol=1e-5)
        assert (sae.config.hook_name, sae.config.model_name) == (SAID["hook_name"], "tiny")
    save_sae(sae, tmp_path / "ours")
    assert torch.equal(load_sae(tmp_path / "ours").encode(x), sae.encode(x))


def test_biases_that_are_not_named_are_zero_and_one_threshold_is_everybodys(tmp_path: Path) -> None:
    W = torch.randn(D, F)
    save_file({"enc": W, "dec": W.t().contiguous(), "theta": torch.tensor(0.5)}, tmp_path / "own.safetensors")
    said = facts("jumprelu", tensors="W_enc=enc, W_dec=dec, threshold=theta", apply_b_dec_to_input=None)
    sae = load_sae(tmp_path, facts=said)
    x = torch.randn(N, D)
    z = x @ W
    torch.testing.assert_close(sae.encode(x), z * (z > 0.5), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sae(x), (z * (z > 0.5)) @ W.t(), rtol=1e-5, atol=1e-5)


def test_inputs_that_were_scaled_in_training(tmp_path: Path) -> None:
    """expected_average_only_in: the module saw 3 x and gave 3 x_hat; codes keep its units."""
    own = Own()
    write(own, tmp_path / "own.safetensors")
    said = facts("standard", normalize_activations="expected_average_only_in")
    with pytest.raises(MissingFact, match="norm_scaling_factor too") as caught:
        load_sae(tmp_path, facts=said)
    assert caught.value.names == ("norm_scaling_factor",)
    sae = load_sae(tmp_path, facts=said | {"norm_scaling_factor": 3.0})
    x = torch.randn(N, D)
    torch.testing.assert_close(sae.encode(x), own.encode(3 * x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae(x), own(3 * x) / 3, rtol=1e-4, atol=1e-5)


def test_what_is_missing_is_asked_for(tmp_path: Path) -> None:
    write(Own("topk"), tmp_path / "own.safetensors")
    with pytest.raises(MissingFact) as caught:
        load_sae(tmp_path)
    assert caught.value.names == ("tensors", "architecture", "model_name", "hook_name", "normalize_activations")
    assert "own.safetensors is in no format" in str(caught.value) and f"encoder.weight ({F}, {D})" in str(caught.value)
    with pytest.raises(MissingFact) as caught:
        load_sae(tmp_path, facts=facts("topk", k=None, apply_b_dec_to_input=None))
    assert caught.value.names == ("k", "apply_b_dec_to_input")


WRONG = {
    "W_enc": ("“W_enc” does not read like", "tensors"),
    "W_in = encoder.weight": ("has no tensor W_in, only W_dec, W_enc, b_dec, b_enc", "tensors"),
    "W_enc = encoder.weight, W_enc = decoder.weight": ("W_enc is said twice", "tensors"),
    "W_enc = encoder.weight.T": ("needs W_dec too", "tensors"),
    "W_enc = encoder": ("The file has no tensor encoder; it holds decoder.weight", "tensors"),
    "W_enc = encoder.weight.T, W_dec = pre_bias.T": ("pre_bias is no matrix", "tensors"),
    "W_enc = pre_bias, W_dec = decoder.weight.T": ("pre_bias is no matrix, so it is not W_enc", "tensors"),
    MAPPING.replace(".T", ""): (rf"must be \({D},\)", "tensors"),
    MAPPING.replace("decoder.weight.T", "decoder.weight"): (rf"W_dec has the shape \({D}, {F}\)", "tensors"),
}


@pytest.mark.parametrize("text", WRONG)
def test_a_mapping_that_cannot_be_is_asked_for_again(text: str, tmp_path: Path) -> None:
    write(Own(), tmp_path / "own.safetensors")
    said, name = WRONG[text]
    with pytest.raises(MissingFact, match=said) as caught:
        load_sae(tmp_path, facts=facts("standard", tensors=text))
    assert caught.value.names == (name,) and str(caught.value).endswith("transposed.")


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"architecture": "batchtopk"}, "a trained BatchTopK SAE is a jumprelu one"),
        ({"architecture": "topk", "k": F + 1}, f"k is {F + 1}, but this SAE has {F} features"),
        ({"normalize_activations": "minmax"}, "'minmax' is not one of none"),
    ],
)
def test_other_answers_that_cannot_be_are_asked_for_again(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    write(Own(), tmp_path / "own.safetensors")
    with pytest.raises(MissingFact, match=says) as caught:
        load_sae(tmp_path, facts=facts("standard") | changes)
    assert caught.value.names[0] in changes


def test_numbers_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    own = Own()
    with torch.no_grad():
        own.encoder.bias[3] = torch.nan
    write(own, tmp_path / "own.safetensors")
    with pytest.raises(FormatError, match="b_enc holds 1 value that is not a finite"):
        load_sae(tmp_path, facts=facts("standard"))
    save_file({"a": torch.ones(D, F, dtype=torch.int32), "b": torch.ones(F, D)}, tmp_path / "own.safetensors")
    with pytest.raises(FormatError, match=r"W_enc in own\.safetensors"):
        load_sae(tmp_path, facts=facts("standard", tensors="W_enc = a, W_dec = b"))


@pytest.mark.parametrize(
    "tensors",
    [
        {"weight": (10, D), "bias": (10,)},  # a probe
        {f"layers.{n}.weight": (D, D) for n in range(20)},  # a language model
        {"a": (F, 1), "b": (1, F)},
    ],
)
def test_what_does_not_look_like_an_sae_stays_unknown(tensors: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    save_file({name: torch.ones(shape) for name, shape in tensors.items()}, tmp_path / "own.safetensors")
    with pytest.raises(UnknownFormat):
        detect_format(tmp_path)


def test_two_files_are_not_one_sae(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.npz"):
        write(Own(), tmp_path / name)
    with pytest.raises(UnknownFormat):
        detect_format(tmp_path)
    assert detect_format(tmp_path / "b.npz") == "named_tensors"
