"""How much memory a run will take, and how much the machine has: said before it is queued. Without torch.

Counted is what a run holds at its fullest, while a checkpoint is written. On a CPU the factors are those of measured runs
(docs/benchmarks.md): TopK, BatchTopK, ReLU, JumpReLU and gated SAEs of 1,152 to 18,432 features, batches of 512 to 8,192.
Those of a GPU follow from the tensors of the step; they have not been measured.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil

FLOAT = 4
PROCESS = 330_000_000  # Python with Django, torch and transformers, and the order of a window of rows
WEIGHTS = 6.6  # times the weights: themselves, Adam's two moments, rounded copies, and a checkpoint that is written
ROWS = 5.5  # times the batch: as it is read, centred, residual, rounded copies
CODES = {
    "batchtopk": 1.8,
    "jumprelu": 1.8,
    "standard": 1.2,
    "gated": 3.1,
    "jumprelu_transcoder": 1.8,
}  # times (n, d_sae)
GPU_PROCESS, GPU_WEIGHTS, GPU_CODES = 600_000_000, 4.5, 6.0  # gradients are whole there, and so are the codes
STREAMED_ROWS = 16 * 8192  # that a streamed capture keeps, see numerics/stream.py
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Room:
    """Bytes that a run may use where it will run: all of them, and those that are free now."""

    total: int
    free: int
    gpu: bool = False


def run_memory(architecture: str, d_in: int, d_out: int, d_sae: int, batch_size: int, *, gpu: bool = False) -> int:
    """Bytes of a run beside PROCESS, or on its GPU beside GPU_PROCESS."""
    weights = FLOAT * ((d_in + d_out + 1) * d_sae + d_out)
    rows = FLOAT * batch_size * (d_in if d_in == d_out and "transcoder" not in architecture else d_in + d_out)
    codes = FLOAT * batch_size * d_sae
    if gpu:
        return round(GPU_WEIGHTS * weights + ROWS * rows + GPU_CODES * codes)
    return round(WEIGHTS * weights + ROWS * rows + CODES.get(architecture, 0.0) * codes)


def streamed_memory(model_bytes: int, width: int) -> int:
    """Bytes of a capture that is computed again while a run goes on: the model, and the rows of a window."""
    return model_bytes + FLOAT * STREAMED_ROWS * width


def room() -> Room:
    """Of the GPU that runs here would use, else of this machine."""
    return gpu_room() or ram_room()


def ram_room(cgroup: Path = CGROUP) -> Room:
    """Of this machine, within what its container may use."""
    memory = psutil.virtual_memory()
    limit, used = _number(cgroup / "memory.max"), _number(cgroup / "memory.current")
    if limit is None or limit >= memory.total:
        return Room(memory.total, memory.available)
    return Room(limit, max(min(memory.available, limit - (used or 0) + _cached(cgroup)), 0))


def _cached(cgroup: Path) -> int:
    """Bytes of files that were read and can be let go: they count as used (memory.stat, inactive_file)."""
    try:
        lines = (cgroup / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))


def gpu_room() -> Room | None:
    """Of the first GPU as nvidia-smi tells it; None where there is none, or torch was built without."""
    program = shutil.which("nvidia-smi")
    if program is None or "+cpu" in version("torch"):
        return None
    call = [program, "--query-gpu=memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(call, capture_output=True, text=True, timeout=5, check=True).stdout
        total, free = (int(word) * 2**20 for word in said.splitlines()[0].split(","))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
    return Room(total, free, gpu=True)


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # "max": no limit
        return None
