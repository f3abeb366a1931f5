"""How much memory a run will take, and how much the machine has: said before it is queued. Without torch.

Counted is what a run holds at its fullest, while a checkpoint is written. On a CPU the factors are those of measured runs
(docs/benchmarks.md): TopK, BatchTopK, ReLU, JumpReLU and gated SAEs of 1,152 to 18,432 features, batches of 512 to 8,192.
Those of a GPU follow from the tensors of the step; they have not been measured.
"""

from __future__ import annotations

from importlib.metadata import version

from saehub.machine import Room, gpus, ram_room

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


def gpu_room() -> Room | None:
    """Of the first GPU; None where there is none, or torch was built without."""
    found = [] if "+cpu" in version("torch") else gpus()
    return Room(found[0].total, found[0].free, gpu=True) if found else None
