"""How fast one TopK training step is: ours, the same mathematics by plain autograd, and sparsify where it is installed.

    python tests/bench/bench_train.py [--capture FOLDER] [--d-sae 4608] [--k 32] [--batch 2048] [--rounds 15]

A step is everything from a batch to updated, renormalised weights. The contenders take turns step by step, so that what
else the machine does hits them alike; only the ratios of one run mean something. With a capture, the rows are real and
each contender's held-out FVU after the same rows is printed too: speed must not be bought with quality.
Two or more processes on the same cores: run with OMP_WAIT_POLICY=passive, or the waiting threads take the time.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from saes.numerics.architectures import build_sae
from saes.numerics.sae import SAE, SAEConfig
from training.numerics.evaluate import ExplainedVariance, explained_variance
from training.numerics.losses import Terms, gradients
from training.numerics.optim import Optimizer, matmul_precision
from training.numerics.shards import open_capture

LR = 1e-3
Step = Callable[[Tensor], None]
Fvu = Callable[[Tensor], float]


def made(first: Tensor, d_sae: int, k: int) -> SAE:
    sae = build_sae(SAEConfig("topk", first.shape[1], d_sae, k=k))
    sae.init_b_dec(first)
    return sae


def ours(first: Tensor, d_sae: int, k: int, precision: str) -> tuple[Step, Fvu]:
    sae = made(first, d_sae, k)
    optimizer = Optimizer(sae, (0.9, 0.999), bias_scale=1.0)
    nothing_dead = torch.empty(0, dtype=torch.int64)
    terms = Terms(nothing_dead, variance=float(first.var(0).sum()), aux=1 / 32)

    def step(x: Tensor) -> None:
        with matmul_precision(precision):
            outcome = gradients(sae, x, terms)
        optimizer.step(outcome.grads, LR)

    return step, lambda x: 1 - explained_variance(sae, x)


def autograd(first: Tensor, d_sae: int, k: int) -> tuple[Step, Fvu]:
    """What one writes first: dense codes, loss.backward(), Adam, projection and renormalisation."""
    sae = made(first, d_sae, k)
    adam = torch.optim.Adam(sae.parameters(), lr=LR)
    variance = float(first.var(0).sum())

    def step(x: Tensor) -> None:
        loss = (sae(x) - x).square().sum(-1).mean() / variance
        adam.zero_grad()
        loss.backward()
        with torch.no_grad():
            grad = sae.W_dec.grad
            assert grad is not None
            grad -= (grad * sae.W_dec).sum(1, keepdim=True) * sae.W_dec
            adam.step()
            sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)

    return step, lambda x: 1 - explained_variance(sae, x)


def sparsify(first: Tensor, d_sae: int, k: int) -> tuple[Step, Fvu] | None:
    """eai-sparsify's own forward, loss and constraint, with torch's Adam as its trainer uses it."""
    try:
        from sparsify import SparseCoder, SparseCoderConfig
    except ImportError:
        return None
    coder = SparseCoder(first.shape[1], SparseCoderConfig(num_latents=d_sae, k=k))
    coder.b_dec.data = first.mean(0)
    adam = torch.optim.Adam(coder.parameters(), lr=LR)

    def step(x: Tensor) -> None:
        coder.set_decoder_norm_to_unit_norm()
        coder(x).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()

    @torch.no_grad()
    def fvu(held_out: Tensor) -> float:
        running = ExplainedVariance()
        for x in held_out.split(2048):
            running.add(x, coder(x).sae_out)
        return 1 - running.value

    return step, fvu


def random_rows(d: int, batch: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randn(batch, d, generator=generator)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capture", type=Path)
    parser.add_argument("--d", type=int, default=576, help="width of the rows when there is no capture")
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()

    capture = open_capture(args.capture) if args.capture else None
    hook = capture.hook_names[0] if capture else ""
    rows = capture.batches(hook, args.batch, epochs=100) if capture else random_rows(args.d, args.batch)
    first = next(rows)
    contenders = {
        "ours, fast": ours(first, args.d_sae, args.k, "fast"),
        "ours, float32": ours(first, args.d_sae, args.k, "float32"),
        "plain autograd": autograd(first, args.d_sae, args.k),
        "sparsify": sparsify(first, args.d_sae, args.k),
    }
    present = {name: contender for name, contender in contenders.items() if contender is not None}
    seconds: dict[str, list[float]] = {name: [] for name in present}
    for _ in range(args.rounds):
        x = next(rows)
        for name, (step, _) in present.items():
            start = time.perf_counter()
            step(x)
            seconds[name].append(time.perf_counter() - start)
    held_out = torch.cat(list(capture.batches(hook, 4096, split="held_out", shuffle=False))) if capture else None
    print(f"{first.shape[1]} x {args.d_sae}, k {args.k}, batch {args.batch}, {torch.get_num_threads()} threads")
    slowest = statistics.median(seconds["plain autograd"])
    for name, (_, fvu) in present.items():
        median = statistics.median(seconds[name])
        quality = f"   held-out FVU {fvu(held_out):.4f}" if held_out is not None else ""
        ratio = slowest / median
        print(f"{name:16} {args.batch / median:9,.0f} tokens/s   {ratio:5.2f} x plain autograd{quality}")


if __name__ == "__main__":
    main()
