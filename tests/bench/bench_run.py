"""A whole training run from a stored capture: how fast its rows are read beside how fast they are learnt from, and
whether time and memory grow evenly with tokens.

    .venv/bin/python tests/bench/bench_run.py [--capture FOLDER] [--tokens 1000000] [--d-sae 4608] [--batch 2048]

Rows are read twice: alone, and by `train` while it learns, in the same order. Printed: rows/s of both and their ratio
(how many times faster than the steps reading is), then for each of the run's parts its seconds, its rows/s and the
process's resident memory at its end. The first part holds compilation, first touches of memory and the reading of the
shards from disk; compare the others.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from saes.numerics.architectures import build_sae
from saes.numerics.sae import SAEConfig
from tests.bench import inputs
from training.numerics.shards import open_capture
from training.numerics.train import StepReport, TrainConfig, capture_batches, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capture", type=Path, help="else one is made of the demo's model (inputs.py)")
    parser.add_argument("--architecture", default="topk", choices=("topk", "batchtopk"))
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--parts", type=int, default=4)
    args = parser.parse_args()
    capture = open_capture(args.capture or inputs.capture())
    hook = capture.hook_names[0]
    steps = args.tokens // args.batch // args.parts * args.parts
    config = TrainConfig(steps=steps, batch_size=args.batch, log_every=steps // args.parts)
    batches = capture_batches(capture, hook, config)

    begun = time.perf_counter()
    width, read = 0, 0
    for x in batches(0):
        width, read = x.shape[1], read + len(x)
    reading = read / (time.perf_counter() - begun)

    reports: list[tuple[float, StepReport]] = []
    sae = build_sae(SAEConfig(args.architecture, width, args.d_sae, k=32))
    begun = time.perf_counter()
    train(sae, batches, config, on_step=lambda report: reports.append((time.perf_counter(), report)))
    learning = read / (time.perf_counter() - begun)

    print(f"{args.architecture}, {width} x {args.d_sae}, batch {args.batch}, {read:,} tokens")
    print(f"reading {reading:,.0f} rows/s, training {learning:,.0f} rows/s: {reading / learning:.1f} x")
    for number, (at, report) in enumerate(reports, 1):
        seconds = at - (reports[number - 2][0] if number > 1 else begun)
        print(
            f"part {number} to token {report.tokens:,}: {seconds:.2f} s, {read / args.parts / seconds:,.0f} rows/s, "
            f"{(report.memory or 0) / 2**20:,.0f} MiB"
        )


if __name__ == "__main__":
    main()
