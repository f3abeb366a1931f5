"""Encoding, and the top 20 texts of all features: ours against what others do, on the same rows in the same run.

    python tests/bench/bench_harvest.py CAPTURE_DIR SAE_DIR [--mi-crow FOLDER] [--rows 16384] [--rounds 3]

CAPTURE_DIR, SAE_DIR: a capture and a TopK SAE of its hook point, as the demo makes them. FOLDER holds the unpacked wheel of
mi-crow (`pip download --no-deps mi-crow`, unzipped): its own AutoencoderConcepts then keeps its heaps.

  dense encode       relu(x W_enc + b), torch.topk, scattered into a dense matrix: the steps of sae-lens' TopK encode
  dashboard pass     dense codes, then a running topk of 20 of every feature over all tokens, as sae-dashboard keeps them
  mi_crow            dense codes, given to update_top_texts_from_latents context by context

The contenders take turns, the best round of each counts; only the ratios mean something. Ours does more than the others: it
writes densities, histograms, intervals and top tokens of every feature too. The peak of resident memory is printed for
half of the rows and for all of them.
"""

import argparse
import resource
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from concepts.numerics.harvest import harvest
from concepts.numerics.sparse_encode import SparseEncoder
from saes.numerics.formats import load_sae
from training.numerics.shards import open_capture

TOP = 20


def dense(sae: Any, x: torch.Tensor) -> torch.Tensor:
    centred = sae.normalise(x) - sae.b_dec if sae.config.apply_b_dec_to_input else sae.normalise(x)
    values, columns = torch.relu(centred @ sae.W_enc + sae.b_enc).topk(sae.k, dim=-1)
    return torch.zeros(len(x), sae.config.d_sae).scatter_(1, columns, values)


def dashboard(sae: Any, parts: list[torch.Tensor]) -> None:
    best = torch.zeros(TOP, sae.config.d_sae)
    at = torch.zeros(TOP, sae.config.d_sae, dtype=torch.int64)
    first = 0
    for x in parts:
        codes = dense(sae, x)
        numbers = torch.arange(first, first + len(x))[:, None].expand_as(codes)
        best, chosen = torch.cat([best, codes]).topk(TOP, dim=0)
        at = torch.cat([at, numbers]).gather(0, chosen)
        first += len(x)


def mi_crow(folder: str, sae: Any, parts: list[torch.Tensor], length: int) -> Callable[[], None]:
    sys.path.insert(0, folder)
    from mi_crow.mechanistic.sae.concepts.autoencoder_concepts import AutoencoderConcepts

    def run() -> None:
        context = types.SimpleNamespace(
            n_latents=sae.config.d_sae, lm=None, text_tracking_k=TOP, text_tracking_negative=False, autoencoder=None,
            autoencoder_kwargs={}, device="cpu",
        )  # fmt: skip
        concepts = AutoencoderConcepts(context)
        concepts._text_tracking_k = TOP
        for n, x in enumerate(parts):
            whole = x[: len(x) // length * length]
            codes, count = dense(sae, whole), len(whole) // length
            texts = [f"context {n} {i}" for i in range(count)]
            concepts.update_top_texts_from_latents(codes, texts, (count, length, x.shape[1]))

    return run


def timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@torch.inference_mode()
def main(args: argparse.Namespace) -> None:
    capture, sae = open_capture(args.capture), load_sae(args.sae)
    hook = next(name for name in capture.hook_names if capture.d[name] == sae.config.d_in)
    parts: list[torch.Tensor] = []
    for x, _, _ in capture.rows(hook):
        parts.append(x)
        if sum(map(len, parts)) >= args.rows:
            break
    n = sum(map(len, parts))
    encode = SparseEncoder(sae)
    calls: dict[str, Callable[[], Any]] = {
        "encode, ours": lambda: [encode(x) for x in parts],
        "encode, dense": lambda: [dense(sae, x) for x in parts],
        "top 20, ours": lambda: harvest(sae, capture, hook, Path(place) / "view", limit=n),
        "top 20, dashboard pass": lambda: dashboard(sae, parts),
    }
    if args.mi_crow:
        calls["top 20, mi_crow"] = mi_crow(args.mi_crow, sae, parts, capture.context_length)
    with tempfile.TemporaryDirectory() as place:
        encode(parts[0])
        before = peak()
        harvest(sae, capture, hook, Path(place) / "view", limit=n // 2)
        half = peak()
        harvest(sae, capture, hook, Path(place) / "view", limit=n)
        print(f"{n:,} tokens, {sae.config.d_sae:,} features, k {sae.k}; harvest's peak over what was held before: "
              f"{half - before:.0f} MB for half of them, {peak() - before:.0f} MB for all")  # fmt: skip
        best = dict.fromkeys(calls, float("inf"))
        for _ in range(args.rounds):
            for name, call in calls.items():
                best[name] = min(best[name], timed(call))
    for name, seconds in best.items():
        ours = best["encode, ours" if name.startswith("encode") else "top 20, ours"]
        print(f"{name:26} {n / seconds:9,.0f} tokens/s   ours is {seconds / ours:6.2f} x")
    print(f"rows encoded a second time: {encode.unsure / (n * args.rounds + len(parts[0])):.2%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("capture")
    parser.add_argument("sae")
    parser.add_argument("--mi-crow")
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=3)
    main(parser.parse_args())
