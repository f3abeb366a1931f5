"""`inspect`: config and shapes of an SAE on the Hub, by requests for a few bytes of its weights."""

import io
import json
import tracemalloc
import zipfile
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from saehub.jobs.models import State, enqueue
from saehub.jobs.progress import JobError
from saes.models import SAE
from saes.remote import Remote, described, look, npz_shapes, safetensors_shapes, widths
from tests.mini_hub import MiniHub

pytestmark = pytest.mark.django_db
D_IN, D_SAE = 64, 4096
NEGATIVE = (60).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}     '


@pytest.fixture
def inspect(run_job: Any, user_of: Any) -> Any:
    def call(repo: str, path: str, format: str, **fields: Any) -> Any:
        row = SAE.objects.create(name="remote", source="hub", repo_id=repo, repo_path=path, format=format, **fields)
        job = run_job(enqueue("inspect", user_of("researcher"), title="Read", sae=row.pk))
        row.refresh_from_db()
        return row, job

    return call


def tensors(**more: Any) -> dict[str, torch.Tensor]:
    return {
        "W_enc": torch.zeros(D_IN, D_SAE), "b_enc": torch.zeros(D_SAE), "W_dec": torch.zeros(D_SAE, D_IN), "b_dec": torch.zeros(D_IN),
    } | more  # fmt: skip


def npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def test_a_safetensors_sae_is_described_from_its_header(hub: MiniHub, inspect: Any) -> None:
    config = {
        "architecture": "jumprelu", "d_in": D_IN, "d_sae": D_SAE, "apply_b_dec_to_input": False,
        "metadata": {"hook_name": "blocks.3.hook_resid_post", "model_name": "gpt2-small", "sae_lens_version": "6.0.0"},
    }  # fmt: skip
    weights = save(tensors(threshold=torch.zeros(D_SAE)))
    hub.repos["models/lab/sae"] = {
        "a/cfg.json": json.dumps(config).encode(), "a/sae_weights.safetensors": weights, "b/sae_weights.safetensors": weights,
    }  # fmt: skip
    row, job = inspect("lab/sae", "a", "saelens")
    assert job.state == State.DONE, job.traceback
    assert (row.d_in, row.d_sae, row.architecture) == (D_IN, D_SAE, "jumprelu")
    assert (row.model_name, row.hook_name) == ("gpt2-small", "blocks.3.hook_resid_post")
    assert row.read_at is not None and row.ready_at is None and row.path == ""
    assert row.size_bytes == len(weights) + len(json.dumps(config)) and row.config["tensors"]["W_enc"] == [D_IN, D_SAE]
    assert sent(hub, "a/sae_weights") < 2000 and sent(hub, "b/sae_weights") == 0, "no weights came over"


def sent(hub: MiniHub, path: str) -> int:
    """Bytes of a file that were asked for, by the ranges of the requests."""
    total = 0
    for one in hub.requests:
        if path in one.path and one.method == "GET":
            first, _, last = one.range.removeprefix("bytes=").partition("-")
            assert first.isdecimal() and last.isdecimal(), f"{one.path} was asked for whole"
            total += int(last) - int(first) + 1
    return total


def test_an_npz_is_described_from_its_directory(hub: MiniHub, inspect: Any) -> None:
    arrays = {name: tensor.numpy() for name, tensor in tensors(threshold=torch.zeros(D_SAE)).items()}
    data = npz(**arrays)
    path = "layer_3/width_4k/average_l0_82"
    hub.repos["models/google/gemma-scope-2b-pt-res"] = {f"{path}/params.npz": data}
    row, job = inspect(
        "google/gemma-scope-2b-pt-res", path, "gemma_scope_1", hook_name="blocks.3.hook_resid_post", d_sae=D_SAE
    )
    assert job.state == State.DONE, job.traceback
    assert (row.d_in, row.d_sae, row.architecture, row.size_bytes) == (D_IN, D_SAE, "jumprelu", len(data))
    assert row.hook_name == "blocks.3.hook_resid_post", "what the files do not say is kept"
    assert sent(hub, "params.npz") < len(data) / 2


