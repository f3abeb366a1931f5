"""Loading and saving SAEs: SAELens' own numbers, round trips, and every way a folder can be wrong."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from saes.numerics.architectures import build_sae
from saes.numerics.folders import FolderError
from saes.numerics.formats import (
    FormatError,
    NotRepresentable,
    UnknownFormat,
    detect_format,
    finite,
    load_sae,
    save_sae,
)
from saes.numerics.formats.weights import refuse_non_finite
from saes.numerics.sae import SAE, SAEConfig, SAEError

GOLDEN = Path(__file__).parents[2] / "golden"
OWN_CASES = sorted(path.parent.name for path in GOLDEN.glob("*/golden.safetensors"))


def assert_agrees(sae: SAE, golden: dict[str, torch.Tensor], rtol: float = 1e-4, atol: float = 2e-5) -> None:
    acts = sae.encode(golden["x"])
    assert torch.equal(acts != 0, golden["feature_acts"] != 0), "the same features fire"
    torch.testing.assert_close(acts.detach(), golden["feature_acts"], rtol=rtol, atol=atol)
    torch.testing.assert_close(sae(golden["x"]).detach(), golden["x_hat"], rtol=rtol, atol=atol)
    values, indices = sae.encode_sparse(golden["x"])
    x_hat = sae.decode_sparse(values, indices, golden["x"])
    torch.testing.assert_close(x_hat.detach(), golden["x_hat"], rtol=rtol, atol=atol)


@pytest.mark.parametrize("case", OWN_CASES)
def test_numbers_are_those_of_saelens(case):
    sae = load_sae(GOLDEN / case)
    assert_agrees(sae, load_file(GOLDEN / case / "golden.safetensors"))
    assert (sae.config.hook_name, sae.config.model_name) == ("blocks.3.hook_resid_post", "gpt2-small")
    assert all(parameter.requires_grad for parameter in sae.parameters())


@pytest.mark.parametrize("case", OWN_CASES)
def test_what_is_saved_again_still_has_the_numbers_of_saelens(case, tmp_path):
    sae = load_sae(GOLDEN / case)
    save_sae(sae, tmp_path / "again")
    again = load_sae(tmp_path / "again")
    assert_agrees(again, load_file(GOLDEN / case / "golden.safetensors"))
    for one in (sae, again):  # the layout's version is the writer's
        one.config.metadata.pop("sae_lens_version", None)
    assert again.config == sae.config
    assert detect_format(tmp_path / "again") == "saelens"


def assert_one_sentence(error: BaseException) -> None:
    text = str(error)
    assert type(error) is not ValueError, "one of our own errors"
    assert "\n" not in text and 10 < len(text) < 400 and text.endswith("."), text


def random_sae(architecture: str = "topk", **options: Any) -> SAE:
    sae = build_sae(SAEConfig(architecture, 6, 20, k=4 if architecture == "topk" else None, **options))
    sae.requires_grad_(False)
    for parameter in sae.parameters():
        parameter.copy_(torch.randn_like(parameter))
    return sae


@pytest.mark.parametrize("architecture", ["standard", "topk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_round_trip_is_exact(architecture, dtype, tmp_path):
    metadata = {"dataset_path": "c4", "context_size": 128, "reshape_activations": "hook_z"}
    sae = random_sae(
        architecture,
        hook_name="blocks.1.attn.hook_z",
        model_name="me/mine",
        apply_b_dec_to_input=False,
        normalize_activations="layer_norm",
        metadata=metadata,
    ).to(dtype)
    save_sae(sae, tmp_path / "sae")
    assert detect_format(tmp_path / "sae") == "saelens"
    assert json.loads((tmp_path / "sae" / "cfg.json").read_text())["reshape_activations"] == "hook_z"
    again = load_sae(tmp_path / "sae", dtype=dtype)
    assert again.config.metadata.pop("sae_lens_version")
    assert again.config == sae.config
    for name, tensor in sae.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_saving_again_replaces_and_leaves_nothing_behind(tmp_path):
    first, second = random_sae(), random_sae()
    save_sae(first, tmp_path / "sae")
    save_sae(second, tmp_path / "sae")
    assert torch.equal(load_sae(tmp_path / "sae").W_dec, second.W_dec)
    assert [path.name for path in tmp_path.iterdir()] == ["sae"]
    assert sorted(path.name for path in (tmp_path / "sae").iterdir()) == ["cfg.json", "sae_weights.safetensors"]


def test_saving_into_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FolderError, match=r"already holds notes\.txt; give a new folder"):
        save_sae(random_sae(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda sae: sae.W_enc.fill_(float("nan")), "not finite"),
        (lambda sae: sae.config.metadata.update(x=object()), "cannot be written as JSON"),
        (lambda sae: sae.config.metadata.update(x=float("inf")), "cannot be written as JSON"),
    ],
)
def test_what_cannot_be_kept_is_not_written(spoil, sentence, tmp_path):
    sae = random_sae()
    spoil(sae)
    with pytest.raises(NotRepresentable, match=sentence):
        save_sae(sae, tmp_path / "sae")
    assert not list(tmp_path.iterdir())


def test_an_sae_with_another_target_has_no_saelens_form(tmp_path):
    with pytest.raises(NotRepresentable, match="d_out other than d_in"):
        save_sae(random_sae("standard", d_out=5, apply_b_dec_to_input=False), tmp_path / "sae")
    with pytest.raises(NotRepresentable, match="'npz'; they can be in saelens"):
        save_sae(random_sae(), tmp_path / "sae", format="npz")


def test_a_sum_beyond_the_range_is_no_fault_of_the_weights(tmp_path):
    for dtype, value in ((torch.float32, 3e38), (torch.bfloat16, 3e38), (torch.float16, 6e4), (torch.float64, 1e308)):
        sae = random_sae("standard").to(dtype)
        sae.W_dec.detach().fill_(value)
        save_sae(sae, tmp_path / "sae")
        assert torch.equal(load_sae(tmp_path / "sae", dtype=None).W_dec, sae.W_dec)


def test_weights_of_large_files_are_read_once_and_again_when_they_change(tmp_path, monkeypatch):
    monkeypatch.setattr(finite, "LARGE", 1000)
    monkeypatch.setattr(finite, "SETTLED", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    looked = []
    monkeypatch.setattr(finite, "refuse_non_finite", lambda tensors: looked.append(refuse_non_finite(tensors)))
    folder = tmp_path / "sae"
    save_sae(random_sae("standard"), folder)
    for _ in range(2):
        finite._seen.clear()  # as another process would find it
        load_sae(folder)
    assert len(looked) == 1 and len(list((tmp_path / "cache/saehub/finite").iterdir())) == 1
    edit_tensors(lambda t: t["W_dec"][0].fill_(float("nan")))(folder)
    with pytest.raises(FormatError, match="W_dec holds 6 values"):
        load_sae(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    save_sae(random_sae("standard"), folder)
    load_sae(folder)
    assert len(looked) == 2


def test_decoder_norm_folds_even_where_a_row_is_zero(tmp_path):
    folder = tmp_path / "sae"
    shutil.copytree(GOLDEN / "saelens_topk_rescale", folder)
    edit_tensors(lambda t: t["W_dec"][3].zero_())(folder)
    sae = load_sae(folder).requires_grad_(False)
    acts = sae.encode(torch.randn(50, 12))
    assert bool(acts.isfinite().all()) and not acts[:, 3].any()
    torch.testing.assert_close(sae.W_dec.norm(dim=1)[:3], torch.ones(3))


def test_known_scaling_factor_is_folded(tmp_path):
    sae = random_sae("standard", normalize_activations="expected_average_only_in")
    save_sae(sae, tmp_path / "sae")
    folded = load_sae(tmp_path / "sae", facts={"norm_scaling_factor": 2.5})
    x = torch.randn(9, 6)
    torch.testing.assert_close(folded.encode(x), sae.encode(2.5 * x))
    torch.testing.assert_close(folded(x), sae(2.5 * x) / 2.5)
    assert folded.config.normalize_activations == "none"
    with pytest.raises(FormatError, match="norm_scaling_factor must be a number above 0"):
        load_sae(tmp_path / "sae", facts={"norm_scaling_factor": 0})


def test_facts_fill_what_the_files_leave_out(tmp_path):
    folder = tmp_path / "sae"
    save_sae(random_sae(), folder)
    edit_cfg(lambda cfg: cfg.pop("k"))(folder)
    with pytest.raises(FormatError, match=r"does not say k, .*; give it as a fact"):
        load_sae(folder)
    facts = {"k": 3, "hook_name": "blocks.5.hook_resid_pre", "model_name": "gpt2", "repo_id": "someone/something"}
    sae = load_sae(folder, facts=facts)
    assert (sae.config.k, sae.config.hook_name, sae.config.model_name) == (3, "blocks.5.hook_resid_pre", "gpt2")
    edit_cfg(lambda cfg: cfg.update(k=4))(folder)
    with pytest.raises(FormatError, match="says k 4, but 3 was given"):
        load_sae(folder, facts=facts)


def test_unknown_keys_of_the_config_are_kept(tmp_path):
    save_sae(random_sae(), tmp_path / "sae")
    edit_cfg(lambda cfg: cfg.update(note="by hand"))(tmp_path / "sae")
    assert load_sae(tmp_path / "sae").config.metadata["note"] == "by hand"


def test_sharded_weights_are_put_together(tmp_path):
    sae = random_sae()
    save_sae(sae, tmp_path / "sae")
    shard()(tmp_path / "sae")
    assert torch.equal(load_sae(tmp_path / "sae").W_enc, sae.W_enc)


# -- one thing wrong at a time, in a folder that was right -----------------------------------------------------------
Spoil = Callable[[Path], Any]


def edit_cfg(edit: Callable[[dict[str, Any]], Any]) -> Spoil:
    def spoil(folder: Path) -> None:
        cfg = json.loads((folder / "cfg.json").read_text())
        edit(cfg)
        (folder / "cfg.json").write_text(json.dumps(cfg))

    return spoil


def edit_tensors(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Spoil:
    def spoil(folder: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / "sae_weights.safetensors").items()}
        edit(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "sae_weights.safetensors")

    return spoil


def write(name: str, data: bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(data)


def edit_bytes(edit: Callable[[bytes], bytes]) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / "sae_weights.safetensors"
        path.write_bytes(edit(path.read_bytes()))

    return spoil


def edit_header(edit: Callable[[dict[str, Any]], Any]) -> Spoil:
    def rebuilt(data: bytes) -> bytes:
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        edit(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return edit_bytes(rebuilt)


def shard(**places: str) -> Spoil:
    """Turn the weights into one shard with an index; `places` overrides what the index says."""

    def spoil(folder: Path) -> None:
        weights = folder / "sae_weights.safetensors"
        names = list(load_file(weights))
        weights.rename(folder / "s-1.safetensors")
        index = {"weight_map": dict.fromkeys(names, "s-1.safetensors") | places}
        (folder / "sae_weights.safetensors.index.json").write_text(json.dumps(index))

    return spoil


TOO_LARGE = torch.full((6,), 1e300, dtype=torch.float64)
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\n"
WRONG: dict[str, tuple[Spoil, str]] = {
    "no config": (lambda folder: (folder / "cfg.json").unlink(), "not the cfg.json"),
    "config is a list": (write("cfg.json", b"[1, 2]"), "must hold a JSON object, but holds a list"),
    "config not JSON": (write("cfg.json", b"{'d_in': 24,,"), "not valid JSON"),
    "config not UTF-8": (write("cfg.json", '{"a": 1}'.encode("utf-16")), "not UTF-8"),
    "config nested deeply": (write("cfg.json", b"[" * 200_000), "nested too deeply"),
    "config nested somewhat": (write("cfg.json", b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}"), "nested too deeply"),
    "config huge": (write("cfg.json", b" " * 5_000_000), "larger than"),
    "config with NaN": (write("cfg.json", b'{"d_in": NaN}'), "NaN is not a JSON number"),
    "d_in of another SAE": (edit_cfg(lambda c: c.update(d_in=7)), "W_enc has the shape 6 x 20, .* must be 7 x 20"),
    "d_sae of another SAE": (edit_cfg(lambda c: c.update(d_sae=21)), "W_enc has the shape 6 x 20, .* 6 x 21"),
    "d_sae beyond memory": (edit_cfg(lambda c: c.update(d_sae=10**18)), "must be 6 x 1000000000000000000"),
    "d_in text": (edit_cfg(lambda c: c.update(d_in="6")), "d_in in cfg.json must be of type int, but is '6'"),
    "d_in true": (edit_cfg(lambda c: c.update(d_in=True)), "d_in in cfg.json must be of type int"),
    "d_in missing": (edit_cfg(lambda c: c.pop("d_in")), "does not say d_in"),
    "architecture missing": (edit_cfg(lambda c: c.pop("architecture")), "does not say architecture"),
    "architecture unknown": (edit_cfg(lambda c: c.update(architecture="quantum")), "is not supported, only standard, topk"),
    "dtype a number": (edit_cfg(lambda c: c.update(dtype=7)), "dtype in cfg.json must be of type str"),
    "metadata a list": (edit_cfg(lambda c: c.update(metadata=[])), "metadata in cfg.json must be an object"),
    "hook a number": (edit_cfg(lambda c: c["metadata"].update(hook_name=3)), "hook_name in cfg.json must be text"),
    "version nonsense": (edit_cfg(lambda c: c["metadata"].update(sae_lens_version="six")), "not a version"),
    "k missing": (edit_cfg(lambda c: c.pop("k")), "does not say k"),
    "k text": (edit_cfg(lambda c: c.update(k="many")), "k in cfg.json must be of type int"),
    "k negative": (edit_cfg(lambda c: c.update(k=-3)), "k must be a whole number of at least 1"),
    "k too large": (edit_cfg(lambda c: c.update(k=21)), "has only 20 features"),
    "normalisation unknown": (edit_cfg(lambda c: c.update(normalize_activations="magic")), "'magic'"),
    "reshape unknown": (edit_cfg(lambda c: c.update(reshape_activations="z")), "must be none or hook_z"),
    "b_dec flag text": (edit_cfg(lambda c: c.update(apply_b_dec_to_input="no")), "apply_b_dec_to_input in cfg.json"),
    "tensor missing": (edit_tensors(lambda t: t.pop("b_dec")), "lack b_dec"),
    "tensor too many": (edit_tensors(lambda t: t.update(threshold=torch.ones(20))), "first: threshold"),
    "bias too long": (edit_tensors(lambda t: t.update(b_enc=torch.ones(21))), "b_enc has the shape 21"),
    "transposed": (edit_tensors(lambda t: t.update(W_enc=t["W_enc"].T)), "W_enc has the shape 20 x 6"),
    "integers": (edit_tensors(lambda t: t.update(W_enc=t["W_enc"].long())), "stored as I64, but must be floating"),
    "NaN": (edit_tensors(lambda t: t["W_enc"][0, 3:5].fill_(float("nan"))), "W_enc holds 2 values that are not finite"),
    "infinite": (edit_tensors(lambda t: t["b_dec"][0].fill_(float("-inf"))), "b_dec holds 1 value that"),
    "beyond float32": (edit_tensors(lambda t: t.update(b_dec=TOO_LARGE)), "b_dec holds 6 values"),
    "weights empty": (edit_bytes(lambda b: b""), "damaged or incomplete"),
    "weights cut in the header": (edit_bytes(lambda b: b[:50]), "damaged or incomplete"),
    "weights cut": (edit_bytes(lambda b: b[: len(b) * 6 // 10]), "damaged or incomplete"),
    "header length huge": (edit_bytes(lambda b: struct.pack("<Q", 2**62) + b[8:]), "header does not fit"),
    "header too large": (edit_bytes(lambda b: struct.pack("<Q", 5_000_000) + b" " * 6_000_000), "has a header of"),
    "header not JSON": (edit_bytes(lambda b: b[:8] + b"x" * (len(b) - 8)), "header of .* is not valid JSON"),
    "header without a shape": (edit_header(lambda h: h["W_enc"].pop("shape")), "nothing sensible about .* W_enc"),
    "header shape huge": (edit_header(lambda h: h["W_enc"].update(shape=[2**40, 2**20])), "W_enc has the shape"),
    "offsets outside": (edit_header(lambda h: h["W_dec"].update(data_offsets=[10**6, 10**6 + 480])), "damaged"),
    "git-lfs pointer": (write("sae_weights.safetensors", LFS_POINTER), "git lfs pull"),
    "web page": (write("sae_weights.safetensors", b"\n<!DOCTYPE html><html></html>"), "is a web page"),
    "two formats": (write("params.npz", b"PK"), r"two formats \(params\.npz of Gemma Scope and sae_weights"),
    "shard outside": (shard(W_enc="../outside.safetensors"), "not a file of this folder"),
    "shard absolute": (shard(W_enc="/etc/hostname"), "not a file of this folder"),
    "shard missing": (shard(W_enc="s-2.safetensors"), r"s-2\.safetensors is missing"),
    "shard without its tensor": (shard(threshold="s-1.safetensors"), "says that threshold is in s-1"),
    "shard index a list": (write("sae_weights.safetensors.index.json", b'{"weight_map": [1]}'), "has no weight_map"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_one_thing_wrong_is_one_sentence(name, tmp_path):
    spoil, sentence = WRONG[name]
    folder = tmp_path / "sae"
    save_sae(random_sae(), folder)
    load_sae(folder)
    spoil(folder)
    with pytest.raises((FormatError, SAEError), match=sentence) as caught:
        load_sae(folder)
    assert_one_sentence(caught.value)


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ([], "is an empty folder; the supported formats are those of SAELens"),
        (["layer_1/other.txt", "layer_0/cfg.json"], r"holds only folders \(layer_0, layer_1\); give the one"),
        (["latest_ckpt.safetensors"], "looks like a temporal SAE, but lacks the config that belongs to it"),
        (["config.json", "model.safetensors"], r"holds no SAE .* only config\.json, model\.safetensors;"),
        ([f"{i}.txt" for i in range(9)], "and 3 more"),
    ],
)
def test_unknown_format_names_what_was_found(files, sentence, tmp_path):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(UnknownFormat, match=sentence):
        detect_format(tmp_path)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file whose reading fails even for root")
@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
def test_file_the_system_will_not_read_is_refused(name, tmp_path):
    folder = tmp_path / "sae"
    save_sae(random_sae(), folder)
    (folder / name).unlink()
    (folder / name).symlink_to("/proc/self/mem")
    with pytest.raises(FormatError, match=r"cannot be read \(Input/output error\)"):
        load_sae(folder)


def test_path_that_is_no_folder_is_refused(tmp_path):
    with pytest.raises(UnknownFormat, match="There is no folder or file"):
        detect_format(tmp_path / "nowhere")
    (tmp_path / "sae.bin").write_bytes(b"x")
    with pytest.raises(UnknownFormat, match=r"sae\.bin is a file of no SAE format"):
        detect_format(tmp_path / "sae.bin")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5,), (), (33, 70), (4, 5, 6), (0, 4)])
def test_one_value_that_is_no_number_is_found_anywhere(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.randn(shape).to(dtype)
    turned = tensor.mT if tensor.ndim > 1 else tensor
    refuse_non_finite({"sound": tensor, "turned": turned, "large": tensor * 0 + torch.finfo(dtype).max / 2})
    for bad in (float("nan"), float("inf"), -float("inf")):
        for place in sorted({0, tensor.numel() // 2, tensor.numel() - 1} if tensor.numel() else []):
            one = tensor.clone()
            one.view(-1)[place] = bad
            for given in (one, one.mT if one.ndim > 1 else one):
                with pytest.raises(FormatError, match="W holds 1 value that is not a finite"):
                    refuse_non_finite({"W": given})
            if place:
                one.view(-1)[0] = -bad  # of both signs: their sum is no number either
                with pytest.raises(FormatError, match="W holds 2 values"):
                    refuse_non_finite({"W": one})
