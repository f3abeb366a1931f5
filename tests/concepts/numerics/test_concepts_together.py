"""Features that fire on the same tokens, held against the correlations of the dense codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from concepts import featurefile
from concepts.numerics import code_files, together
from concepts.numerics.harvest import harvest
from tests.tiny_models import RESID, tiny_sae


def fires(sae: Any, capture: Any) -> np.ndarray:
    """Which features fire on each stored token (n, d_sae)."""
    with torch.inference_mode():
        return np.concatenate([(sae.encode(x) > 0).numpy() for x, *_ in capture.rows(RESID)])


def expected(on: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pearson's correlations of the columns, 0 for pairs that met too seldom, and how often pairs met."""
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.nan_to_num(np.corrcoef(on.T.astype(np.float64)))
    met = on.T.astype(np.int64) @ on.astype(np.int64)
    found[met < together.LEAST] = 0
    np.fill_diagonal(found, 0)
    return found, met


def check(view: featurefile.FeatureView, on: np.ndarray) -> None:
    correlations, met = expected(on)
    assert view.n_together == len(on)
    some = 0
    for i in range(on.shape[1]):
        companions = view.companions(i)
        best = np.sort(correlations[i][correlations[i] > 0])[::-1][: together.KEPT]
        np.testing.assert_allclose([one.correlation for one in companions], best, rtol=1e-5)
        for one in companions:
            assert one.correlation == pytest.approx(correlations[i, one.feature], rel=1e-5)
            assert one.count == met[i, one.feature] and one.share == pytest.approx(one.count / on[:, i].sum())
        some += len(companions) > 1
    assert some > 20


@pytest.mark.parametrize("architecture", ["topk", "standard"])
def test_correlations_are_those_of_the_dense_codes(
    architecture: str, small_capture: Any, llama: Any, tmp_path: Path
) -> None:
    sae = tiny_sae(architecture)
    harvest(sae, small_capture, RESID, tmp_path / "view", k=2, per_interval=1)
    view = featurefile.open_view(tmp_path / "view")
    check(view, fires(sae, small_capture))
    assert not (tmp_path / "view" / together.SAMPLE).exists()


def test_a_long_capture_is_sampled_evenly(
    sae: Any, small_capture: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from concepts.numerics import sparse_encode

    monkeypatch.setattr(together, "MOST_ROWS", 1000)
    monkeypatch.setattr(sparse_encode, "CHUNK_ROWS", 77)
    harvest(sae, small_capture, RESID, tmp_path / "view", k=2, per_interval=1)
    on = fires(sae, small_capture)
    step = -(-len(on) // 1000)
    assert step > 1
    check(featurefile.open_view(tmp_path / "view"), on[::step])


def test_many_codes_a_row_take_fewer_rows(
    sae: Any, small_capture: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(together, "MOST_PAIRS", 6 * 6 * 500)
    harvest(sae, small_capture, RESID, tmp_path / "view", k=2, per_interval=1)
    n = featurefile.open_view(tmp_path / "view").n_together
    assert 450 <= n <= 520, "a row of this SAE has at most 6 codes"


def test_without_numba_the_columns_are_the_same(
    sae: Any, small_capture: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if code_files.compiled() is None:
        pytest.skip("numba is not installed")
    harvest(sae, small_capture, RESID, tmp_path / "quick", k=2, per_interval=1)
    monkeypatch.setattr(together, "share", lambda task, n, size: [task(0, n)])
    plainly = together.write_companions
    from concepts.numerics import harvest as module

    monkeypatch.setattr(module, "write_companions", lambda folder, n, loops: plainly(folder, n, None))
    harvest(sae, small_capture, RESID, tmp_path / "plain", k=2, per_interval=1)
    files = sorted((tmp_path / "quick").glob("together_*.npy"))
    assert len(files) == 4
    for file in files:
        assert file.read_bytes() == (tmp_path / "plain" / file.name).read_bytes(), file.name


def test_a_view_of_before_has_none(view_dir: Path, tmp_path: Path) -> None:
    import json
    import shutil

    shutil.copytree(view_dir, tmp_path / "old")
    facts = json.loads((tmp_path / "old" / "view.json").read_text())
    del facts["together"]
    (tmp_path / "old" / "view.json").write_text(json.dumps(facts))
    old = featurefile.open_view(tmp_path / "old")
    assert (old.n_together, old.companions(3)) == (0, [])
    assert any(featurefile.open_view(view_dir).companions(i) for i in range(96))
