"""mi_crow's LocalStore: what it wrote is read, what we write it reads, and what is wrong with a run is one sentence.

The layout is written out by hand, as its source has it; the last test holds ours against the real mi_crow where it is installed.
"""

import json
import shutil
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from saes.numerics.lm import LM, load_lm
from tests.conftest import TEXT
from tests.peers import peer
from training.numerics.capture import capture
from training.numerics.local_store import read_run, write_run
from training.numerics.shards import CaptureError, open_capture
from training.numerics.tokens import TokenPolicy, special_ids

HOOK = "blocks.0.hook_resid_post"
LAYER = "llamaforcausallm_model_layers_0"
POINT = {"name": HOOK, "module": "model.layers.0", "side": "out", "d": 32, "layer": 0}
MODEL = {"name": "tiny", "architecture": "LlamaForCausalLM", "revision": None}
TEXTS = ["Short.", "A sentence of a few words.", TEXT[:60], "The end", "Numbers such as 3.14"]


@pytest.fixture(scope="module")
def lm(tiny_model_dir: Path) -> LM:
    return load_lm(tiny_model_dir, device="cpu")


def store(base: Path, lm: LM, masks: bool = True, size: int = 2) -> Path:
    """A run as mi_crow saves it: texts padded to the longest of their batch; returns its folder."""
    lm.tokenizer.pad_token = lm.tokenizer.eos_token
    run = base / "runs" / "r1"
    for number, start in enumerate(range(0, len(TEXTS), size)):
        encoded = lm.tokenizer(TEXTS[start : start + size], return_tensors="pt", padding=True)
        x = lm.activations(encoded["input_ids"], [HOOK], encoded["attention_mask"])[HOOK]
        batch = run / f"batch_{number}"
        (batch / LAYER).mkdir(parents=True)
        save_file({"tensor": x.contiguous()}, batch / LAYER / "activations.safetensors")
        names = {LAYER: ["activations"]}
        if masks:
            special = torch.isin(encoded["input_ids"], torch.tensor(sorted(special_ids(lm.tokenizer))))
            (batch / "attention_masks").mkdir()
            mask = encoded["attention_mask"].bool() & ~special
            save_file({"tensor": mask}, batch / "attention_masks" / "attention_mask.safetensors")
            names["attention_masks"] = ["attention_mask"]
        (batch / "metadata.json").write_text(json.dumps({"_tensor_metadata_names": names}))
    meta = {"run_name": "r1", "model": "LlamaForCausalLM", "options": {"max_length": None}, "layer_signatures": [LAYER]}
    (run / "meta.json").write_text(json.dumps(meta))
    return run


def read(path: Path, out: Path, lm: LM, **changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"model": MODEL, "texts": TEXTS, "tokenizer": lambda: lm.tokenizer} | changes
    return read_run(path, out, given.pop("points", [POINT]), **given)


@pytest.mark.parametrize("masks", [True, False])
def test_a_run_becomes_a_capture_of_its_real_tokens(lm, tmp_path, masks):
    store(tmp_path / "store", lm, masks)
    manifest = read(tmp_path / "store", tmp_path / "c", lm)
    made = open_capture(tmp_path / "c")
    encoded = [lm.tokenizer(text)["input_ids"] for text in TEXTS]
    exact = torch.cat([lm.activations(torch.tensor([ids]), [HOOK])[HOOK][0] for ids in encoded])
    special = special_ids(lm.tokenizer)
    real = torch.tensor([token not in special for ids in encoded for token in ids])
    x = torch.cat([x for x, _, _ in made.rows(HOOK)])
    torch.testing.assert_close(x, exact[real], rtol=1e-4, atol=1e-5)
    assert manifest["tokens_known"] is True and manifest["source"]["masked"] is masks
    for number, ids in enumerate(encoded):
        assert made.contexts()[number, : len(ids)].tolist() == ids and made.lengths()[number] == len(ids)
    assert manifest["n_documents"] == made.n_contexts == len(TEXTS)
    assert next(made.batches(HOOK, 4)).shape == (4, 32)


def test_with_other_texts_the_tokens_are_not_known_and_the_mask_is_still_honoured(lm, tmp_path):
    run = store(tmp_path / "store", lm)
    manifest = read(run, tmp_path / "c", lm, texts=TEXTS[::-1])
    made = open_capture(tmp_path / "c")
    kept = sum(int(load_file(file)["tensor"].sum()) for file in run.glob("batch_*/attention_masks/*.safetensors"))
    assert manifest["tokens_known"] is False and made.n_rows == kept
    with pytest.raises(CaptureError, match="tokens of the capture c are not known"):
        made.contexts()


def test_reading_again_returns_what_is_there(lm, tmp_path):
    run = store(tmp_path / "store", lm)
    assert read(run, tmp_path / "c", lm) == read(run, tmp_path / "c", lm)


