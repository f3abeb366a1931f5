"""Views read back: records, lists, damage; and without torch or Django."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from concepts.featurefile import FeatureView, ViewError, open_view


def test_record(view_dir: Path, small_capture: Any, llama: Any) -> None:
    view = open_view(view_dir)
    contexts, documents = small_capture.contexts(), small_capture.documents()
    i = int(view.sorted("density")[0])
    record = view.feature(i)
    assert record.feature == i
    assert len(record.top) == 4
    for example in record.top:
        assert example.ids.tolist() == contexts[example.context].tolist()
        assert example.document == documents[example.context]
        assert example.activations[example.peak] == example.value == example.activations.max()
        assert example.special.tolist() == (example.ids <= 1).tolist()
        assert example.activations[example.special].sum() == 0
        text = "".join(token for token, special in zip(example.tokens, example.special, strict=True) if not special)
        if "<0x" not in text:
            assert text == llama.tokenizer.decode(example.ids, skip_special_tokens=True)
    assert record.top[0].value == record.maximum == pytest.approx(record.histogram.edges[-1])
    assert [interval.low for interval in record.intervals] == sorted((x.low for x in record.intervals), reverse=True)
    assert record.top_tokens[0].mean == record.top_tokens[0].total / record.top_tokens[0].count


def test_without_a_lens(view_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(view_dir, tmp_path / "view")
    (tmp_path / "view" / "logit_lens.json").unlink(missing_ok=True)
    view = open_view(tmp_path / "view")
    record = view.feature(0)
    assert record.raised == record.lowered == record.neighbours == []
    assert record.decoder_norm is None
    with pytest.raises(ViewError, match="run the logit lens first"):
        view.sorted(filters={"raises": "Paris"})


def test_without_a_tokenizer(small_capture: Any, sae: Any, tmp_path: Path) -> None:
    from concepts.numerics.harvest import harvest
    from tests.tiny_models import RESID

    harvest(sae, small_capture, RESID, tmp_path / "view")
    example = open_view(tmp_path / "view").feature(0).top[0]
    assert example.tokens == [f"<token {i}>" for i in example.ids]


def test_sorted_and_filtered(view_dir: Path) -> None:
    view = open_view(view_dir)
    density = view.summary["density"]
    assert view.sorted("density").tolist() == sorted(range(96), key=lambda i: (-density[i], i))
    assert view.sorted("max", descending=False).tolist() == np.argsort(view.summary["max"], kind="stable").tolist()
    found = view.sorted("feature", False, {"density": (0.01, 0.1), "alive": True, "max": (None, 5)})
    assert found.tolist() == [i for i in range(96) if 0.01 <= density[i] <= 0.1 and 0 < view.summary["max"][i] <= 5]
    text = view.feature(int(view.sorted("density")[0])).top_tokens[0].text
    expected = [
        i for i in range(96) if any(text.casefold() in top.text.casefold() for top in view.feature(i).top_tokens)
    ]
    assert view.sorted("feature", False, {"token": text.upper()}).tolist() == expected
    assert view.sorted("feature", False, {"token": "no such token"}).tolist() == []
    tokens = {i: view.feature(i).top_tokens[0].text.casefold() for i in range(96) if view.summary["n_fires"][i]}
    order = view.sorted("token", False).tolist()
    assert [tokens[i].strip() for i in order[: len(tokens)]] == sorted(token.strip() for token in tokens.values())
    assert set(order[len(tokens) :]) == set(range(96)) - set(tokens), "dead ones come last"
    by = np.full(96, np.nan)
    by[[7, 3, 50]] = 2, 1, 1
    assert view.sorted("label", True, by=by).tolist()[:4] == [7, 3, 50, 0]
    with pytest.raises(ViewError, match="cannot be sorted"):
        view.sorted("label")


def test_density_histogram(view_dir: Path) -> None:
    histogram = open_view(view_dir).density_histogram()
    n_fires = open_view(view_dir).summary["n_fires"]
    assert histogram.dead == (n_fires == 0).sum()
    assert histogram.counts.sum() == (n_fires > 0).sum()
    assert histogram.edges[-1] == 0
    assert 10 ** histogram.edges[0] <= 1 / histogram.n_tokens


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda view: view.feature(96), "There is no feature 96; this SAE has features 0 to 95"),
        (lambda view: view.feature(-1), "There is no feature -1"),
        (lambda view: view.sorted("beauty"), 'cannot be sorted by "beauty"'),
        (lambda view: view.sorted(filters={"beauty": (1, 2)}), 'cannot be filtered by "beauty"'),
    ],
)
def test_bad_questions(call: Any, sentence: str, view_dir: Path) -> None:
    with pytest.raises(ViewError, match=sentence):
        call(open_view(view_dir))


def test_damage_is_named(view_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "view"
    with pytest.raises(ViewError, match="There is no feature view"):
        open_view(folder)
    shutil.copytree(view_dir, folder)
    (folder / "maximum.npy").unlink()
    with pytest.raises(ViewError, match="lost its column maximum"):
        open_view(folder).feature(0)
    (folder / "n_fires.npy").write_bytes((view_dir / "n_fires.npy").read_bytes()[:200])
    with pytest.raises(ViewError, match=r"column n_fires .* is damaged"):
        open_view(folder).feature(0)
    facts = json.loads((folder / "view.json").read_text())
    (folder / "view.json").write_text(json.dumps(facts | {"version": 99}))
    with pytest.raises(ViewError, match="version 99, not 1"):
        open_view(folder)
    (folder / "view.json").write_text('{"version":')
    with pytest.raises(ViewError, match=r"view\.json .* is damaged"):
        open_view(folder)
    (folder / "view.json").unlink()
    with pytest.raises(ViewError, match="was not finished"):
        open_view(folder)


def large_view(folder: Path, n: int) -> FeatureView:
    """The columns that lists need, for n features."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    n_fires = rng.integers(0, 10_000, n)
    columns = {
        "n_fires": n_fires,
        "n_contexts": n_fires // 2,
        "maximum": rng.random(n, dtype=np.float32),
        "mean": np.where(n_fires > 0, rng.random(n, dtype=np.float32), np.nan),
        "top_token_ids": rng.integers(0, 50_000, (n, 10), dtype=np.int32),
        "vocabulary_start": np.arange(50_001) * 5,
        "vocabulary_bytes": np.frombuffer(b"".join(f"{i:05d}".encode() for i in range(50_000)), np.uint8),
    }
    for name, column in columns.items():
        np.save(folder / f"{name}.npy", column)
    facts = {"version": 1, "n_features": n, "n_tokens": 1_000_000, "intervals": 5, "special_ids": []}
    (folder / "view.json").write_text(json.dumps(facts))
    return open_view(folder)


def test_lists_of_131k_features(tmp_path: Path) -> None:
    view = large_view(tmp_path / "large", 131_072)
    for key, filters in [("density", {}), ("mean", {"alive": True, "max": (0.1, 0.9)}), ("max", {"token": "123"})]:
        order = view.sorted(key, filters=filters)
        values = view.summary[key][order]
        assert len(order) > 1000
        assert (np.diff(values[~np.isnan(values)]) <= 0).all()
    order = view.sorted("mean")
    assert np.isnan(view.summary["mean"][order[-1]])  # undefined ones come last in both directions
    assert np.isnan(view.summary["mean"][view.sorted("mean", descending=False)[-1]])


def test_light_to_import() -> None:
    code = (
        "import sys, concepts.featurefile;"
        "print(sorted({'torch', 'transformers', 'django', 'scipy', 'pandas', 'numba'} & set(sys.modules)))"
    )
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
