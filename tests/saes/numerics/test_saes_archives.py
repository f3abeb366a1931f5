"""npz, torch and YAML files that are damaged, hostile or merely unusual."""

import io
import json
import pickle
import resource
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from saes.numerics.formats.archives import read_npz, read_state, read_torch
from saes.numerics.formats.files import FormatError
from saes.numerics.formats.yaml_files import read_yaml

RNG = np.random.default_rng(0)
W = RNG.standard_normal((6, 5)).astype(np.float32)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def zipped(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4", "int64"])
def test_npz_gives_what_numpy_saved(save, dtype, tmp_path):
    arrays = {"a": (100 * W).astype(dtype), "b": np.asfortranarray(W.astype(dtype)), "c": np.array(3, dtype=dtype)}
    arrays["empty"] = np.zeros((0, 4), dtype=dtype)
    save(tmp_path / "x.npz", **arrays)
    read = read_npz(tmp_path / "x.npz")
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name].numpy(), array)


def test_the_file_is_never_changed_by_what_is_done_to_its_numbers(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, a=np.zeros((512, 1024), dtype=np.float32))
    before = path.read_bytes()
    read_npz(path)["a"].fill_(1)
    assert path.read_bytes() == before


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_every_cut_and_every_flipped_byte_is_noticed_or_harmless(save, tmp_path):
    path = tmp_path / "x.npz"
    save(path, W_enc=W)
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place])
        with pytest.raises(FormatError):
            read_npz(path)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x5A]) + whole[place + 1 :])
        try:
            read = read_npz(path)
        except FormatError:
            continue
        assert all(np.array_equal(array.numpy(), W) for array in read.values()), f"byte {place}"


def claim(shape: tuple[int, ...], held: int) -> bytes:
    data = npy(np.zeros(held, dtype=np.float32))
    text = data[10:128].replace(f"({held},)".encode(), repr(shape).encode())[:118]
    return data[:10] + text.rstrip(b"\n ").ljust(117) + b"\n" + data[128:]


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ({"../W.npy": npy(W)}, "not a plain array"),
        ({"/etc/W.npy": npy(W)}, "not a plain array"),
        ({"a\\W.npy": npy(W)}, "not a plain array"),
        ({"notes.txt": b"hello"}, "not a plain array"),
        ({"W.npy": b"hello"}, "damaged or no array"),
        ({"W.npy": npy(np.array([{}, []], dtype=object))}, "Python objects"),
        ({"W.npy": npy(np.array(["text"]))}, "not numbers"),
        ({"W.npy": claim((2**40, 2**20), 16)}, r"claims the shape \(1099511627776, 1048576\), but holds 64 bytes"),
        ({"W.npy": npy(W)[:-4]}, "but holds 116 bytes"),
    ],
)
def test_npz_member_that_is_no_plain_array_is_refused(members, sentence, tmp_path):
    with pytest.raises(FormatError, match=sentence):
        read_npz(zipped(tmp_path / "x.npz", members))


def test_npz_name_that_comes_twice_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive, pytest.warns(UserWarning):
        archive.writestr("W.npy", npy(W))
        archive.writestr("W.npy", npy(W + 1))
    with pytest.raises(FormatError, match="'W' twice"):
        read_npz(tmp_path / "x.npz")


