"""A worker killed with `kill -9` in the middle of a download: another one goes on from the bytes that are here."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from saehub.jobs.models import Job, State
from saes.models import SAE
from saes.numerics.formats import load_sae
from tests.conftest import manage, process_named, wait_for
from tests.mini_hub import COMMIT, MiniHub

pytestmark = [pytest.mark.usefixtures("committed"), pytest.mark.timeout(900)]
GOLDEN = Path(__file__).parent.parent / "golden" / "saelens_standard" / "cfg.json"
REPO, D_IN, D_SAE = "lab/large", 256, 4096
SLOW, QUICK = 500_000, 50_000_000  # bytes a second of a file of 8 MB: until its worker is dead, and then


def weights() -> bytes:
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_enc": (D_SAE,), "b_dec": (D_IN,)}
    return save({name: torch.randn(*shape, generator=generator) * 0.1 for name, shape in shapes.items()})


def config() -> bytes:
    import json

    return json.dumps(json.loads(GOLDEN.read_text()) | {"d_in": D_IN, "d_sae": D_SAE}).encode()


@pytest.fixture
def served(hub: MiniHub, tmp_path: Path, monkeypatch: Any) -> MiniHub:
    """A slow Hub that the workers, which are processes of their own, are told of by their environment."""
    hub.repos[f"models/{REPO}"] = {"sae/cfg.json": config(), "sae/sae_weights.safetensors": weights()}
    hub.fault("/lfs/", "rate", SLOW, times=None)
    for name, value in {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"}.items():
        monkeypatch.setenv(name, value)
    return hub


def test_a_download_survives_the_death_of_its_worker(served: MiniHub, tmp_path: Path) -> None:
    data = served.repos[f"models/{REPO}"]["sae/sae_weights.safetensors"]
    sha256 = hashlib.sha256(data).hexdigest()
    blobs = tmp_path / "hub" / "models--lab--large" / "blobs"
    part = blobs / f"{sha256}.incomplete"
    row = SAE.objects.create(name="sae", source="hub", repo_id=REPO, repo_path="sae")
    with manage("work", "io"):
        job = row.start(None)
        wait_for(lambda: part.exists() and part.stat().st_size > 1_000_000, 300, "a megabyte")
        child, worker = process_named(f"job {job.pk}"), process_named(f"for job {job.pk}")
        child.kill()
        worker.kill()
        child.wait(60)
        served.faults[0].value = QUICK
        kept = part.stat().st_size
        assert 1_000_000 < kept < len(data)
        wait_for(lambda: Job.objects.get(pk=job.pk).state in (State.DONE, State.FAILED), 300, "the download")
    job.refresh_from_db()
    row.refresh_from_db()
    assert job.state == State.DONE, job.traceback
    assert job.attempt == 2 and row.ready and row.revision == COMMIT
    ranges = [asked.range for asked in served.requests if asked.path.startswith("/lfs/")]
    assert ranges == ["", f"bytes={kept}-"], "no byte was fetched twice"
    assert (blobs / sha256).read_bytes() == data and not part.exists()
    assert job.done == job.total
    assert load_sae(row.files).config.d_sae == D_SAE
    assert SAE.objects.count() == 1
