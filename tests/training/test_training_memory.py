"""The memory a run is said to take before it is queued, held against what one takes, and against what there is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from django.urls import reverse

from saehub.machine import GPU, Room
from tests.training.rows import HOOK, a_capture
from training import memory
from training.memory import run_memory
from training.run_form import RunForm

ROOT = Path(__file__).parents[2]
MEASURE = """
import json, sys, tempfile, threading, time
import torch
from saes.numerics.architectures import build_sae
from saes.numerics.sae import SAEConfig
from training.numerics.compiling import load_kernels
from training.numerics.train import TrainConfig, train

def held():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

architecture, d_sae, batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(2)
config = TrainConfig(steps=4, batch_size=batch, checkpoint_every=2)
sae = build_sae(SAEConfig(architecture=architecture, d_in=256, d_sae=64, **({"k": 16} if "topk" in architecture else {})), seed=0)
load_kernels(sae, config, lambda: None)
train(sae, (torch.randn(64, 256) for _ in range(4)), TrainConfig(steps=4, batch_size=64))  # threads and libraries are there
before, most, on = held(), [0], [True]

def watch():
    while on[0]:
        most[0] = max(most[0], held())
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
sae = build_sae(SAEConfig(architecture=architecture, d_in=256, d_sae=d_sae, **({"k": 16} if "topk" in architecture else {})), seed=0)
with tempfile.TemporaryDirectory() as folder:
    train(sae, (torch.randn(batch, 256) for _ in range(4)), config, checkpoint_dir=folder)
on[0] = False
thread.join()
print(json.dumps(most[0] - before))
"""


@pytest.mark.parametrize("architecture, d_sae, batch", [("topk", 32_768, 1024), ("batchtopk", 16_384, 2048)])
def test_the_estimate_is_near_what_a_run_takes(tmp_path: Path, architecture: str, d_sae: int, batch: int) -> None:
    script = tmp_path / "measure.py"
    script.write_text(MEASURE)
    call = [sys.executable, str(script), architecture, str(d_sae), str(batch)]
    done = subprocess.run(
        call, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    taken, said = json.loads(done.stdout), run_memory(architecture, 256, 256, d_sae, batch)
    assert 0.6 < said / taken < 1.7, (said, taken)


def test_the_gpu_counts_where_torch_could_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "gpus", lambda: [GPU("A10", 24_000, 20_000, 0.5), GPU("A10", 24_000, 1_000, 0.9)])
    monkeypatch.setattr(memory, "version", lambda name: "2.13.0+cpu")
    assert memory.gpu_room() is None
    monkeypatch.setattr(memory, "version", lambda name: "2.13.0")
    assert memory.gpu_room() == Room(24_000, 20_000, gpu=True)
    monkeypatch.setattr(memory, "gpus", list)
    assert memory.gpu_room() is None


@pytest.mark.django_db
def test_the_form_says_what_a_run_takes_and_when_it_does_not_fit(
    client_of: Any, user_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = a_capture()
    query = {"source": f"{capture.pk}:{HOOK}", "architecture": "topk", "k": 4, "n_tokens": 4000, "d_sae": 64}

    def estimate(**more: Any) -> tuple[Any, str]:
        url = reverse("training:run_create")
        page = client_of("researcher").get(url, query | more, headers={"HX-Request": "true"})
        return RunForm(query | more, user=user_of("researcher")).estimate(), page.content.decode()

    def has(total: float, free: float) -> None:
        monkeypatch.setattr("training.run_form.room", lambda: Room(int(total), int(free)))

    has(8e9, 6e9)
    small, html = estimate()
    assert "memory at its fullest" in html and "too-large" not in html and "crowded" not in html
    larger, _ = estimate(d_sae=262_144, k=4)
    several, _ = estimate(d_sae=262_144, k="2, 4")
    assert small.memory < larger.memory and small.shared == larger.shared == memory.PROCESS
    assert several.memory == 2 * larger.memory - memory.PROCESS, "the process is there once"
    has(larger.memory + 1, larger.memory - 1)
    assert "More memory than is free now" in estimate(d_sae=262_144)[1]
    has(larger.memory - 1, larger.memory - 2)
    html = estimate(d_sae=262_144)[1]
    assert "This will not fit: it takes about" in html and "fewer runs" not in html
    assert "or fewer runs side by side" in estimate(d_sae=262_144, k="2, 4")[1]
