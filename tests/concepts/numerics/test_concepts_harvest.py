"""Harvest against a naive dense implementation in numpy: one feature after another, one context after another."""

import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from concepts.featurefile import FeatureView, open_view
from concepts.numerics import code_files, feature_columns, sparse_encode
from concepts.numerics.code_files import HarvestError
from concepts.numerics.harvest import fingerprint, harvest
from concepts.numerics.sparse_encode import SparseEncoder
from saes.numerics.architectures import build_sae
from saes.numerics.sae import SAEConfig
from tests.tiny_models import RESID, tiny_sae
from training.numerics.shards import Capture, is_held_out

K, INTERVALS, PER_INTERVAL = 4, 5, 3


class Naive:
    """Everything from the dense codes (n, d_sae) of all rows at once."""

    def __init__(self, sae: Any, capture: Capture, split: str = "all") -> None:
        chunks = list(capture.rows(RESID, split))
        x = torch.cat([x for x, _, _ in chunks])
        row, feature, value = SparseEncoder(sae)(x)
        self.acts = np.zeros((len(x), sae.config.d_sae), np.float32)
        self.acts[row, feature] = value
        with torch.no_grad():
            np.testing.assert_allclose(self.acts, sae.encode(x).numpy(), rtol=1e-5, atol=1e-6)
        self.context = np.concatenate([c for _, c, _ in chunks])
        self.position = np.concatenate([p for _, _, p in chunks])
        self.token = capture.contexts()[self.context, self.position]

    def peaks(self, i: int) -> list[tuple[float, int, int]]:
        """(value, context, position) of the largest activation in every context in which i fires, best first."""
        best: dict[int, tuple[float, int, int]] = {}
        for row in np.flatnonzero(self.acts[:, i] > 0):
            value, context, position = float(self.acts[row, i]), int(self.context[row]), int(self.position[row])
            if context not in best or value > best[context][0]:
                best[context] = (value, context, position)
        return sorted(best.values(), key=lambda peak: (-peak[0], peak[1]))

    def along(self, i: int, context: int, length: int) -> np.ndarray:
        out = np.zeros(length, np.float32)
        rows = self.context == context
        out[self.position[rows]] = self.acts[rows, i]
        return out

    def tokens(self, i: int) -> dict[int, tuple[float, int]]:
        fires = self.acts[:, i] > 0
        return {
            int(t): (float(self.acts[fires & (self.token == t), i].sum()), int((fires & (self.token == t)).sum()))
            for t in np.unique(self.token[fires])
        }


def compare(view: FeatureView, naive: Naive, length: int) -> None:
    n, d_sae = naive.acts.shape
    assert (view.n_tokens, view.n_features) == (n, d_sae)
    for i in range(d_sae):
        record, values = view.feature(i), naive.acts[:, i][naive.acts[:, i] > 0]
        peaks = naive.peaks(i)
        assert record.n_fires == len(values)
        assert record.density == len(values) / n
        assert record.n_contexts == len(peaks)
        assert record.maximum == (values.max() if len(values) else 0)
        assert record.histogram.counts.sum() == len(values)
        assert [(e.value, e.context, e.peak) for e in record.top] == peaks[:K]
        if not len(values):
            assert np.isnan(record.mean)
            assert record.intervals == record.top_tokens == []
            continue
        assert record.mean == pytest.approx(values.mean(dtype=np.float64), rel=1e-6)
        bins = np.minimum((values / values.max() * 50).astype(int), 49)
        assert record.histogram.counts.tolist() == np.bincount(bins, minlength=50).tolist()
        for example in [*record.top, *(e for interval in record.intervals for e in interval.examples)]:
            np.testing.assert_array_equal(example.activations, naive.along(i, example.context, length))
        compare_intervals(record, peaks, values.max())
        compare_tokens(record, naive.tokens(i))


