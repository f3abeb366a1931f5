"""Codes read while the model runs, against codes of captured activations, at every hook point of every family."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from inference.numerics import infer as module
from inference.numerics.infer import Codes, InferError, Reader, infer, infer_many, read
from saes.numerics.lm import LMError, UnknownHookPoint
from tests.tiny_models import FAMILIES, RESID, tiny_lm, tiny_sae

TEXT = "Paris is the capital of France, and Rome is that of Italy."


@lru_cache
def model(family: str, folder: Path) -> Any:
    return tiny_lm(family, folder)


def ids_of(lm: Any, text: str = TEXT) -> list[int]:
    return [0, *lm.tokenizer(text)["input_ids"]]


def dense(codes: Codes, d_sae: int) -> np.ndarray:
    """(t, d_sae) of what was kept sparsely."""
    out = np.zeros((len(codes.start) - 1, d_sae), np.float32)
    for token, (a, b) in enumerate(zip(codes.start[:-1], codes.start[1:], strict=True)):
        out[token, codes.features[a:b]] = codes.values[a:b]
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_reading_on_the_way_equals_encoding_captured_activations(family: str, tiny_model_dir: Path) -> None:
    """For every named place, with the whole pass (probabilities asked for) and with the short one."""
    lm = model(family, tiny_model_dir)
    ids = ids_of(lm)
    points = lm.hook_points()
    readers = [Reader(tiny_sae("topk", d_in=point.d), point.name) for point in points]
    captured = lm.activations(torch.tensor([ids]), [point.name for point in points])
    whole, short = infer(lm, readers, ids, likely=5), infer(lm, readers, ids)
    sites = {point.name.partition("blocks.0.")[2] for point in points}
    assert {"hook_resid_pre", "hook_resid_post", "hook_mlp_out", "hook_attn_out", "attn.hook_z"} <= sites
    for reader, on_the_way, again in zip(readers, whole.codes, short.codes, strict=True):
        expected = reader.sae.encode(captured[reader.hook_name][0]).numpy()
        np.testing.assert_allclose(dense(on_the_way, 96), expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(dense(again, 96), expected, rtol=1e-5, atol=1e-5)
        assert (expected != 0).sum() == len(on_the_way.values) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_several_texts_at_once_equal_each_alone(family: str, tiny_model_dir: Path) -> None:
    lm = model(family, tiny_model_dir)
    texts = [ids_of(lm), ids_of(lm, "Rome"), ids_of(lm, "The dog slept by the door.")]
    readers = [Reader(tiny_sae("standard"), RESID), Reader(tiny_sae("standard"), "blocks.0.hook_mlp_out")]
    together = infer_many(lm, readers, texts)
    for ids, found in zip(texts, together, strict=True):
        alone = infer(lm, readers, ids)
        for one, other in zip(found, alone.codes, strict=True):
            np.testing.assert_allclose(dense(one, 96), dense(other, 96), rtol=1e-4, atol=1e-4)


def test_reading_changes_nothing(llama: Any) -> None:
    ids = ids_of(llama)
    before = llama.model(torch.tensor([ids])).logits
    infer(llama, [Reader(tiny_sae(), RESID)], ids, likely=3)
    assert torch.equal(llama.model(torch.tensor([ids])).logits, before)


def test_the_likeliest_tokens_are_the_softmax_of_the_logits(llama: Any) -> None:
    ids = ids_of(llama)
    found = infer(llama, [Reader(tiny_sae(), RESID)], ids, likely=7).likely
    logits = llama.model(torch.tensor([ids])).logits[0]
    expected = logits.softmax(-1).topk(7, dim=-1)
    assert found is not None and found.ids.tolist() == expected.indices.tolist()
    np.testing.assert_allclose(found.probabilities, expected.values, rtol=1e-5)
    np.testing.assert_allclose(found.logits, logits.gather(-1, expected.indices), rtol=1e-5)
    logprobs = [logits.log_softmax(-1)[i, ids[i + 1]].item() for i in range(len(ids) - 1)]
    np.testing.assert_allclose(found.logprobs[1:], logprobs, rtol=1e-4)
    assert np.isnan(found.logprobs[0]) and len(found.logprobs) == len(ids)


def test_control_tokens_are_marked(llama: Any) -> None:
    found = infer(llama, [Reader(tiny_sae(), RESID)], ids_of(llama))
    assert found.special == [True] + [False] * (len(found.ids) - 1)
    assert found.tokens[0] == "<bos>" and "".join(found.tokens[1:]) == TEXT and found.likely is None


def test_reading_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, x = tiny_sae("standard"), torch.randn(23, 32, generator=torch.Generator().manual_seed(2))
    whole = read(sae, x)
    monkeypatch.setattr(module, "DENSE_NUMBERS", 96 * 4)
    pieces = read(sae, x)
    assert pieces.start.tolist() == whole.start.tolist() and pieces.features.tolist() == whole.features.tolist()
    np.testing.assert_allclose(pieces.values, whole.values, rtol=1e-5)
    for a, b in zip(whole.start[:-1], whole.start[1:], strict=True):
        assert (np.diff(whole.values[a:b]) <= 0).all(), "largest first"


def test_the_strongest_of_every_token() -> None:
    codes = Codes(np.array([0, 3, 3, 4]), np.array([5, 6, 7, 8], np.int32), np.array([3, 2, 1, 9], np.float32))
    kept = codes.strongest(2)
    assert (kept.start.tolist(), kept.features.tolist(), kept.values.tolist()) == ([0, 2, 2, 3], [5, 6, 8], [3, 2, 9])


def test_what_cannot_be_read(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = ids_of(llama)
    with pytest.raises(InferError, match=r"reads vectors of 24 numbers, but blocks\.1\.hook_resid_post of .* has 32"):
        infer(llama, [Reader(tiny_sae(d_in=24), RESID)], ids)
    with pytest.raises(UnknownHookPoint, match="no layer 9"):
        infer(llama, [Reader(tiny_sae(), "blocks.9.hook_resid_post")], ids)
    with pytest.raises(LMError, match="outside this model's vocabulary"):
        infer(llama, [Reader(tiny_sae(), RESID)], [0, 10**6], likely=3)
    with pytest.raises(LMError, match="reads at most 256"):
        infer(llama, [Reader(tiny_sae(), RESID)], [5] * 300)
    with pytest.raises(InferError, match="not finite numbers"):
        read(tiny_sae(), torch.full((2, 32), float("nan")))
    monkeypatch.setattr(module, "MOST_LOGITS", 10 * llama.vocab_size)
    with pytest.raises(InferError, match="up to 10 tokens do"):
        infer(llama, [Reader(tiny_sae(), RESID)], [5] * 11, likely=3)
