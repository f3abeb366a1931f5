"""What a sweep of N SAEs costs against one of them: wall time and ratios, medians over rounds in one process.

    .venv/bin/python tests/bench/bench_sweep.py                    # from stored activations, 576 x 4,608, TopK
    .venv/bin/python tests/bench/bench_sweep.py --from-model       # activations computed by a model on the way
    --no-repeats leaves `N x one` out; times are printed as they come, so that a run that is cut says something

`one`: `train` on its own. `N`: N of them by `train_together` on one stream. `N x one`: one after another, each with a
stream of its own. With --from-model each batch costs a forward pass through nine layers of SmolLM2-135M's shape (random
weights: the time is the same), as a capture that is not stored does; that is what one stream saves.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from saes.numerics.architectures import build_sae
from saes.numerics.sae import SAEConfig
from training.numerics.together import Member, train_together
from training.numerics.train import TrainConfig, Training, train

D = 576
Source = Callable[[int], Iterator[torch.Tensor]]


def stored(rows: torch.Tensor, batch: int) -> Source:
    """Batches gathered from shuffled rows in bfloat16, as a stored capture gives them."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))

    def batches(start: int) -> Iterator[torch.Tensor]:
        for at in range(start, len(rows) - batch + 1, batch):
            yield rows[order[at : at + batch]].float()

    return batches


def from_model(batch: int, steps: int) -> Source:
    """The output of the ninth layer for `batch` tokens in contexts of 128."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    shape = {"hidden_size": D, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    model = LlamaModel(LlamaConfig(vocab_size=49152, num_hidden_layers=9, **shape)).eval()

    def batches(start: int) -> Iterator[torch.Tensor]:
        for _ in range(start // batch, steps):
            with torch.inference_mode():
                x = model(torch.randint(0, 49152, (batch // 128, 128))).last_hidden_state
            yield x.reshape(-1, D).clone()

    return batches


def members(count: int, steps: int, batch: int, d_sae: int) -> list[Training]:
    config = {"steps": steps, "batch_size": batch, "order_seed": 0, "log_every": steps, "checkpoint_every": 10**6}
    made = []
    for number in range(count):
        sae = build_sae(
            SAEConfig(architecture="topk", d_in=D, d_sae=d_sae, k=(16, 32, 48, 64)[number % 4]), seed=number
        )
        made.append(Training(sae, TrainConfig(seed=number, **config)))
    return made


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def alone(training: Training, source: Source) -> None:
    train(training.sae, source, training.config)


def side_by_side(trainings: list[Training], source: Source) -> None:
    def streams(start: int) -> Iterator[Mapping[str, torch.Tensor]]:
        for x in source(start):
            yield {"": x}

    train_together(
        [Member(i, "", each) for i, each in enumerate(trainings)], streams, on_end=lambda member, outcome: None
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--from-model", action="store_true")
    parser.add_argument("--no-repeats", action="store_true")
    given = parser.parse_args()
    size = (given.steps, given.batch, given.d_sae)
    if given.from_model:
        source = from_model(given.batch, given.steps)
    else:
        generator = torch.Generator().manual_seed(0)
        codes = torch.randn(given.steps * given.batch, 64, generator=generator).relu()
        noise = torch.randn(len(codes), D, generator=generator)
        source = stored((codes @ torch.randn(64, D, generator=generator) + noise).bfloat16(), given.batch)
    alone(members(1, 3, given.batch, given.d_sae)[0], source)  # compiles and warms up
    works: dict[str, Callable[[], object]] = {
        "one": lambda: alone(members(1, *size)[0], source),
        "N": lambda: side_by_side(members(given.count, *size), source),
        "N x one": lambda: [alone(each, source) for each in members(given.count, *size)],
    }
    if given.no_repeats:
        del works["N x one"]
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(given.rounds):
        for name, work in works.items():
            times[name].append(timed(work))
            print(f"{name:8} {times[name][-1]:7.2f} s", flush=True)
    one = statistics.median(times["one"])
    for name, found in times.items():
        middle = statistics.median(found)
        print(f"{name:8} {middle:7.2f} s  {middle / one:5.2f} x one   (N = {given.count})")


if __name__ == "__main__":
    main()
