"""Capture and shards.

    python tests/bench/bench_capture.py [MODEL_DIR] [--mi-crow DIR] [--rounds 5] [--capture-only | --shards-only]

MODEL_DIR: a transformers folder such as the demo makes of SmolLM2-135M; else inputs.py makes it. Everything is measured in
turns in one run; a ratio is the median of the turns' own. Real tokens per second throughout. A capture's rate is that
of the contexts beyond the first 64: what it does once (in bfloat16 it runs 32 contexts in both precisions, to measure the
difference) is a matter of seconds, whatever its size. What is computed in bfloat16 is stored in bfloat16.
--mi-crow: the folder to import mi_crow from, else where `make peers` put it; its save_activations then reads the same texts,
padded, as it does by default: cut to 500 characters, so that hardly anything is padded, and as paragraphs of any length,
which is what texts are.
"""

import argparse
import importlib
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from saes.numerics.architectures import build_sae
from saes.numerics.lm import LM, load_lm
from saes.numerics.sae import SAEConfig
from tests.bench import inputs
from training.numerics.capture import capture
from training.numerics.shard_writer import ShardWriter
from training.numerics.shards import open_capture
from training.numerics.tokens import TokenPolicy, iter_contexts
from training.numerics.train import TrainConfig, train

HOOK, LENGTH, CONTEXTS = "blocks.9.hook_resid_post", 128, 16
FEW, MANY = 4 * CONTEXTS, 20 * CONTEXTS  # shards are of FEW contexts: one, and five
D, D_SAE, BATCH = 576, 4608, 2048


