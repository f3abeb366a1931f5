"""Encoding, and the top 20 texts of all features: ours against what others do, on the same rows in the same run.

    python tests/bench/bench_harvest.py [CAPTURE_DIR SAE_DIR] [--mi-crow FOLDER] [--rows 16384] [--rounds 3] [--kinds topk]

CAPTURE_DIR, SAE_DIR: a capture and a TopK SAE of its hook point, as the demo makes them; else inputs.py makes them. mi_crow, whose
own AutoencoderConcepts keeps its heaps, is imported from FOLDER, else from where `make peers` put it.

  dense encode       relu(x W_enc + b), torch.topk, scattered into a dense matrix: the steps of sae-lens' TopK encode
  dashboard pass     dense codes, then a running topk of 20 of every feature over all tokens, as sae-dashboard keeps them
  mi_crow            dense codes, given to update_top_texts_from_latents context by context

The contenders take turns, the best round of each counts; only the ratios mean something. Ours does more than the others: it
writes densities, histograms, intervals and top tokens of every feature too. The same SAE is measured as JumpReLU as well, with
the thresholds that leave it as many codes; its dense encode is relu(z) (z > threshold).

    python tests/bench/bench_harvest.py --memory 100000 200000 400000

harvests the capture, repeated as often as needed, over that many tokens, each in a process of its own, and prints the largest
amount of memory that the process holds itself at any time (RssAnon; pages of the mapped capture can be taken back).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from concepts.numerics.harvest import harvest
from concepts.numerics.sparse_encode import SparseEncoder
from saes.numerics.architectures import build_sae
from saes.numerics.formats import load_sae
from saes.numerics.sae import SAE
from tests.bench import inputs
from training.numerics.shards import Capture, open_capture

TOP = 20
KINDS = ("topk", "jumprelu")


def dense(sae: Any, x: torch.Tensor) -> torch.Tensor:
    if sae.config.architecture == "jumprelu":
        codes: torch.Tensor = sae.encode(x)
        return codes
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
    sys.path.append(folder)  # last: its environment holds other packages too
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


def timed(call: Callable[[], Any], clock: Callable[[], float]) -> float:
    began = clock()
    call()
    return clock() - began


def as_jumprelu(sae: Any, x: torch.Tensor) -> SAE:
    """The same encoder with one threshold that leaves k codes a row of x."""
    z = sae.pre_activations(x)
    config = sae.config.with_(architecture="jumprelu", k=None)
    other = build_sae(config).requires_grad_(False)
    tensors = sae.state_dict() | {
        "threshold": torch.full((config.d_sae,), float(z.flatten().topk(sae.k * len(x)).values[-1]))
    }
    other.load_state_dict(tensors)
    return other


@torch.inference_mode()
def main(args: argparse.Namespace) -> None:
    clock = time.process_time if args.busy else time.perf_counter
    if args.busy:
        torch.set_num_threads(1)
    capture, topk = open_capture(args.capture), load_sae(args.sae)
    hook = next(name for name in capture.hook_names if capture.d[name] == topk.config.d_in)
    parts: list[torch.Tensor] = []
    for x, _, _ in capture.rows(hook):
        parts.append(x)
        if sum(map(len, parts)) >= args.rows:
            break
    n = sum(map(len, parts))
    print(f"{n:,} tokens, {topk.config.d_sae:,} features, k {topk.k}")
    calls: dict[str, Callable[[], Any]] = {}
    with tempfile.TemporaryDirectory() as place:
        for kind in args.kinds:
            sae = topk if kind == "topk" else as_jumprelu(topk, parts[0])
            calls |= calls_of(kind, sae, capture, hook, parts, Path(place) / kind)
        if args.mi_crow and "topk" in args.kinds:
            calls["topk top 20, mi_crow"] = mi_crow(args.mi_crow, topk, parts, capture.context_length)
        best = dict.fromkeys(calls, float("inf"))
        for _ in range(args.rounds):
            for name, call in calls.items():
                best[name] = min(best[name], timed(call, clock))
    for name, seconds in best.items():
        ours = best[name.split(",")[0] + ", ours"]
        print(f"{name:32} {n / seconds:9,.0f} tokens/s   ours is {seconds / ours:6.2f} x")


def calls_of(
    kind: str, sae: Any, capture: Any, hook: str, parts: list[torch.Tensor], place: Path
) -> dict[str, Callable[[], Any]]:
    encode, n = SparseEncoder(sae), sum(map(len, parts))
    encode(parts[0])
    return {
        f"{kind} encode, ours": lambda: [encode(x) for x in parts],
        f"{kind} encode, dense": lambda: [dense(sae, x) for x in parts],
        f"{kind} top 20, ours": lambda: harvest(sae, capture, hook, place, limit=n),
        f"{kind} top 20, dashboard pass": lambda: dashboard(sae, parts),
    }


def memory(args: argparse.Namespace) -> None:
    for n in args.memory:
        call = [sys.executable, __file__, args.capture, args.sae, "--held", str(n)]
        print(subprocess.run(call, check=True, capture_output=True, text=True).stdout, end="")


@torch.inference_mode()
def held(args: argparse.Namespace) -> None:
    """Print what one harvest of that many tokens holds more than the process did before it."""
    sae = load_sae(args.sae)
    with tempfile.TemporaryDirectory() as place:
        capture = repeated(Path(args.capture).resolve(), Path(place) / "capture", args.held)
        hook = next(name for name in capture.hook_names if capture.d[name] == sae.config.d_in)
        SparseEncoder(sae)(next(iter(capture.rows(hook)))[0])
        before, most, done = own_memory(), [0.0], threading.Event()

        def watch() -> None:
            while not done.wait(0.005):
                most[0] = max(most[0], own_memory())

        watcher = threading.Thread(target=watch)
        watcher.start()
        found = harvest(sae, capture, hook, Path(place) / "view", limit=args.held)
        done.set()
        watcher.join()
    print(f"{found['n_tokens']:9,} tokens: {most[0] - before:5.0f} MB more than before, "
          f"{found['tokens_per_second']:7,.0f} tokens/s")  # fmt: skip


def repeated(source: Path, folder: Path, n: int) -> Capture:
    """A capture of at least n tokens: the shards of another, again and again."""
    folder.mkdir()
    manifest = json.loads((source / "manifest.json").read_text())
    for shard in manifest["shards"]:
        (folder / shard["file"]).symlink_to(source / shard["file"])
    times = -(-n // manifest["n_tokens"])
    manifest["shards"] = [
        shard | {"first_context": shard["first_context"] + i * manifest["n_contexts"]}
        for i in range(times)
        for shard in manifest["shards"]
    ]
    manifest |= {name: times * manifest[name] for name in ("n_contexts", "n_tokens")}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return open_capture(folder)


def own_memory() -> float:
    """MB of memory of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("capture", nargs="?")
    parser.add_argument("sae", nargs="?")
    parser.add_argument("--mi-crow", default=inputs.mi_crow())
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--busy", action="store_true", help="processor time of one thread: for a machine that is not free"
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--memory", type=int, nargs="+", default=[])
    parser.add_argument("--held", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if bool(given.capture) != bool(given.sae):
        parser.error("Name a capture and an SAE of it, or neither.")
    given.capture, given.sae = given.capture or str(inputs.capture()), given.sae or str(inputs.sae())
    (held if given.held else memory if given.memory else main)(given)