def change(run: Path, batch: int, values: torch.Tensor | None, layer: str = LAYER) -> None:
    file = run / f"batch_{batch}" / layer / "activations.safetensors"
    if values is None:
        file.write_bytes(file.read_bytes()[:-20])
    else:
        save_file({"tensor": values}, file)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda run: change(run, 1, None), "batch_1/.* of the run r1 is damaged or cut"),
        (
            lambda run: change(run, 1, torch.zeros(2, 9, 16)),
            r"holds .* as \(2, 9, 16\), where .* \(texts, tokens, 32\)",
        ),
        (
            lambda run: change(run, 1, torch.zeros(2, 99, 32)),
            "the mask of batch_1 of the run r1 differ in their shapes",
        ),
        (lambda run: shutil.rmtree(run / "batch_1" / LAYER), f"batch_1 of the run r1 has no layer {LAYER}"),
        (lambda run: shutil.rmtree(run / "batch_1"), "batch_1 of the run r1 is missing, and later ones are there"),
        (lambda run: (run / "meta.json").write_text("{"), "meta.json of the run r1 is damaged"),
        (lambda run: (run / "meta.json").write_text('{"model": "GPT2LMHeadModel"}'), "was made by a GPT2LMHeadModel"),
        (lambda run: shutil.rmtree(run), "holds no batch_0 of a mi_crow run"),
    ],
)
def test_what_is_wrong_with_a_run_is_one_sentence(lm, tmp_path, damage, sentence):
    run = store(tmp_path / "store", lm)
    damage(run)
    with pytest.raises(CaptureError, match=sentence) as caught:
        read(tmp_path / "store", tmp_path / "c", lm)
    assert "\n" not in str(caught.value) and not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda x: x.to(torch.int32), "as torch.int32; only floats can be read"),
        (lambda x: torch.full_like(x, torch.nan), "batch_1 of the run r1 holds NaN"),
    ],
)
def test_wrong_numbers_leave_nothing(lm, tmp_path, spoil, sentence):
    run = store(tmp_path / "store", lm)
    change(run, 1, spoil(load_file(run / "batch_1" / LAYER / "activations.safetensors")["tensor"]))
    with pytest.raises(CaptureError, match=sentence):
        read(run, tmp_path / "c", lm)
    assert not (tmp_path / "c").exists()


def test_a_capture_is_written_as_a_run_and_read_again(lm, tmp_path):
    hooks = [HOOK, "blocks.1.attn.hook_z"]
    texts = [f"Text {i}. {TEXT}" for i in range(6)]
    capture(lm, texts, hooks, tmp_path / "c", policy=TokenPolicy(context_length=16), shard_tokens=96)
    made = open_capture(tmp_path / "c")
    run_id = write_run(made, tmp_path / "store", "LlamaForCausalLM")
    run = tmp_path / "store" / "runs" / run_id
    assert json.loads((run / "meta.json").read_text())["layer_signatures"] == [
        LAYER, "llamaforcausallm_model_layers_1_self_attn_o_proj_input",
    ]  # fmt: skip
    for number, shard in enumerate(made.shards):
        batch = run / f"batch_{number}"
        assert json.loads((batch / "metadata.json").read_text())["_tensor_metadata_names"][LAYER] == ["activations"]
        x = load_file(batch / LAYER / "activations.safetensors")["tensor"]
        assert x.shape == (1, shard["n_rows"], 32)
    read(run, tmp_path / "again", lm, points=made.manifest["hook_points"], texts=texts)
    again = open_capture(tmp_path / "again")
    for hook in hooks:
        first, second = (torch.cat([x for x, _, _ in one.rows(hook)]) for one in (made, again))
        assert torch.equal(first, second)
    assert again.n_rows == made.n_rows and np.array_equal(again.documents(), np.arange(len(made.shards)))


def test_the_real_mi_crow_reads_what_is_written_and_what_it_writes_is_read(lm, tmp_path, monkeypatch):
    peers = next(Path(peer() or "/").parents[1].glob("lib/python3*/site-packages/mi_crow"), None)
    if peers is None:
        pytest.skip("needs mi_crow: make peers")
    monkeypatch.setattr(sys, "path", [*sys.path, str(peers.parent)])  # last: our own packages go first
    mi_crow, loader = import_module("mi_crow.store"), import_module("mi_crow.store.store_dataloader")
    capture(lm, [TEXT] * 6, [HOOK], tmp_path / "c", policy=TokenPolicy(context_length=16), shard_tokens=96)
    made = open_capture(tmp_path / "c")
    run_id = write_run(made, tmp_path / "store", "LlamaForCausalLM")
    theirs = mi_crow.LocalStore(tmp_path / "store")
    assert theirs.list_run_batches(run_id) == list(range(len(made.shards)))
    assert theirs.get_run_metadata(run_id)["model"] == "LlamaForCausalLM"
    rows = torch.cat(list(loader.StoreDataloader(theirs, run_id, LAYER, batch_size=7)))
    assert torch.equal(rows, torch.cat([x for x, _, _ in made.rows(HOOK)]))

    encoded = [lm.tokenizer(text)["input_ids"] for text in TEXTS]
    for number, ids in enumerate(encoded):
        x = lm.activations(torch.tensor([ids]), [HOOK])[HOOK]
        mask = torch.ones(1, len(ids), dtype=torch.bool)
        tensors = {LAYER: {"activations": x}, "attention_masks": {"attention_mask": mask}}
        theirs.put_detector_metadata("r2", number, {LAYER: {"activations_shape": list(x.shape)}}, tensors)
    theirs.put_run_metadata("r2", {"model": "LlamaForCausalLM", "options": {}})
    assert read(tmp_path / "store" / "runs" / "r2", tmp_path / "read", lm)["tokens_known"] is True
    assert open_capture(tmp_path / "read").n_rows == sum(map(len, encoded))