def test_a_crosscoder_is_described_from_the_headers_of_all_its_files(hub: MiniHub, inspect: Any) -> None:
    layers, m = 4, 64
    one = {
        "w_enc": torch.zeros(D_IN, m), "b_enc": torch.zeros(m), "threshold": torch.zeros(m), "b_dec": torch.zeros(D_IN),
        "w_dec": torch.zeros(m, layers, D_IN),
    }  # fmt: skip
    path = "crosscoder/layer_5_9_12_15_width_65k_l0_medium"
    config = {"type": "crosscoder", "width": layers * m, "model_name": "google/gemma-3-270m-pt"}
    hub.repos["models/google/gemma-scope-2-270m-pt"] = {f"{path}/config.json": json.dumps(config).encode()} | {
        f"{path}/params_layer_{n}.safetensors": save(one) for n in range(layers)
    }
    row, job = inspect("google/gemma-scope-2-270m-pt", path, "gemma_scope_2")
    assert job.state == State.DONE, job.traceback
    assert (row.d_in, row.d_sae, row.architecture) == (layers * D_IN, layers * m, "causal_crosscoder")
    assert row.config["tensors"]["w_dec"] == row.config["tensors"]["w_dec_3"] == [m, layers, D_IN]
    assert sent(hub, "params_layer_3") < 2000


def test_a_pickle_is_not_read(hub: MiniHub, inspect: Any) -> None:
    file = io.BytesIO()
    torch.save({"encoder.weight": torch.zeros(8, 4)}, file)
    hub.repos["models/lab/dl"] = {
        "t/ae.pt": file.getvalue(), "t/config.json": json.dumps({"trainer": {"k": 32, "lm_name": "m", "dict_class": "AutoEncoderTopK"}}).encode(),
    }  # fmt: skip
    row, job = inspect("lab/dl", "t", "dictionary_learning")
    assert job.state == State.DONE, job.traceback
    assert (row.k, row.model_name, row.d_sae) == (32, "m", None) and sent(hub, "ae.pt") == 0
    assert any("is a pickle" in line.text for line in job.lines.all())


def test_a_config_that_lies_is_told(hub: MiniHub, inspect: Any) -> None:
    hub.repos["models/lab/sae"] = {
        "cfg.json": json.dumps({"d_sae": 9999, "d_in": D_IN}).encode(), "sae_weights.safetensors": save(tensors()),
    }  # fmt: skip
    row, job = inspect("lab/sae", "", "saelens", d_sae=16384)
    assert job.state == State.DONE, job.traceback
    text = "\n".join(line.text for line in job.lines.all())
    assert (
        row.d_sae == D_SAE and "the config says 9999, the tensors have 4096" in text and "the name says 16384" in text
    )


