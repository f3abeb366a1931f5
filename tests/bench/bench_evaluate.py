"""Evaluating an SAE: what it does to the model's predictions, and how well it reconstructs, beside sae-lens' own evaluation.

    .venv/bin/python tests/bench/bench_evaluate.py [MODEL_DIR CAPTURE_DIR SAE_DIR] [--contexts 12] [--rounds 3]

A model, a capture of it and an SAE of its hook point, as the demo makes them; else inputs.py makes them. Both sides run the same
transformers model in float32 over the same contexts, in the same batches, with the tokens at hand, and take turns; what they
say is compared. sae-lens makes three passes for its predictions (plain, spliced, zeros) and ours four (the mean too), of which
only the first computes the blocks below the hook point.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from saes.numerics.formats import load_sae
from saes.numerics.lm import LM, load_lm
from saes.numerics.sae import SAE
from tests.bench import inputs
from training.numerics.evaluate import evaluate
from training.numerics.shards import open_capture

BATCH = 4
SAME = {"ce_loss_without_sae": "ce_original", "ce_loss_with_sae": "ce_with_sae", "kl_div_with_sae": "kl", "l0": "l0"}
SAME |= {"ce_loss_with_ablation": "ce_zero_ablated", "explained_variance": "explained_variance", "mse": "mse"}


def ours(sae: SAE, lm: LM, ids: np.ndarray) -> dict[str, Any]:
    """Seconds of each part, and every value."""

    def rows() -> Iterator[torch.Tensor]:
        for start in range(0, len(ids), BATCH):
            part = torch.from_numpy(ids[start : start + BATCH].astype(np.int64))
            yield lm.activations(part, [sae.config.hook_name])[sae.config.hook_name].flatten(0, 1)

    turned: list[float] = []

    def note(_done: int, _total: int | None, step: str) -> None:
        if step == "reconstructing":
            turned.append(time.perf_counter())

    began = time.perf_counter()
    found = evaluate(sae, rows(), lm=lm, contexts=ids, batch_contexts=BATCH, progress=note)
    ended = time.perf_counter()
    values = {name: metric["value"] for name, metric in found.items()}
    return {"reconstruction": turned[-1] - began, "predictions": ended - turned[-1], "found": values}


def peer(given: argparse.Namespace, hook_module: str, ids: Path) -> Any:
    python = inputs.peer_python()
    if python is None:
        raise SystemExit("The peer is missing: make peers")
    facts = {"model": given.model, "sae": given.sae, "module": hook_module, "ids": ids, "batch": BATCH}
    script = Path(__file__).with_name("peer_evaluate.py")
    call = [python, str(script), json.dumps(facts, default=str)]
    return subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def theirs(child: Any) -> dict[str, Any]:
    answer: dict[str, Any] = {"found": {}}
    for part in ("predictions", "reconstruction"):
        child.stdin.write(f"{part}\n")
        child.stdin.flush()
        said = json.loads(child.stdout.readline())
        answer[part] = said["seconds"]
        answer["found"] |= said["found"]
    return answer


def main(given: argparse.Namespace) -> None:
    torch.set_num_threads(2)
    lm, sae, capture = load_lm(given.model, device="cpu"), load_sae(given.sae), open_capture(given.capture)
    ids = capture.contexts()[: given.contexts // BATCH * BATCH]
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "ids.npy", ids)
        child = peer(given, lm.resolve(sae.config.hook_name).module, Path(folder) / "ids.npy")
        warm = ids[:BATCH]
        ours(sae, lm, warm), theirs(child)
        rounds = [(ours(sae, lm, ids), theirs(child)) for _ in range(given.rounds)]
        child.stdin.close()
        child.wait()
    print(f"{ids.size} tokens in {len(ids)} contexts, {sae.config.hook_name} of {lm.n_layers} layers")
    for part in ("predictions", "reconstruction"):
        print(
            f"{part:16} ours {median(one[part] for one, _ in rounds):6.2f} s   sae-lens "
            f"{median(other[part] for _, other in rounds):6.2f} s   {median(b[part] / a[part] for a, b in rounds):5.2f} x"
        )
    both = median(
        (b["predictions"] + b["reconstruction"]) / (a["predictions"] + a["reconstruction"]) for a, b in rounds
    )
    print(f"{'both':16} {both:.2f} x")
    mine, other = rounds[0][0]["found"], rounds[0][1]["found"]
    for name, own in SAME.items():
        print(f"{own:20} {mine[own]:.6f}  {other[name]:.6f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("capture", nargs="?", type=Path)
    parser.add_argument("sae", nargs="?", type=Path)
    parser.add_argument("--contexts", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.sae is None:
        options.model, options.capture, options.sae = inputs.model(), inputs.capture(), inputs.sae()
    main(options)
