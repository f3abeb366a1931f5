"""The logit lens against the models' own final norm and head, run on the direction itself."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from concepts.featurefile import ViewError, open_view
from concepts.numerics import logit_lens as module
from concepts.numerics.harvest import harvest
from concepts.numerics.logit_lens import LogitLensError, effective_unembedding, logit_lens
from tests.tiny_models import D_MODEL, tiny_lm, tiny_sae

NORMS = {
    "llama": "model.norm",
    "gemma": "model.norm",
    "gpt2": "transformer.ln_f",
    "gpt_neox": "gpt_neox.final_layer_norm",
}


@torch.no_grad()
def through_the_model(lm: Any, kind: str, w: torch.Tensor) -> torch.Tensor:
    """w @ E without E: norm and head are odd in w up to the norm's bias, and divide by a scale that is known."""
    norm, head = lm.model.get_submodule(NORMS[kind]), lm.model.get_output_embeddings()
    w = w * 1e4  # makes the norm's epsilon small
    logits = (head(norm(w)) - head(norm(-w))) / 2
    centred = w - w.mean(-1, keepdim=True) if kind in ("gpt2", "gpt_neox") else w
    return logits * centred.pow(2).mean(-1, keepdim=True).sqrt() / 1e4


@pytest.mark.parametrize("kind", list(NORMS))
def test_equals_norm_and_head(kind: str, tiny_model_dir: Path) -> None:
    lm = tiny_lm(kind, tiny_model_dir)
    w = torch.nn.functional.normalize(torch.randn(50, D_MODEL, generator=torch.Generator().manual_seed(3)))
    unembedding, how = effective_unembedding(lm)
    torch.testing.assert_close(w @ unembedding, through_the_model(lm, kind, w), rtol=1e-4, atol=1e-5)
    assert NORMS[kind].rpartition(".")[2] in how
    assert ("LayerNorm" in how) == (kind in ("gpt2", "gpt_neox"))
    assert ("tied" in how) == (kind != "gpt_neox")


def test_gain_in_half_precision_and_odd_width(tiny_model_dir: Path) -> None:
    lm = tiny_lm("llama", tiny_model_dir)
    gain = lm.model.model.norm.weight.clone()
    lm.model.to(torch.bfloat16)
    measured, centred = module._measure(lm.model.model.norm, lm)
    torch.testing.assert_close(measured, gain, rtol=0.01, atol=1e-4)
    assert not centred
    norm = torch.nn.LayerNorm(33)
    torch.nn.init.normal_(norm.weight)
    lm.d_model, lm._dtype = 33, torch.float32
    measured, centred = module._measure(norm, lm)
    torch.testing.assert_close(measured, norm.weight.detach(), rtol=1e-5, atol=1e-6)
    assert centred


def test_columns(view_dir: Path, sae: Any, llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_NUMBERS", 2000)  # several chunks
    sae = copy.deepcopy(sae)
    with torch.no_grad():  # decoder rows of any length: what is told is of their directions
        sae.W_dec.mul_(torch.linspace(0.5, 2, 96)[:, None])
    seen: list[tuple[int, int | None, str]] = []
    result = logit_lens(sae, llama, view_dir, progress=lambda *report: seen.append(report))
    view = open_view(view_dir)
    unit = torch.nn.functional.normalize(sae.W_dec, dim=1)
    logits = unit @ effective_unembedding(llama)[0]
    cosine = unit @ unit.T
    for i in range(96):
        record = view.feature(i)
        order = logits[i].argsort(descending=True).tolist()
        assert [logit.id for logit in record.raised] == order[:10]
        assert [logit.id for logit in record.lowered] == order[::-1][:10]
        np.testing.assert_allclose([r.value for r in record.raised], logits[i][order[:10]], rtol=1e-5)
        others = [j for j in cosine[i].argsort(descending=True).tolist() if j != i]
        assert [n.feature for n in record.neighbours] == others[:10]
        np.testing.assert_allclose([n.cosine for n in record.neighbours], cosine[i][others[:10]], rtol=1e-4, atol=1e-6)
        assert record.decoder_norm == pytest.approx(float(sae.W_dec[i].norm()))
        assert record.raised[0].text == view.token_text(record.raised[0].id)
        found = view.logits_histogram(i)
        assert found is not None and found.counts.sum() == logits.shape[1]
        expected, edges = np.histogram(logits[i].numpy(), bins=50)
        np.testing.assert_allclose(found.edges, edges, rtol=1e-5, atol=1e-6)
        assert abs(found.counts.cumsum() - expected.cumsum()).max() <= 2, "but for values on an edge of a bin"
    np.testing.assert_allclose(view.directions, unit, atol=1e-3)
    near = view.nearest(unit[7].numpy(), 3)
    assert near[0].feature == 7 and [n.feature for n in near[1:]] == [n.feature for n in view.feature(7).neighbours[:2]]
    with pytest.raises(ViewError, match="have 32 numbers, not 5"):
        view.nearest(np.ones(5, np.float32))
    assert result["logits"] and "gain of the final norm norm" in result["how"]
    assert view.logit_lens == result
    assert seen[-1][0] == seen[-1][1] == 2 * 96


def test_raises_filter(view_dir: Path, sae: Any, llama: Any) -> None:
    logit_lens(sae, llama, view_dir)
    view = open_view(view_dir)
    text = view.feature(5).raised[0].text
    found = view.sorted("feature", descending=False, filters={"raises": text})
    expected = [i for i in range(96) if any(text.casefold() in r.text.casefold() for r in view.feature(i).raised)]
    assert found.tolist() == expected
    assert 5 in expected


def test_not_in_the_residual_stream(small_capture: Any, llama: Any, tmp_path: Path) -> None:
    from dataclasses import replace

    sae = tiny_sae()
    sae.config = replace(sae.config, hook_name="blocks.0.attn.hook_z")
    harvest(sae, small_capture, "blocks.0.attn.hook_z", tmp_path / "view")
    result = logit_lens(sae, llama, tmp_path / "view")
    record = open_view(tmp_path / "view").feature(0)
    assert not result["logits"]
    assert "blocks.0.attn.hook_z is not written into the residual stream" in result["how"]
    assert record.raised == record.lowered == []
    assert len(record.neighbours) == 10


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"d_sae": 64}, "The view has 96 features, the SAE 64"),
        ({"d_in": 24}, "writes vectors of 24 numbers and tiny-llama has 32"),
    ],
)
def test_bad_input(other: dict[str, int], sentence: str, view_dir: Path, llama: Any) -> None:
    with pytest.raises(LogitLensError, match=sentence):
        logit_lens(tiny_sae(**other), llama, view_dir)


def test_unknown_hook_point(view_dir: Path, llama: Any) -> None:
    from dataclasses import replace

    sae = tiny_sae()
    sae.config = replace(sae.config, hook_name="blocks.7.hook_resid_post")
    with pytest.raises(LogitLensError, match="There is no layer 7"):
        logit_lens(sae, llama, view_dir)