def compare_intervals(record: Any, peaks: list[tuple[float, int, int]], maximum: np.float32) -> None:
    assert sum(interval.n_fires for interval in record.intervals) == record.n_fires
    assert sum(interval.share for interval in record.intervals) == pytest.approx(1)
    for j, interval in zip(reversed(range(INTERVALS)), record.intervals, strict=True):
        assert interval.low == pytest.approx(maximum * j / INTERVALS)
        inside = {
            (value, context, position)
            for value, context, position in peaks
            if min(int(np.float32(value) / maximum * 50), 49) // 10 == j
        }
        sample = [(e.value, e.context, e.peak) for e in interval.examples]
        assert len(sample) == len(set(sample)) == min(PER_INTERVAL, len(inside))
        assert set(sample) <= inside


def compare_tokens(record: Any, tokens: dict[int, tuple[float, int]]) -> None:
    found = {top.id: (top.total, top.count) for top in record.top_tokens}
    assert len(found) == min(10, len(tokens))
    for id, (total, count) in found.items():
        assert count == tokens[id][1]
        assert total == pytest.approx(tokens[id][0], rel=1e-5)
    smallest = min(total for total, _ in found.values())
    assert all(total <= smallest * 1.00001 for id, (total, _) in tokens.items() if id not in found)
    assert [top.total for top in record.top_tokens] == sorted((top.total for top in record.top_tokens), reverse=True)


def run(sae: Any, capture: Capture, folder: Path, **options: Any) -> dict[str, Any]:
    return harvest(sae, capture, RESID, folder, k=K, intervals=INTERVALS, per_interval=PER_INTERVAL, **options)


@pytest.mark.parametrize("architecture", ["topk", "standard", "jumprelu"])
def test_equals_the_naive_implementation(architecture: str, small_capture: Capture, tmp_path: Path) -> None:
    sae = tiny_sae(architecture)
    if architecture == "jumprelu":
        sae.threshold += torch.linspace(0.5, 2, 96)
    sae.b_enc[7] = -1000  # a dead feature
    summary = run(sae, small_capture, tmp_path / "view")
    naive = Naive(sae, small_capture)
    compare(open_view(tmp_path / "view"), naive, small_capture.context_length)
    assert summary["n_tokens"] == small_capture.n_rows == len(naive.acts)
    assert summary["alive"] == (naive.acts > 0).any(0).sum()
    assert summary["alive"] + summary["dead"] == 96
    assert summary["dead"] >= 1


