"""SAEs saved by the packages that own their formats, held against the numbers those packages computed; and broken ones.

Both sets lie beside this repository (`../shared/golden`). Every case is tested, of whatever format.
"""

import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from saes.numerics.formats import FORMATS, detect_format, load_sae, save_sae
from saes.numerics.formats.files import NotRepresentable
from saes.numerics.sae import SAE

GOLDEN = Path(__file__).parents[4] / "shared" / "golden"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"needs the golden SAEs in {GOLDEN}")

FACTS = (
    "repo_id", "model_name", "hook_name", "hook_name_out", "k", "norm_scaling_factor", "normalize_activations",
    "apply_b_dec_to_input", "architecture", "layer",
)  # fmt: skip
MARKERS = Path("/tmp"), "saehub_pwned_marker_*"
ENOUGH = 200_000_000  # bytes of memory; every broken SAE is of a few kilobytes


def cases(kind: str) -> list[str]:
    return sorted(path.name for path in (GOLDEN / kind).glob("*") if path.is_dir())


def opened(case: str) -> tuple[dict[str, Any], dict[str, torch.Tensor], Path]:
    folder = GOLDEN / "public" / case
    told = json.loads((folder / "golden.json").read_text())
    numbers = load_file(folder / "golden.safetensors")
    if "n_seq" in told:  # whole sequences, one after the other
        numbers = {name: tensor.unflatten(0, (told["n_seq"], -1)) for name, tensor in numbers.items()}
    return told, numbers, folder / "model" / told["entry"]


def facts_of(told: dict[str, Any]) -> dict[str, Any]:
    """All that the case says of its SAE, needed or not."""
    return {name: told[name] for name in FACTS if name in told}


def assert_same_numbers(sae: SAE, numbers: dict[str, torch.Tensor], tolerance: dict[str, float]) -> None:
    with torch.no_grad():
        acts, x_hat = sae.encode(numbers["x"]), sae(numbers["x"])
    assert torch.equal(acts != 0, numbers["feature_acts"] != 0), "the same features fire"
    torch.testing.assert_close(acts, numbers["feature_acts"], **tolerance)
    torch.testing.assert_close(x_hat, numbers["x_hat"], **tolerance)


@pytest.mark.parametrize("case", cases("public"))
def test_numbers_are_those_of_the_package_that_saved_it(case):
    told, numbers, entry = opened(case)
    assert detect_format(entry) == told["format"]
    sae = load_sae(entry, facts=facts_of(told))
    assert_same_numbers(sae, numbers, told["tolerance"])
    with torch.no_grad():  # the sparse way gives the same
        values, indices = sae.encode_sparse(numbers["x"])
        torch.testing.assert_close(
            sae.decode_sparse(values, indices, numbers["x"]), numbers["x_hat"], **told["tolerance"]
        )
    if "feature_acts_inference" in numbers:
        usable = {"feature_acts": numbers["feature_acts_inference"], "x_hat": numbers["x_hat_inference"]}
        assert_same_numbers(sae.for_inference(), numbers | usable, told["tolerance"])


@pytest.mark.parametrize("case", cases("public"))
def test_facts_that_are_not_known_change_nothing(case):
    told, numbers, entry = opened(case)
    facts = dict.fromkeys(FACTS) | {"unheard_of": 1} | {n: v for n, v in facts_of(told).items() if v is not None}
    assert_same_numbers(load_sae(entry, facts=facts), numbers, told["tolerance"])


@pytest.mark.parametrize("form", [name for name, format_ in FORMATS.items() if format_.save])
@pytest.mark.parametrize("case", cases("public"))
def test_what_is_written_again_has_the_same_numbers_or_is_refused(case, form, tmp_path):
    told, numbers, entry = opened(case)
    sae = load_sae(entry, facts=facts_of(told))
    if hasattr(sae, "for_inference"):
        numbers |= {"feature_acts": numbers["feature_acts_inference"], "x_hat": numbers["x_hat_inference"]}
    try:
        save_sae(sae, tmp_path / "sae", format=form)
    except NotRepresentable as error:
        assert_one_sentence(error)
        assert not list(tmp_path.iterdir())
        return
    assert detect_format(tmp_path / "sae") == form
    again = load_sae(tmp_path / "sae", facts={"hook_name": sae.config.hook_name, "model_name": sae.config.model_name})
    assert_same_numbers(again, numbers, told["tolerance"])
    first = {name: tensor for name, tensor in sae.state_dict().items() if name in again.state_dict()}
    second = again.state_dict()
    if form in ("saelens", "mistudio_community") or form == told["format"]:
        assert set(first) == set(second)
        for name, tensor in first.items():
            assert torch.equal(second[name], tensor), name


@pytest.fixture
def bounded() -> Iterator[None]:
    """The process may not come to need more memory than the broken files could."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < ENOUGH


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("case", cases("bad"))
def test_a_bad_sae_is_refused_in_one_sentence_and_nothing_runs(case):
    folder = GOLDEN / "bad" / case
    expect = json.loads((folder / "expect.json").read_text())["expect"]
    for marker in MARKERS[0].glob(MARKERS[1]):
        marker.unlink()
    error = None
    for entry in entries(folder / "model"):
        try:
            load_sae(entry, facts={"repo_id": "google/gemma-scope-2b-pt-res", "hook_name": "blocks.20.hook_resid_post"})
        except ValueError as refused:
            error = refused
            assert_one_sentence(error)
    if expect.startswith("import"):
        assert error is None, "what is harmless beside something bad is taken"
    else:
        assert error is not None or "or read its" in expect, expect
        held = [path.name for path in (folder / "model").rglob("[!.]*") if path.is_file()]
        assert not held or any(name in str(error) for name in (*held, "s-2.safetensors")), "it names the file"
        if "naming both numbers" in expect:
            assert "24" in str(error) and any(number in str(error) for number in ("25", "128"))
    assert not list(MARKERS[0].glob(MARKERS[1]))


def entries(model: Path) -> list[Path]:
    """What a person would point at: the folder with the files, and a file in it where it is a lone torch file."""
    folders = {path.parent for path in model.rglob("*") if path.is_file()} or {model}
    return [*sorted(folders), *sorted(model.rglob("*.sae.pt"))]


def assert_one_sentence(error: BaseException) -> None:
    text = str(error)
    assert type(error) is not ValueError, "one of our own errors"
    assert "\n" not in text and 10 < len(text) < 400 and text.endswith("."), text
