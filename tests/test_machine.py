"""What the machine says of itself: memory within a container's limit, GPUs by a program that answers as nvidia-smi does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from saehub.machine import GPU, Room, gpus, ram_room, standing


def test_room_is_what_the_container_may_use(tmp_path: Path) -> None:
    whole = ram_room(tmp_path)
    assert whole.total > whole.free > 0 and not whole.gpu
    (tmp_path / "memory.max").write_text("max\n")
    assert ram_room(tmp_path).total == whole.total
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    assert ram_room(tmp_path) == Room(1_000_000, 600_000)
    (tmp_path / "memory.stat").write_text("anon 150000\ninactive_file 250000\n")
    assert ram_room(tmp_path) == Room(1_000_000, 850_000), "files that were read can be let go"


@pytest.fixture
def nvidia(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program = tmp_path / "nvidia-smi"
    program.touch(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return program


def test_every_gpu_is_told(nvidia: Path) -> None:
    nvidia.write_text(
        "#!/bin/sh\n"
        'test "$1" = "--query-gpu=name,memory.total,memory.free,utilization.gpu" || exit 2\n'
        "echo 'NVIDIA A10, 24576, 20000, 37'\n"
        "echo 'Tesla T4, rev, a, 15360, 15000, [N/A]'\n"
    )
    assert gpus() == [
        GPU("NVIDIA A10", 24576 * 2**20, 20000 * 2**20, 0.37),
        GPU("Tesla T4, rev, a", 15360 * 2**20, 15000 * 2**20, None),
    ]


@pytest.mark.parametrize("says", ["echo 'No devices were found'; exit 6", "echo 'NVIDIA A10, lots, 1, 2'", "echo oops"])
def test_what_cannot_be_read_is_no_gpu(nvidia: Path, says: str) -> None:
    nvidia.write_text(f"#!/bin/sh\n{says}\n")
    assert gpus() == []


def test_the_machine_as_json(tmp_path: Path) -> None:
    found = json.loads(json.dumps(standing(tmp_path)))
    assert found["cores"] >= 1 and 0 <= found["cpu"] <= 1 and found["gpus"] == [vars(one) for one in gpus()]
    assert found["disk"]["total"] == shutil.disk_usage(tmp_path).total
    assert found["memory"]["total"] >= found["memory"]["free"] > 0
