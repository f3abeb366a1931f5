"""Loading an SAE of 65,536 x 2,304 and encoding a first batch, against a bare safetensors memory map (as SAELens loads).

    .venv/bin/python tests/bench/bench_load.py [--d-sae 65536] [--d-in 2304] [--rows 16 128] [--rounds 5]

Each measurement is a fresh process that imports everything first. "cold" drops the file from the page cache before
(posix_fadvise, which needs no rights); "warm" reads it once before. The peer maps the file with safetensors and does the
same matmul. `checked` is how the registry loads files whose weights it saw to be finite when it took them in; without it
every weight is read once more, the first time that these files are loaded ("never seen") and not after ("seen before").
Ratios to the peer's fp32 in the same round, median over the rounds.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from saes.numerics.formats import load_sae, save_sae
from saes.numerics.sae import SAEConfig
from saes.numerics.standard import StandardSAE

WAYS = {  # name: (storage, what loads it)
    "peer fp32": ("float32", "peer"),
    "ours fp32, checked": ("float32", "checked"),
    "ours fp32, never seen": ("float32", "all"),
    "ours fp32, seen before": ("float32", "seen"),
    "ours bf16 stored, fp32 asked": ("bfloat16", "checked"),
    "ours bf16 as stored": ("bfloat16", "stored"),
    "peer bf16": ("bfloat16", "peer"),
}


def main() -> None:
    options = parsed()
    if options.once:
        print(json.dumps(measured(options.once, Path(options.folder), options.rows[0])))
        return
    with tempfile.TemporaryDirectory(dir=options.folder or None) as folder:
        for storage in ("float32", "bfloat16"):
            make(Path(folder) / storage, options.d_in, options.d_sae, getattr(torch, storage))
        os.environ["XDG_CACHE_HOME"] = str(Path(folder) / "cache")
        for rows in options.rows:
            for cache in ("warm", "cold"):
                report(cache, Path(folder), rows, options.rounds)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--d-in", type=int, default=2304)
    parser.add_argument("--d-sae", type=int, default=65536)
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default="")
    parser.add_argument("--once", default="")
    return parser.parse_args()


@torch.no_grad()
def make(folder: Path, d_in: int, d_sae: int, dtype: torch.dtype) -> None:
    sae = StandardSAE(SAEConfig("standard", d_in, d_sae), dtype=dtype)
    for parameter in sae.parameters():
        parameter.normal_()
    save_sae(sae, folder)


def report(cache: str, folder: Path, rows: int, n: int) -> None:
    rounds = [{way: run(way, cache, folder, rows) for way in WAYS} for _ in range(n)]
    print(f"{cache} cache, {rows} rows, {n} rounds")
    for way in WAYS:
        total = statistics.median(one[way]["seconds"] for one in rounds)
        ratio = statistics.median(one[way]["seconds"] / one["peer fp32"]["seconds"] for one in rounds)
        print(f"  {way:30} {total:7.3f} s   {ratio:5.2f} x peer fp32")


def run(way: str, cache: str, folder: Path, rows: int) -> dict[str, float]:
    place = folder / WAYS[way][0]
    refill(place / "sae_weights.safetensors", cache)
    if WAYS[way][1] == "all":
        shutil.rmtree(folder / "cache", ignore_errors=True)
    command = [sys.executable, __file__, "--once", WAYS[way][1], "--folder", str(place), "--rows", str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def refill(path: Path, cache: str) -> None:
    """Bring a file into the page cache, or out of it."""
    with path.open("rb") as file:
        if cache == "cold":
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            while file.read(1 << 24):
                pass


@torch.no_grad()
def measured(how: str, folder: Path, rows: int) -> dict[str, float]:
    """Seconds from the path to the codes of a first batch."""
    d_in = json.loads((folder / "cfg.json").read_text())["d_in"]
    x = torch.randn(rows, d_in)
    torch.randn(rows, d_in) @ torch.randn(d_in, 64)  # threads and libraries are up
    start = time.perf_counter()
    if how == "peer":
        with safe_open(folder / "sae_weights.safetensors", framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        x = x.to(weights["W_enc"].dtype)
        ((x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]).relu()
    else:
        load_sae(folder, dtype=None if how == "stored" else torch.float32, checked=how not in ("all", "seen")).encode(x)
    return {"seconds": time.perf_counter() - start}


if __name__ == "__main__":
    main()
