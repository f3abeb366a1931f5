"""Captures on disk: the order of batches, the held-out split, resuming, and damaged files."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from training.numerics import shards
from training.numerics.shard_writer import ShardWriter
from training.numerics.shards import Capture, CaptureError, is_held_out, open_capture

HOOKS = {"a": 6, "b": 3}
LENGTH = 8


def write(path: Path, n_batches: int = 40, dtype: str = "float32") -> dict[str, torch.Tensor]:
    """A capture of random activations, 3 contexts a batch, the first token of each context not stored; all its rows."""
    generator = torch.Generator().manual_seed(0)
    facts = {
        "policy": {"context_length": LENGTH},
        "hook_points": [{"name": name, "d": d} for name, d in HOOKS.items()],
        "dtype": dtype,
    }
    writer = ShardWriter(path, facts, HOOKS, dtype, shard_rows=180)
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in HOOKS}
    stored = np.ones((3, LENGTH), dtype=bool)
    stored[:, 0] = False
    for batch in range(n_batches):
        contexts = np.arange(3 * LENGTH).reshape(3, LENGTH) + batch
        x = {name: torch.randn(int(stored.sum()), d, generator=generator) for name, d in HOOKS.items()}
        for name, values in x.items():
            rows[name].append(values)
        writer.add(contexts, stored, x, np.full(3, batch), batch)
    writer.finish(run_id="test", held_out_fraction=0.05)
    return {name: torch.cat(values) for name, values in rows.items()}


@pytest.fixture
def made(tmp_path: Path) -> tuple[Capture, dict[str, torch.Tensor]]:
    rows = write(tmp_path / "c")
    return open_capture(tmp_path / "c"), rows


def as_set(x: torch.Tensor) -> set[tuple[float, ...]]:
    return {tuple(row) for row in x.tolist()}


def test_what_was_written_is_read(made):
    capture, rows = made
    assert len(capture.shards) == 5 and capture.n_contexts == 120 and capture.n_rows == 840
    assert (capture.hook_names, capture.d, capture.context_length) == (["a", "b"], HOOKS, LENGTH)
    for name in HOOKS:
        chunks = list(capture.rows(name, chunk=100))
        assert torch.equal(torch.cat([x for x, _, _ in chunks]), rows[name])
        context = np.concatenate([c for _, c, _ in chunks])
        position = np.concatenate([p for _, _, p in chunks])
        assert context.tolist() == np.repeat(np.arange(120), 7).tolist()
        assert position.tolist() == list(range(1, 8)) * 120
    contexts = capture.contexts()
    assert contexts.dtype == np.int32 and contexts[4, 2] == 1 * LENGTH + 2 + 1
    assert np.array_equal(np.concatenate([capture.shard_contexts(i) for i in range(5)]), contexts)
    assert capture.documents().tolist() == np.repeat(np.arange(40), 3).tolist()


def test_norms_and_counts_in_the_manifest(made):
    capture, rows = made
    assert capture.manifest["n_tokens_seen"] == 120 * LENGTH and capture.manifest["n_documents"] == 40
    for name in HOOKS:
        assert capture.manifest["norms"][name] == pytest.approx(float(rows[name].norm(dim=-1).mean()), rel=1e-6)
    assert not (capture.path / shards.UNFINISHED).exists()


def test_held_out_rule_is_the_documented_one():
    for number in (0, 1, 7, 12345, 2**31 - 1):
        assert bool(is_held_out(np.array([number]))[0]) == ((number * 2654435761) % 2**32 < 0.05 * 2**32)
    assert is_held_out(np.arange(100_000)).mean() == pytest.approx(0.05, abs=0.002)
    assert is_held_out(np.array([0]))[0]


def test_splits_share_no_context_and_lose_nothing(made):
    capture, rows = made
    train = torch.cat(list(capture.batches("a", 64)))
    held_out = torch.cat(list(capture.batches("a", 64, split="held_out")))
    assert (len(train), len(held_out)) == (capture.split_rows("train"), capture.split_rows("held_out"))
    assert len(held_out) == 7 * is_held_out(np.arange(120)).sum() > 0
    assert as_set(train).isdisjoint(as_set(held_out))
    assert as_set(train) | as_set(held_out) == as_set(rows["a"])
    assert all(is_held_out(c).all() for _, c, _ in capture.rows("a", "held_out"))


def test_batches_are_full_except_the_last(made):
    capture, _ = made
    sizes = [len(x) for x in capture.batches("a", 100, split="all")]
    assert sizes == [100] * 8 + [40]
    assert [len(x) for x in capture.batches("a", 100, split="all", epochs=2)] == [100] * 16 + [80]
    assert [len(x) for x in capture.batches("a", 100, split="all", n_rows=1000)] == [100] * 10


@pytest.mark.parametrize("window", [2**18, 400])  # one window, and several of one or two shards each
def test_the_order_is_fixed_by_the_seed_and_can_be_resumed_anywhere(made, monkeypatch, window):
    monkeypatch.setattr(shards, "WINDOW_ROWS", window)
    capture, rows = made
    whole = torch.cat(list(capture.batches("a", 64, split="all", seed=3, epochs=3)))
    assert torch.equal(whole, torch.cat(list(capture.batches("a", 17, split="all", seed=3, epochs=3))))
    epochs = whole.split(840)
    assert as_set(epochs[0]) == as_set(epochs[1]) == as_set(rows["a"])
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], torch.cat(list(capture.batches("a", 64, split="all", seed=4))))
    for start in (1, 199, 840, 1000, 2519):
        rest = capture.batches("a", 33, split="all", seed=3, epochs=3, start_row=start)
        assert torch.equal(torch.cat(list(rest)), whole[start:])
    assert list(capture.batches("a", 33, split="all", seed=3, epochs=3, start_row=2520)) == []


def test_unshuffled_batches_are_in_stored_order(made):
    capture, rows = made
    assert torch.equal(torch.cat(list(capture.batches("b", 50, split="all", shuffle=False))), rows["b"])


def test_a_batch_hardly_holds_two_rows_of_one_context(tmp_path):
    """The documented mixing: the share of a batch in one context is (t - 1) / window, whatever the batch size is."""
    hooks, t, n = {"a": 1}, 32, 512
    facts = {"policy": {"context_length": t}, "hook_points": [{"name": "a", "d": 1}], "dtype": "float32"}
    writer = ShardWriter(tmp_path / "c", facts, hooks, "float32", shard_rows=1024)
    for start in range(0, n, 32):
        numbers = np.arange(start, start + 32)
        contexts = np.repeat(numbers[:, None], t, axis=1)
        x = {"a": torch.from_numpy(contexts.reshape(-1, 1)).float()}  # a row holds the number of its context
        writer.add(contexts, np.ones(contexts.shape, bool), x, numbers, start + 31)
    writer.finish(run_id="c", held_out_fraction=0.05)
    capture = open_capture(tmp_path / "c")
    capture.window_rows = 8192

    def shared(shuffle: bool) -> float:
        """Mean share of pairs of rows of a batch that lie in one context."""
        batches = [x.flatten() for x in capture.batches("a", 256, split="all", shuffle=shuffle)]
        return float(np.mean([((x[:, None] == x).sum() - len(x)) / (len(x) * (len(x) - 1)) for x in batches]))

    assert shared(True) == pytest.approx((t - 1) / 8192, rel=0.1)
    assert shared(False) == pytest.approx((t - 1) / 255)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_half_precision_storage_rounds_and_gives_float32_back(tmp_path, dtype, tolerance):
    rows = write(tmp_path / "c", 5, dtype)
    (x,) = [x for x, _, _ in open_capture(tmp_path / "c").rows("a")]
    assert x.dtype == torch.float32
    assert ((x - rows["a"]).abs() <= tolerance * rows["a"].abs()).all() and not torch.equal(x, rows["a"])


# -- bad captures -----------------------------------------------------


def refused(path: Path) -> str:
    """The sentence with which reading a capture ends."""
    with pytest.raises(CaptureError) as caught:
        capture = open_capture(path)
        for _ in capture.batches("a", 64, split="all"):
            pass
        capture.contexts()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_or_unfinished_folder(tmp_path):
    assert "There is no capture folder" in refused(tmp_path / "none")
    assert "was not finished" in refused(tmp_path)


def test_damaged_files(made, tmp_path):
    capture, _ = made
    shard = capture.path / "shard-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    assert "shard-00001.safetensors of the capture c is damaged or cut" in refused(capture.path)
    shard.write_bytes(b"")
    assert "damaged or cut" in refused(capture.path)
    shard.unlink()
    assert "lost its file shard-00001.safetensors" in refused(capture.path)
    shutil.copy(capture.path / "shard-00004.safetensors", shard)
    assert "where the manifest says" in refused(capture.path)
    for text in ('{"shards": [', "[]", "{}"):
        (capture.path / "manifest.json").write_text(text)
        assert "manifest.json of the capture c is damaged" in refused(capture.path)


def test_a_wrong_dtype_and_nan(made):
    capture, _ = made
    manifest = json.loads((capture.path / "manifest.json").read_text())
    (capture.path / "manifest.json").write_text(json.dumps(manifest | {"dtype": "bfloat16"}))
    assert "holds x/a as torch.float32" in refused(capture.path)
    (capture.path / "manifest.json").write_text(json.dumps(manifest))
    tensors = load_file(capture.path / "shard-00000.safetensors")
    tensors["x/a"][0, 0] = float("nan")
    shards.write_tensors(capture.path / "shard-00000.safetensors", tensors)
    assert "NaN or infinite values at a" in refused(capture.path)


def test_unknown_hooks_splits_and_sizes(made):
    capture, _ = made
    with pytest.raises(CaptureError, match="has no hook point z; it has a, b"):
        capture.batches("z", 8)
    with pytest.raises(CaptureError, match='no split "test"'):
        capture.batches("a", 8, split="test")
    with pytest.raises(CaptureError, match="batch size is 0"):
        capture.batches("a", 0)
