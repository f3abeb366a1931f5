"""Loading language models from a folder, the Hub (or what answers like it) and GGUF, and every way to fail."""

import http.server
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import gguf
import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from saes.numerics.folders import FolderError
from saes.numerics.lm import LM, LMError, describe_config, import_gguf, load_lm, pick_device

TEXT = "Paris is the capital of France, and Rome is that of Italy."


@pytest.fixture
def folder(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model's folder that a test may spoil."""
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


def test_model_from_a_folder(tiny_model_dir):
    lm = load_lm(tiny_model_dir)
    assert isinstance(lm, LM)
    assert (lm.n_layers, lm.d_model, lm.max_context, lm.dtype) == (2, 32, 256, torch.float32)
    assert lm.device == pick_device() and not lm.model.training
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())
    assert len(lm.tokenizer) == lm.vocab_size
    assert load_lm(str(tiny_model_dir), dtype=torch.bfloat16, device="cpu").dtype == torch.bfloat16


def test_config_is_described_without_weights(folder):
    lm = load_lm(folder)
    (folder / "model.safetensors").unlink()
    about = describe_config(folder)
    assert about["architecture"] == "LlamaForCausalLM" and about["model_type"] == "llama"
    assert (about["n_layers"], about["d_model"], about["vocab_size"]) == (lm.n_layers, lm.d_model, lm.vocab_size)
    assert about["n_parameters"] == sum(parameter.numel() for parameter in lm.model.parameters())
    assert about["hook_points"] == [vars(point) for point in lm.hook_points()]
    json.dumps(about)


def spoil_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def spoil_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cut_weights(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def own_code(folder: Path) -> None:
    """A model whose code lies in its folder: importing it would leave a mark."""
    spoil_config(folder, model_type="strange", auto_map={"AutoConfig": "c.C", "AutoModelForCausalLM": "c.M"})
    (folder / "c.py").write_text("import pathlib; pathlib.Path(__file__).with_name('ran').touch()")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"has no config\.json"),
        (lambda folder: (folder / "config.json").write_text("{,"), "could not be loaded"),
        (lambda folder: spoil_config(folder, model_type="t5"), "is not a causal language model"),
        (lambda folder: spoil_config(folder, model_type="nonsense"), "could not be loaded"),
        (lambda folder: spoil_config(folder, intermediate_size=80), "could not be loaded|of the wrong shape"),
        (lambda folder: spoil_config(folder, num_hidden_layers=3), r"9 weights .* are missing .*layers\.2"),
        (lambda folder: (folder / "model.safetensors").unlink(), "could not be loaded"),
        (spoil_weights, r"1 weights .* are missing .*first: model\.layers\.1\.mlp\.down_proj\.weight"),
        (cut_weights, "could not be loaded"),
        (no_tokenizer, "has no tokenizer that can be read"),
        (own_code, "needs program code from its own repository, which is not run here"),
    ],
)
def test_broken_folder_is_one_sentence(folder, spoil, sentence):
    spoil(folder)
    with pytest.raises(LMError, match=sentence) as caught:
        load_lm(folder)
    assert_one_sentence(caught.value)
    assert not (folder / "ran").exists()


def assert_one_sentence(error: LMError) -> None:
    assert "\n" not in str(error) and 10 < len(str(error)) < 400


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "a/b/c", "two words", "", "..", "https://hf.co/gpt2"])
@pytest.mark.parametrize("function", [load_lm, describe_config])
def test_name_that_can_be_nothing_is_refused(name, function, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LMError, match=r"There is no folder|has no config\.json"):
        function(name)


def test_file_instead_of_a_folder_is_refused(tiny_model_dir):
    with pytest.raises(LMError, match="is a file; give the folder"):
        load_lm(tiny_model_dir / "config.json")


def test_offline_and_not_on_this_machine(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        LMError, match="nobody/nothing is not on this machine and the Hugging Face Hub cannot be reached"
    ):
        load_lm("nobody/nothing")


class Refusals(http.server.BaseHTTPRequestHandler):
    """Answers as the Hub does for repositories that are gated, missing or lack a revision."""

    answers = {"gated": (403, "GatedRepo"), "missing": (401, "RepoNotFound"), "old": (404, "RevisionNotFound")}

    def do_HEAD(self) -> None:
        kind = next((kind for kind in self.answers if kind in self.path), "missing")
        status, code = self.answers[kind]
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusals) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield
        server.shutdown()


@pytest.mark.parametrize(
    ("name", "revision", "sentence"),
    [
        ("someone/gated", None, "someone/gated is gated: accept its terms"),
        ("someone/missing", None, "There is no repository someone/missing on the Hub, or it is private"),
        ("someone/model", "old", "someone/model has no such revision"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(hub, name, revision, sentence):
    for function in (load_lm, describe_config):
        with pytest.raises(LMError, match=sentence) as caught:
            function(name, revision=revision)
        assert_one_sentence(caught.value)


# -- GGUF ------------------------------------------------------------------------------------------------------------
def write_gguf(path: Path, lm: LM) -> None:
    """Write a Llama as llama.cpp's converter does: its own names, and rows of q and k reordered for its rotary form."""
    config = lm.model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(lm.vocab_size)
    bpe = json.loads(lm.tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(bpe["vocab"], key=bpe["vocab"].get))
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_token_types([3 if i < 2 else 1 for i in range(lm.vocab_size)])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in lm.model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied to the embedding
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            tensor = tensor.view(heads, 2, -1, config.hidden_size).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_becomes_an_ordinary_folder_with_the_same_numbers(tiny_model_dir, tmp_path):
    lm = load_lm(tiny_model_dir, device="cpu")
    write_gguf(tmp_path / "tiny.gguf", lm)
    folder = import_gguf(tmp_path / "tiny.gguf", tmp_path / "models" / "tiny")
    assert folder == tmp_path / "models" / "tiny"
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"], "no temporary folder is left"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}

    again = load_lm(folder, device="cpu")
    ids = lm.tokenizer(TEXT, return_tensors="pt", add_special_tokens=False).input_ids
    assert torch.equal(again.tokenizer(TEXT, return_tensors="pt", add_special_tokens=False).input_ids, ids)
    assert again.tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    with torch.inference_mode():
        torch.testing.assert_close(again.model(ids).logits, lm.model(ids).logits)
    assert again.dtype == torch.float32 and getattr(again.model.config, "quantization_config", None) is None


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (None, "There is no file"),
        (b"PK\x03\x04 not gguf", "is not a GGUF file: it does not begin with"),
        (b"GGUF" + b"\x03\x00\x00\x00" + b"\xff" * 16, r"model\.gguf could not be loaded"),
        (b"GGUF", r"model\.gguf could not be loaded"),
    ],
)
def test_what_is_not_gguf_is_refused_and_leaves_nothing(data, sentence, tmp_path):
    path = tmp_path / "model.gguf"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(LMError, match=sentence) as caught:
        import_gguf(path, tmp_path / "out" / "model")
    assert_one_sentence(caught.value)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_converted_model_does_not_overwrite_another(folder, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(FolderError, match=r"already holds .*; give a new folder"):
        import_gguf(tmp_path / "x.gguf", folder)
    assert (folder / "config.json").is_file()


def test_transformers_models_are_imported_by_what_loads_one():
    """They take seconds, which every job would wait for that loads no model."""
    script = "import sys, saes.numerics.lm; print('transformers' in sys.modules, 'transformers.modeling_utils' in sys.modules)"
    root = Path(__file__).parents[3]
    found = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["True", "False"]