@pytest.mark.parametrize(
    "name, data, says",
    [
        ("sae_weights.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "does not begin like a safetensors"),
        ("sae_weights.safetensors", b"\x10\0\0\0\0\0\0\0not json at all!", "header that cannot be read"),
        ("sae_weights.safetensors", NEGATIVE, "a shape that no tensor has"),
        ("sae_weights.safetensors", b"\xff" * 8 + b"x", "does not begin like a safetensors"),
        ("params.npz", b"<html>not found</html>", "is not an npz"),
    ],
)  # fmt: skip
def test_what_is_no_sae_is_refused_by_name(hub: MiniHub, inspect: Any, name: str, data: bytes, says: str) -> None:
    hub.repos["models/lab/sae"] = {"cfg.json": b"{}", name: data}
    row, job = inspect("lab/sae", "", "saelens" if name != "params.npz" else "gemma_scope_1")
    assert job.state == State.FAILED and name in job.error and says in job.error, job.error
    assert row.read_at is None and row.d_sae is None


def test_hostile_files_are_refused() -> None:
    def reader(data: bytes) -> Any:
        return lambda start, end: data[start:end]

    objects = npz(a=np.array([{}], dtype=object))
    with pytest.raises(JobError, match="Python objects"):
        npz_shapes("x.npz", len(objects), reader(objects))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for number in range(300):
            archive.writestr(f"{number}.npy", b"")
    with pytest.raises(JobError, match="300 arrays"):
        npz_shapes("x.npz", len(file.getvalue()), reader(file.getvalue()))
    long = io.BytesIO()
    with zipfile.ZipFile(long, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", b"\x93NUMPY\x02\x00" + (2**27).to_bytes(4, "little") + b" " * 2**27)
    tracemalloc.start()
    with pytest.raises(JobError, match="is not an npz"):
        npz_shapes("x.npz", len(long.getvalue()), reader(long.getvalue()))
    assert tracemalloc.get_traced_memory()[1] < 2**25, "what a header claims to hold is not read"
    tracemalloc.stop()
    deep = b"[" * 100_000
    with pytest.raises(JobError, match="header that cannot be read"):
        safetensors_shapes("x.safetensors", 10**6, reader(len(deep).to_bytes(8, "little") + deep))


def test_a_config_whose_aliases_stand_for_more_than_memory_holds_is_refused() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 6)]
    data = "\n".join(lines).encode()
    with pytest.raises(JobError, match=r"cfg.yaml stands for more than 20,000 values"):
        look(Remote(), "cfg.yaml", len(data), lambda start, end: data[start:end])


def test_what_a_config_says_is_kept_as_the_database_can(hub: MiniHub, inspect: Any) -> None:
    config = b'{"model_name": "gpt2\\u0000", "note": "\\ud800"}'
    hub.repos["models/lab/sae"] = {"cfg.json": config, "sae_weights.safetensors": save(tensors())}
    row, job = inspect("lab/sae", "", "saelens")
    assert job.state == State.DONE, job.traceback
    assert row.model_name == "gpt2" and row.config["note"] == "?"


def test_widths_do_not_depend_on_which_way_a_matrix_lies() -> None:
    assert (
        widths({"W_enc": (4, 9), "b_enc": (9,)}) == (4, 9) == widths({"encoder.weight": (9, 4), "encoder.bias": (9,)})
    )
    assert widths({"W_enc_7": (9, 4), "b_enc_7": (9,)}) == (4, 9), "one layer of a cross-layer transcoder"
    assert widths({"W_dec": (9, 4), "b_dec": (4,)}) == (4, 9), "tied: there is no encoder"
    assert widths({"D": (9, 4), "b": (4,)}) == (4, 9) and widths({"W_enc": (4, 4), "b_enc": (4,)}) == (4, 4)
    assert widths({"W_enc": (4, 9)}) == (None, None), "nothing says which side is which"
    assert widths({}) == (None, None)


def test_architectures_show_in_the_tensors() -> None:
    def of(config: dict[str, Any], *names: str) -> str:
        return described(Remote(dict.fromkeys(names, (1,)), config))["architecture"]

    assert of({}, "b_mag", "r_mag") == "gated" and of({}, "threshold") == "jumprelu" and of({}) == ""
    assert (
        of({"type": "transcoder", "architecture": "jump_relu"}, "threshold", "affine_skip_connection")
        == "jumprelu_skip_transcoder"
    )
    assert of({"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 32}}) == "topk"


def test_what_is_here_is_left_as_it_is(hub: MiniHub, inspect: Any) -> None:
    from django.utils import timezone

    row, job = inspect("lab/sae", "", "saelens", d_sae=7, ready_at=timezone.now())
    assert job.state == State.DONE and row.d_sae == 7 and hub.asked == []


def test_no_such_repository_is_the_hubs_own_sentence(hub: MiniHub, inspect: Any) -> None:
    row, job = inspect("lab/nothing", "", "saelens")
    assert job.state == State.FAILED and "lab/nothing" in job.error and row.read_at is None