def test_deflate_bomb_is_refused_before_it_is_inflated(tmp_path):
    size = 400_000_000
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive, archive.open("W.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (size // 4,)})
        for _ in range(size // 4_000_000):
            file.write(bytes(4_000_000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FormatError, match="would inflate"):
        read_npz(tmp_path / "x.npz")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes


def test_zeros_of_a_bias_may_be_deflated_as_far_as_they_go(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", b=np.zeros(1_000_000, dtype=np.float32))
    assert read_npz(tmp_path / "x.npz")["b"].shape == (1_000_000,)


# -- torch -------------------------------------------------------------------------------------------------------------
class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/saehub_pwned_marker_archives"),))


@pytest.mark.parametrize(
    "save",
    [
        lambda value, path: torch.save(value, path),
        lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False),
        lambda value, path: path.write_bytes(pickle.dumps(value)),
    ],
)
def test_nothing_of_a_pickle_is_run(save, tmp_path):
    path, marker = tmp_path / "ae.pt", Path("/tmp/saehub_pwned_marker_archives")
    marker.unlink(missing_ok=True)
    save({"W": torch.ones(2), "x": Payload()}, path)
    with pytest.raises(FormatError, match=r"ae\.pt") as caught:
        read_torch(path)
    assert "\n" not in str(caught.value)
    assert not marker.exists()


def test_torch_file_gives_what_was_saved(tmp_path):
    saved = {"W": torch.randn(4, 3), "half": torch.randn(3).bfloat16(), "turned": torch.randn(4, 3).t(), "n": {"k": 3}}
    torch.save(OrderedDict(saved), tmp_path / "x.pt")
    read = read_torch(tmp_path / "x.pt")
    assert read["n"] == {"k": 3}
    assert all(torch.equal(read[name], saved[name]) for name in ("W", "half", "turned"))
    with pytest.raises(FormatError, match="must hold tensors by name"):
        read_state(tmp_path / "x.pt")


def test_tensor_that_claims_more_than_is_stored_is_refused(tmp_path):
    torch.save({"W": torch.ones(1).expand(2**20, 2**20)}, tmp_path / "x.pt")  # one number, said to be 2**40
    with pytest.raises(FormatError, match="claims more numbers than are stored"):
        read_state(tmp_path / "x.pt")


@pytest.mark.parametrize("value", [torch.ones(3), [torch.ones(3)], 7])
def test_torch_file_of_anything_but_a_dict_is_refused(value, tmp_path):
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(FormatError, match="must hold a dict of tensors"):
        read_torch(tmp_path / "x.pt")


def test_sparse_tensor_is_refused(tmp_path):
    torch.save({"W": torch.eye(3).to_sparse()}, tmp_path / "x.pt")
    with pytest.raises(FormatError, match=r"x\.pt"):
        read_state(tmp_path / "x.pt")


def test_every_cut_of_a_torch_file_is_one_sentence(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"W": torch.ones(5, 4)}, path)
    whole = path.read_bytes()
    for place in range(0, len(whole), 31):
        path.write_bytes(whole[:place])
        with pytest.raises(FormatError, match=r"x\.pt") as caught:
            read_torch(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ({"hello.txt": b"x"}, "has no data.pkl"),
        ({"a/data.pkl": b"x", "../../b": b"y"}, "has no data.pkl"),
        ({"a/data.pkl": b"x", "a/../../b": b"y"}, "not a record of a torch file"),
        ({"a/data.pkl": b"x", "b/data.pkl": b"x"}, "has no data.pkl"),
        ({"a/data.pkl": b"x"}, "cannot be read as weights"),
    ],
)
def test_zip_that_is_not_torchs_is_refused(members, sentence, tmp_path):
    with pytest.raises(FormatError, match=sentence):
        read_torch(zipped(tmp_path / "x.pt", members))


def test_compressed_records_are_refused(tmp_path):
    with pytest.raises(FormatError, match="compressed record"):
        read_torch(zipped(tmp_path / "x.pt", {"a/data.pkl": b"x" * 99}, zipfile.ZIP_DEFLATED))


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "is empty"),
        (b"<html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"),
        (b"PK\x03\x04 and no more", "damaged or incomplete"),
        (b"hello", "is not a torch file"),
    ],
)
def test_what_is_no_archive_is_called_what_it_is(data, sentence, tmp_path):
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(FormatError, match=sentence):
        read_torch(tmp_path / "x.pt")


def test_missing_files_are_named(tmp_path):
    for read in (read_npz, read_torch, read_yaml):
        with pytest.raises(FormatError, match=r"nowhere is missing\."):
            read(tmp_path / "nowhere")


# -- YAML --------------------------------------------------------------------------------------------------------------
def test_yaml_of_plain_values(tmp_path):
    (tmp_path / "c.yaml").write_text("a: 1\nb: {c: [1.5, true, null]}\nd: &x {e: f}\ng: *x\n")
    assert read_yaml(tmp_path / "c.yaml") == {"a": 1, "b": {"c": [1.5, True, None]}, "d": {"e": "f"}, "g": {"e": "f"}}


def test_yaml_values_that_json_lacks_become_text(tmp_path):
    (tmp_path / "c.yaml").write_text("when: 2025-02-03\nbytes: !!binary aGVsbG8=\nfar: .inf\n7: seven\n")
    value = read_yaml(tmp_path / "c.yaml")
    assert json.loads(json.dumps(value, allow_nan=False)) == value
    assert (value["when"], value["far"], value["7"]) == ("2025-02-03", "inf", "seven")


# Each list holds the one before it twice: twenty lines that stand for three million values.
DOUBLED = "".join(
    f"b{n}: &b{n} [*{'a' if n == 0 else f'b{n - 1}'}, *{'a' if n == 0 else f'b{n - 1}'}]\n" for n in range(20)
)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: !!python/object/apply:os.system ['touch /tmp/saehub_pwned_marker_yaml']", "carries the tag"),
        ("a: !!python/name:os.system", "carries the tag"),
        ("a: !anything 1", "carries the tag"),
        ("a: !!binary aGVsbG8=\nb: [", "not readable YAML"),
        ("- a\n- b", "must hold a mapping"),
        ("", "must hold a mapping"),
        ("a: " + "[" * 50 + "]" * 50, "nested too deeply"),
        ("a: &a [x]\n" + "".join(f"b{n}: *a\n" for n in range(80)), "aliases"),
        ("a: &a [x, x, x]\n" + DOUBLED, "stands for more than"),
        ("a: &a {x: 1}\nb: {<<: *a}", "merges mappings"),
        ("a: " + "9" * 6000, "not readable YAML"),
        ("a: " + "x" * 300_000, "is larger than"),
        ("a: \x00", "not readable YAML"),
    ],
)
def test_yaml_that_is_more_than_a_config_is_refused(text, sentence, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(FormatError, match=sentence) as caught:
        read_yaml(tmp_path / "c.yaml")
    assert "\n" not in str(caught.value)
    assert not Path("/tmp/saehub_pwned_marker_yaml").exists()