def timed(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Seconds of each call, one after another."""
    seconds = {}
    for name, call in calls.items():
        began = time.perf_counter()
        call()
        seconds[name] = time.perf_counter() - began
    return seconds


def captures(lm: LM, peers: str | None, rounds: int) -> None:
    texts = [text for text in topics.values() if len(text) > 400]
    policy = TokenPolicy(LENGTH)
    contexts = [context.ids for context in iter_contexts(texts, lm.tokenizer, policy)][: MANY - FEW]
    ids = torch.from_numpy(np.stack(contexts)).long()
    n = ids.numel()
    keep, layers = lm.model.model.layers, lm.model.model.layers[:10]

    @torch.inference_mode()
    def truncated(dtype: torch.dtype | None) -> None:
        """The first ten layers alone, without hooks or storing."""
        lm.model.model.layers = layers
        try:
            with torch.autocast("cpu", enabled=dtype is not None, dtype=torch.bfloat16):
                for start in range(0, len(ids), CONTEXTS):
                    lm.model.model(input_ids=ids[start : start + CONTEXTS], use_cache=False)
        finally:
            lm.model.model.layers = keep

    def stored(autocast: bool, contexts: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            limit: dict[str, Any] = {
                "max_tokens": contexts * (LENGTH - 1),
                "batch_contexts": CONTEXTS,
                "shard_tokens": FEW * LENGTH,
            }
            dtype = "bfloat16" if autocast else "float32"
            capture(lm, texts, [HOOK], f"{folder}/c", policy=policy, autocast=autocast, dtype=dtype, **limit)

    calls: dict[str, Callable[[], Any]] = {
        "truncated forward, float32": lambda: truncated(None),
        "few, float32": lambda: stored(False, FEW),
        "many, float32": lambda: stored(False, MANY),
        "truncated forward, bfloat16": lambda: truncated(torch.bfloat16),
        "few, bfloat16": lambda: stored(True, FEW),
        "many, bfloat16": lambda: stored(True, MANY),
    }
    real = {"truncated forward, float32": n, "truncated forward, bfloat16": n}
    for name, given in {"500 characters": [text[:500] for text in texts[:40]], "paragraphs": paragraphs(texts)}.items():
        if peers:
            calls[f"mi_crow, {name}"], real[f"mi_crow, {name}"] = mi_crow(lm, given, peers)
    turns = [rates(timed(calls), real) for _ in range(rounds)]
    for name in turns[0]:
        print(f"{name:32} {statistics.median(turn[name] for turn in turns):9,.0f} tokens/s")
    ways = ("float32", "bfloat16")
    wanted = [(f"capture, {way}", f"truncated forward, {way}") for way in ways]
    wanted += [("capture, bfloat16", "capture, float32")]
    wanted += [(f"capture, {way}", name) for name in real if name.startswith("mi_crow") for way in ways]
    for over, under in wanted:
        print(f"{f'{over} / {under}':52} {statistics.median(turn[over] / turn[under] for turn in turns):5.2f}")


def rates(seconds: dict[str, float], real: dict[str, int]) -> dict[str, float]:
    """Tokens a second of one turn."""
    found = {name: tokens / seconds[name] for name, tokens in real.items()}
    more = LENGTH * (MANY - FEW)
    return found | {
        f"capture, {way}": more / (seconds[f"many, {way}"] - seconds[f"few, {way}"]) for way in ("float32", "bfloat16")
    }


def paragraphs(texts: list[str]) -> list[str]:
    """The first 96 paragraphs of more than a line, as long as they are."""
    return [part for text in texts for part in text.split("\n\n") if len(part) > 80][:96]


def mi_crow(lm: LM, texts: list[str], path: str) -> tuple[Callable[[], Any], int]:
    """mi_crow's own way over these texts in float32, batches of 32 padded texts; and the real tokens of them."""
    sys.path.append(path)  # last: its environment holds other packages too
    language_model = importlib.import_module("mi_crow.language_model.language_model").LanguageModel
    store = importlib.import_module("mi_crow.store").LocalStore
    tokens = sum(min(len(ids), LENGTH) for ids in lm.tokenizer(texts)["input_ids"])

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            theirs = language_model(lm.model, lm.tokenizer, store(folder))
            layer = f"{type(lm.model).__name__.lower()}_model_layers_9"
            theirs.activations.save_activations(texts, layer, batch_size=32, max_length=LENGTH, autocast=False)

    return run, tokens


def shards() -> None:
    """Reading shuffled shards against the step that consumes them, and memory from 1 to 10 million tokens read."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c"
        synthetic(path, 8 * 65_536)
        made = open_capture(path)
        sae = build_sae(SAEConfig("topk", D, D_SAE, k=32), seed=0)
        x = next(made.batches("h", BATCH))
        config = TrainConfig(steps=20, batch_size=BATCH, log_every=20)

        def read() -> None:
            for _ in made.batches("h", BATCH, n_rows=20 * BATCH, seed=1):
                pass

        turns = [timed({"read": read, "step": lambda: train(sae, iter([x] * 20), config)}) for _ in range(3)]
        seconds = {name: min(turn[name] for turn in turns) for name in turns[0]}
        for name, one in seconds.items():
            print(f"{name:6} {20 * BATCH / one:12,.0f} tokens/s")
        print(f"reading shuffled shards / the step     {seconds['step'] / seconds['read']:.2f}")
        print("private memory, MB, after so many tokens read:", end="")
        for row, _ in enumerate(made.batches("h", BATCH, n_rows=10_000_000, seed=2)):
            if row * BATCH // 1_000_000 != (row + 1) * BATCH // 1_000_000:
                print(f"  {round((row + 1) * BATCH / 1e6)}M: {private():.0f}", end="", flush=True)
        print()


def private() -> float:
    """Megabytes of this process that are its own: mapped shards belong to the page cache."""
    status = Path("/proc/self/status").read_text() if Path("/proc/self/status").exists() else ""
    lines = [line for line in status.splitlines() if line.startswith("RssAnon")]
    return int(lines[0].split()[1]) / 1024 if lines else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def synthetic(path: Path, n: int) -> None:
    facts = {"policy": {"context_length": LENGTH}, "hook_points": [{"name": "h", "d": D}], "dtype": "float32"}
    writer = ShardWriter(path, facts, {"h": D}, "float32", 65_536)
    generator = torch.Generator().manual_seed(0)
    for start in pieces(n, 64 * LENGTH):
        contexts = np.zeros((64, LENGTH), dtype=np.int32)
        x = {"h": torch.randn(64 * LENGTH, D, generator=generator)}
        writer.add(contexts, np.ones(contexts.shape, bool), x, np.full(64, start), start)
    writer.finish(run_id="bench", held_out_fraction=0.05)


def pieces(n: int, size: int) -> Iterator[int]:
    return iter(range(0, n, size))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?")
    parser.add_argument("--mi-crow", default=inputs.mi_crow())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--capture-only", action="store_true")
    parser.add_argument("--shards-only", action="store_true")
    given = parser.parse_args()
    if not given.shards_only:
        captures(load_lm(given.model or inputs.model(), device="cpu"), given.mi_crow, given.rounds)
    if not given.capture_only:
        shards()
