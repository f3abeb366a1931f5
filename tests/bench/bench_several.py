"""One training run in 1 and in 2 CPU processes, end to end and step by step: rows a second, and the ratio.

python tests/bench/bench_several.py [--rows 200000]: TopK, 576 x 4,608, k 32, batches of 2,048. Both are started the same
way (torchrun), so that the ratio is that of the steps; on two cores expect little: a process already uses both.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from saes.numerics.sae import SAEConfig
from training.numerics.several import Several, Task
from training.numerics.shard_writer import ShardWriter
from training.numerics.train import StepReport, TrainConfig

D, D_SAE, K, BATCH, HOOK = 576, 4608, 32, 2048, "x"


def a_capture(folder: Path, contexts: int = 512, length: int = 128) -> None:
    """Random activations in the form of a capture."""
    facts = {
        "policy": {"context_length": length, "prepend_bos": False, "store_special": True},
        "dtype": "float32", "special_ids": [], "hook_points": [{"name": HOOK, "d": D}],
    }  # fmt: skip
    writer = ShardWriter(folder, facts, {HOOK: D}, "float32", 2**16)
    ids = np.zeros((contexts, length), dtype=np.int32)
    x = torch.randn(contexts * length, D) @ torch.randn(D, D) / D**0.5
    writer.add(ids, np.ones(ids.shape, dtype=bool), {HOOK: x}, np.arange(contexts), contexts)
    writer.finish(run_id="bench", created="", held_out_fraction=0.05, versions={})


def speed(capture: Path, processes: int, rows: int) -> float:
    """Rows a second of the second half of a run."""
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(n_tokens=rows, batch_size=BATCH, log_every=10, checkpoint_every=10**6)
        sae = SAEConfig("topk", D, D_SAE, k=K, hook_name=HOOK)
        task = Task(asdict(sae), asdict(config), str(capture), HOOK, f"{folder}/checkpoints")
        ranks = Several(task, processes, Path(folder) / "ranks")
        reports: list[StepReport] = []
        try:
            while ranks.running():
                time.sleep(0.2)
            reports = [word for word in ranks.said() if isinstance(word, StepReport)]
            ranks.check()
        finally:
            ranks.kill()
        half = reports[len(reports) // 2 :]
        return (half[-1].tokens - half[0].tokens) / (half[-1].seconds - half[0].seconds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=200_000)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        a_capture(Path(folder) / "capture")
        one, two = (speed(Path(folder) / "capture", n, asked.rows) for n in (1, 2))
    sys.stdout.write(f"1 process {one:,.0f} rows/s, 2 processes {two:,.0f} rows/s, ratio {two / one:.2f}\n")
