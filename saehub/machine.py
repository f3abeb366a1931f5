"""How this machine stands: processors, memory within its container's limit, disk, GPUs as nvidia-smi tells them.

Imports neither Django nor torch: the form of a run, the workers and the pages ask the same functions.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

CGROUP = Path("/sys/fs/cgroup")
MB = 2**20
ASKED = "name,memory.total,memory.free,utilization.gpu"


@dataclass(frozen=True)
class Room:
    """Bytes of memory: all that may be used, and those that are free now."""

    total: int
    free: int
    gpu: bool = False


@dataclass(frozen=True)
class GPU:
    """A GPU. `busy` is the share of the last moment in which it computed; None where the driver does not say."""

    name: str
    total: int
    free: int
    busy: float | None


def ram_room(cgroup: Path = CGROUP) -> Room:
    """Of this machine, within what its container may use."""
    memory = psutil.virtual_memory()
    limit, used = _number(cgroup / "memory.max"), _number(cgroup / "memory.current")
    if limit is None or limit >= memory.total:
        return Room(memory.total, memory.available)
    return Room(limit, max(min(memory.available, limit - (used or 0) + _cached(cgroup)), 0))


def gpus() -> list[GPU]:
    """Of this machine; none where there is no nvidia-smi, or it fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    call = [program, f"--query-gpu={ASKED}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(call, capture_output=True, text=True, timeout=5, check=True).stdout
        return [_gpu(line) for line in said.splitlines() if line.strip()]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


def _gpu(line: str) -> GPU:
    name, total, free, busy = (word.strip() for word in line.rsplit(",", 3))
    return GPU(name, int(total) * MB, int(free) * MB, int(busy) / 100 if busy.isdecimal() else None)


def standing(folder: Path) -> dict[str, Any]:
    """The machine as JSON. `cpu`: share of all processors since this process last asked; the first answer is 0.

    folder: of whose disk the room is told.
    """
    memory, disk = ram_room(), shutil.disk_usage(folder)
    return {
        "cores": psutil.cpu_count() or 1,
        "cpu": psutil.cpu_percent() / 100,
        "memory": {"total": memory.total, "free": memory.free},
        "disk": {"total": disk.total, "free": disk.free},
        "gpus": [{"name": one.name, "total": one.total, "free": one.free, "busy": one.busy} for one in gpus()],
    }


def _cached(cgroup: Path) -> int:
    """Bytes of files that were read and can be let go: they count as used (memory.stat, inactive_file)."""
    try:
        lines = (cgroup / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # "max": no limit
        return None