def test_blocks_and_chunks_change_nothing(
    sae: Any, small_capture: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks that cut contexts and shards, and many blocks of features. (Which samples are drawn depends on them.)"""
    monkeypatch.setattr(sparse_encode, "CHUNK_ROWS", 37)
    monkeypatch.setattr(code_files, "BLOCK_CODES", 900)
    run(sae, small_capture, tmp_path / "view")
    compare(open_view(tmp_path / "view"), Naive(sae, small_capture), small_capture.context_length)
    assert not list((tmp_path / "view").glob("codes-*"))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("block_codes", [900, 2**21])
def test_compiled_and_plain_columns_are_the_same(
    tied: bool, block_codes: int, small_capture: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte, also where many codes are equal: features that read the same few directions, and a constant one."""
    sae = tiny_sae("topk")
    if tied:
        sae.W_enc[:, 1::2] = sae.W_enc[:, ::2]
        sae.W_enc[:, :4] = 0
        sae.b_enc[:4] = 1000
    monkeypatch.setattr(code_files, "BLOCK_CODES", block_codes)
    run(sae, small_capture, tmp_path / "compiled", seed=3)
    assert code_files.compiled() is not None, "numba is a requirement of the tests"
    for module in (code_files, feature_columns):
        monkeypatch.setattr(module, "compiled", lambda: None)
    run(sae, small_capture, tmp_path / "plain", seed=3)
    columns = sorted(file.name for file in (tmp_path / "plain").glob("*.npy"))
    assert "example_peak.npy" in columns and "top_token_sums.npy" in columns
    for name in columns:
        assert (tmp_path / "compiled" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes(), name


def test_one_split_only(sae: Any, small_capture: Capture, tmp_path: Path) -> None:
    run(sae, small_capture, tmp_path / "view", split="held_out")
    view = open_view(tmp_path / "view")
    compare(view, Naive(sae, small_capture, "held_out"), small_capture.context_length)
    assert is_held_out(view.column("context_number")).all()
    assert view.n_tokens < small_capture.n_rows


def test_the_same_again(sae: Any, small_capture: Capture, tmp_path: Path) -> None:
    for name in ("one", "two"):
        run(sae, small_capture, tmp_path / name)
    for file in (tmp_path / "one").glob("*.npy"):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


def test_progress_rises_to_its_total(sae: Any, small_capture: Capture, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None, str]] = []
    run(sae, small_capture, tmp_path / "view", progress=lambda *report: seen.append(report))
    done = [report[0] for report in seen]
    assert done == sorted(done)
    assert done[-1] == seen[-1][1]
    assert {report[2] for report in seen} == {"encoding tokens", "collecting examples"}


class Stop(Exception):
    pass


@pytest.mark.parametrize("step", ["encoding tokens", "collecting examples"])
def test_stopped_leaves_the_old_view(step: str, sae: Any, small_capture: Capture, tmp_path: Path) -> None:
    run(sae, small_capture, tmp_path / "view")
    before = (tmp_path / "view" / "view.json").read_text()

    def stop(done: int, total: int | None, name: str) -> None:
        if name == step:
            raise Stop

    with pytest.raises(Stop):
        run(sae, small_capture, tmp_path / "view", progress=stop)
    assert (tmp_path / "view" / "view.json").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["view"]


def test_a_new_view_replaces_the_old_one(sae: Any, small_capture: Capture, tmp_path: Path) -> None:
    run(sae, small_capture, tmp_path / "view")
    run(tiny_sae("standard"), small_capture, tmp_path / "view")
    assert open_view(tmp_path / "view").facts["sae"]["architecture"] == "standard"
    assert [path.name for path in tmp_path.iterdir()] == ["view"]


def test_facts_say_how_it_was_made(view_dir: Path, small_capture: Capture) -> None:
    facts = open_view(view_dir).facts
    policy = {"context_length": 16, "prepend_bos": True, "store_special": False, "packed": True, "chat_template": False}
    assert facts["policy"] == policy
    assert facts["special_ids"] == [0, 1]
    assert facts["hook"] == RESID
    assert facts["sae"]["d_sae"] == 96
    assert facts["capture"]["run_id"] == small_capture.manifest["run_id"]
    assert (facts["k"], facts["intervals"], facts["per_interval"]) == (4, 5, 3)


@contextmanager
def small_files() -> Iterator[None]:
    """No file may grow beyond 4 kB, as on a disk that fills up.

    Holds for the whole process, so it surrounds one call and nothing else: pytest itself may be writing to a file.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk(sae: Any, small_capture: Capture, tmp_path: Path) -> None:
    with pytest.raises(HarvestError, match="The disk is full"), small_files():
        run(sae, small_capture, tmp_path / "view")
    assert list(tmp_path.iterdir()) == []


def test_more_scratch_than_disk(tmp_path: Path) -> None:
    with pytest.raises(HarvestError, match=r"needs about 1000000000.0 GB of scratch space and [\d.]+ GB are free"):
        code_files._check_space(1e18, tmp_path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"sae": tiny_sae(d_in=24)}, "reads vectors of 24 numbers, but the capture holds 32"),
        ({"hook": "blocks.9.hook_resid_post"}, "no hook point blocks.9"),
        ({"intervals": 7}, "must divide 50"),
        ({"k": 0}, "At least 1 top context"),
    ],
)
def test_bad_input(change: dict[str, Any], sentence: str, sae: Any, small_capture: Capture, tmp_path: Path) -> None:
    call: dict[str, Any] = {"sae": sae, "capture": small_capture, "hook": RESID, "out_dir": tmp_path / "view"} | change
    with pytest.raises(HarvestError, match=sentence):
        harvest(**call)
    assert list(tmp_path.iterdir()) == []


def test_broken_weights(small_capture: Capture, tmp_path: Path) -> None:
    sae = tiny_sae("standard")
    sae.W_enc[0, 3] = torch.nan
    with pytest.raises(HarvestError, match="NaN or infinite"):
        run(sae, small_capture, tmp_path / "view")
    assert list(tmp_path.iterdir()) == []


# -- killed and taken up again
class Killed(BaseException):
    """Ends a harvest the way SIGKILL does: nothing that cleans up is run, see `killed`."""


def killed(sae: Any, capture: Capture, folder: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """A harvest that ends after `at` rows; its folder is put back as the kill would have left it."""
    monkeypatch.setattr(sparse_encode, "CHUNK_ROWS", 100)
    monkeypatch.setattr(code_files, "CHECKPOINT_SECONDS", 0.0)
    kept, temporary = folder.with_name("kept"), folder.with_name(f"{folder.name}.tmp")

    def progress(done: int, total: int | None, step: str) -> None:
        if done >= at:
            shutil.copytree(temporary, kept)
            for file in kept.glob("codes-*"):  # what was written after the last note
                with file.open("ab") as more:
                    more.write(b"x" * 24)
            raise Killed

    with pytest.raises(Killed):
        run(sae, capture, folder, progress=progress)
    kept.rename(temporary)


def test_a_killed_harvest_goes_on_where_it_was(
    sae: Any, small_capture: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(sae, small_capture, tmp_path / "whole")
    killed(sae, small_capture, tmp_path / "view", monkeypatch, 1500)
    seen: list[int] = []
    run(sae, small_capture, tmp_path / "view", progress=lambda done, total, step: seen.append(done))
    assert min(seen) > 1500, "nothing was encoded twice"
    for file in (tmp_path / "whole").glob("*.npy"):
        assert file.read_bytes() == (tmp_path / "view" / file.name).read_bytes(), file.name
    assert not list((tmp_path / "view").glob("codes-*")) and not (tmp_path / "view" / code_files.SCRATCH).exists()


def test_scratch_of_another_sae_is_not_gone_on_with(
    sae: Any, small_capture: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(sae, small_capture, tmp_path / "view", monkeypatch, 1500)
    other = tiny_sae("topk")
    with torch.no_grad():
        other.W_enc += 0.1
    assert fingerprint(other) != fingerprint(sae) == fingerprint(tiny_sae("topk"))
    seen: list[int] = []
    run(other, small_capture, tmp_path / "view", progress=lambda done, total, step: seen.append(done))
    assert min(seen) <= 100
    compare(open_view(tmp_path / "view"), Naive(other, small_capture), small_capture.context_length)


def test_a_limit_makes_a_partial_view(
    sae: Any, small_capture: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse_encode, "CHUNK_ROWS", 100)
    summary = run(sae, small_capture, tmp_path / "view", limit=550)
    view = open_view(tmp_path / "view")
    assert view.n_tokens == summary["n_tokens"] == 600 and view.facts["partial"]
    assert view.facts["n_tokens_whole"] == small_capture.n_rows


# -- the encoder
@pytest.mark.parametrize("k", [1, 6, 12, 40])
@pytest.mark.parametrize("offset", [0.0, 3.0, -3.0])
@pytest.mark.parametrize("d_sae", [512, 605])  # whole tiles of columns, and a rest
def test_the_fast_encoder_chooses_as_float32_does(k: int, offset: float, d_sae: int) -> None:
    sae = build_sae(SAEConfig("topk", 32, d_sae, hook_name=RESID, k=k)).requires_grad_(False)
    with torch.no_grad():
        sae.b_enc += offset * torch.rand(d_sae, generator=torch.Generator().manual_seed(1))
        sae.W_enc *= torch.logspace(-1, 1, d_sae)  # lengths of every order, so that bounds differ
    x = torch.randn(700, sae.config.d_in, generator=torch.Generator().manual_seed(2))
    x *= torch.logspace(-2, 3, 700)[:, None]  # a few tokens are hundreds of times as long as others
    row, feature, value = SparseEncoder(sae)(x)
    found = np.zeros((700, d_sae), np.float32)
    found[row, feature] = value
    with torch.no_grad():
        np.testing.assert_allclose(found, sae.encode(x).numpy(), rtol=1e-4, atol=1e-4)


def sparse_sae(architecture: str, offset: float) -> Any:
    """512 features with encoder columns of every length, of which few fire on most rows."""
    sae = build_sae(SAEConfig(architecture, 32, 512, hook_name=RESID, k=6 if "topk" in architecture else None))
    sae.requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    sae.W_enc *= torch.logspace(-1, 1, 512)
    if architecture != "gated":
        sae.b_enc += offset * torch.rand(512, generator=generator)
    if "jumprelu" in architecture:
        sae.threshold.copy_(sae.W_enc.norm(dim=0) * (torch.rand(512, generator=generator) + 1) - 0.5)
    return sae


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "jumprelu_transcoder", "topk_transcoder"])
@pytest.mark.parametrize("offset", [0.0, -8.0])
@pytest.mark.parametrize("dense", [False, True])
def test_both_ways_of_encoding_agree(architecture: str, offset: float, dense: bool) -> None:
    sae = sparse_sae(architecture, offset)
    x = torch.randn(700, sae.config.d_in, generator=torch.Generator().manual_seed(2))
    x *= torch.logspace(-2, 2, 700)[:, None]
    encoder = SparseEncoder(sae)
    encoder.dense = dense
    row, feature, value = encoder(x)
    assert (np.diff(row) >= 0).all()
    found = np.zeros((700, 512), np.float32)
    found[row, feature] = value
    np.testing.assert_allclose(found, sae.encode(x).numpy(), rtol=1e-4, atol=1e-4)


def test_codes_do_not_depend_on_the_other_rows() -> None:
    """The bounds of a row do, the codes that they leave do not."""
    for architecture in ("topk", "jumprelu"):
        sae = sparse_sae(architecture, -1.0)
        x = torch.randn(300, 32, generator=torch.Generator().manual_seed(2)) * torch.logspace(-2, 2, 300)[:, None]
        encoder = SparseEncoder(sae)
        encoder.dense = False
        found = []
        for rows in (1, 7, 300):
            codes = {}
            for first in range(0, 300, rows):
                row, feature, value = encoder(x[first : first + rows])
                codes |= {(int(r) + first, int(f)): v.tobytes() for r, f, v in zip(row, feature, value, strict=True)}
            found.append(codes)
        assert found[0] == found[1] == found[2] and len(found[0]) > 300


def test_the_way_of_encoding_is_chosen_by_how_many_codes_the_bounds_leave_open() -> None:
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(2))
    for architecture, offset, dense in (
        ("topk", 0.0, False),
        ("standard", 0.0, True),
        ("standard", -60.0, False),
        ("jumprelu", -3.0, False),
        ("gated", 0.0, True),
    ):
        encoder = SparseEncoder(sparse_sae(architecture, offset))
        encoder(x)
        assert encoder.dense is dense, architecture


def test_activations_that_are_no_numbers_are_not_swallowed() -> None:
    sae = tiny_sae("topk")
    x = torch.randn(40, sae.config.d_in)
    x[7, 3] = float("nan")
    assert not np.isfinite(SparseEncoder(sae)(x)[2].sum())
