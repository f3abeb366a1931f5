"""How fast one training step is: ours against the libraries from PyPI, on the same rows, in the same run.

    python tests/bench/bench_train.py [--capture FOLDER | --random] [--architecture topk] [--d-sae 4608]
        [--k 32] [--batch 2048] [--rounds 64] [--seed 0] [--only NAME ...]
    python tests/bench/bench_train.py ... --batch 1024,2048,4096 --d-sae 4608,9216     # every pair of them, and a table
    python tests/bench/bench_train.py ... --quality --steps 300 --seeds 3              # held-out FVU, speed aside
    python tests/bench/bench_train.py --architecture topk_skip_transcoder --capture FOLDER | --random

sae-lens, eai-sparsify and dictionary-learning come from `make peers`, or --peers names a Python that has them. The rows are
those of a capture; without one, of the demo's, which inputs.py makes.

Every contender is a process of its own that holds the same rows and makes one step when its turn comes; a step is
everything from a batch to updated, renormalised weights. They take turns step by step with a pause between, so that
what else the machine does hits them alike, and no thread of one still spins when the next begins; --turn 4 makes four
steps a turn and leaves out the first of them, which finds the caches full of the others' numbers. Only the ratios of one
run mean something. All learn with Adam at 1e-3 from rows scaled to mean norm sqrt(d); SAELens starts from our initial
weights. Their held-out FVU and L0 after the same rows are printed: speed must not be bought with quality.
With --random the rows are random and quality means nothing.

Transcoders (--architecture topk_transcoder, ...) learn from a capture of two hook points of one width, both sides in the
units that ours are trained in. sparsify trains TopK transcoders, with and without a skip; no peer trains JumpReLU ones,
whose ratio is to our own gradients by autograd.

With --quality ours and one other (sparsify for TopK, autograd for JumpReLU transcoders, else SAELens; or --only) make
--steps steps without pauses from each of several seeds, which choose rows, their order and the first weights; FVU's mean
and range over seeds are printed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

LR = 1e-3
PAUSE = 0.03  # seconds; OpenMP's threads spin for up to about half of it after their last work
OPTIONS = {"standard": {"l1": 2.0}, "gated": {"l1": 2.0}, "jumprelu": {"l0": 1.0}}  # coefficients, in units of SAELens
SPARSIFY = ("topk", "topk_transcoder", "topk_skip_transcoder")
TRANSCODERS = (*SPARSIFY[1:], "jumprelu_transcoder", "jumprelu_skip_transcoder")
CONTENDERS = {  # name -> architectures
    "ours": ("topk", "batchtopk", "matryoshka", "jumprelu", "standard", "gated", *TRANSCODERS),
    "ours, float32": ("topk", "batchtopk", *SPARSIFY[1:]),
    "ours, plain torch": ("topk", "batchtopk", "jumprelu", "standard", "gated", "matryoshka", *SPARSIFY[1:]),
    "ours, autograd": TRANSCODERS,
    "sparsify": SPARSIFY,
    "sparsify, autocast": SPARSIFY,
    "dictionary-learning": ("topk", "batchtopk"),
    "sae-lens": ("topk", "batchtopk", "matryoshka", "jumprelu", "standard", "gated"),
    "sae-lens, autocast": ("topk", "batchtopk", "matryoshka", "jumprelu", "standard", "gated"),
}

Step = Callable[[Tensor], object]
Look = Callable[[Tensor], tuple[Tensor, Tensor]]  # rows -> x_hat (n, d), how many features fired (n,)


def goal_of(args: argparse.Namespace, rows: Tensor) -> Tensor:
    """What x_hat is to be: the second side of a transcoder's rows (n, 2 d), else the rows (n, d) themselves."""
    return rows[:, -args.d :]


# ---------------------------------------------------------------------------------------------------- the contenders


def ours(name: str, args: argparse.Namespace, first: Tensor, start: dict[str, Tensor]) -> tuple[Step, Look]:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import training.numerics.gradients as ways
    from training.numerics.losses import Terms
    from training.numerics.optim import Optimizer, matmul_precision
    from training.numerics.threads import Scratch
    from training.numerics.train import TrainConfig, follow_codes

    if name in ("ours, plain torch", "ours, autograd"):
        ways.kernels = lambda: None  # as where numba is not installed
    if name == "ours, autograd":
        ways.topk_gradients = ways.autograd_gradients
    sae = our_sae(args)
    sae.load_state_dict(sae.state_dict() | start)
    method, scratch = TrainConfig(), Scratch()
    optimizer = Optimizer(sae, (0.9, 0.999), 1.0, method.unit_decoder(sae.config.architecture))
    terms = Terms(
        torch.empty(0, dtype=torch.int64),
        variance=float(goal_of(args, first).var(0).sum()),
        aux=1 / 32,
        **OPTIONS.get(args.architecture.partition("_")[0], {}),
    )
    precision = "float32" if name == "ours, float32" else "fast"
    steps = 0

    def step(x: Tensor) -> None:
        nonlocal steps
        with matmul_precision(precision):
            outcome = ways.gradients(sae, x, terms, scratch)
        optimizer.step(outcome.grads, LR, method.clip_of(sae.config.architecture))
        follow_codes(sae, outcome.least, steps)
        steps += 1

    def look(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x[:, : args.d]
        acts = sae.encode(x)
        return sae.decode(acts, x), (acts > 0).sum(-1)

    return step, look


def our_sae(args: argparse.Namespace) -> Any:
    from saes.numerics.architectures import build_sae
    from saes.numerics.sae import SAEConfig

    nested = args.architecture == "matryoshka"
    return build_sae(
        SAEConfig(
            "batchtopk" if nested else args.architecture,
            args.d,
            args.d_sae,
            k=args.k if args.architecture in ("batchtopk", "matryoshka", *SPARSIFY) else None,
            apply_b_dec_to_input=args.architecture not in TRANSCODERS,
            options={"matryoshka_widths": widths(args.d_sae)} if nested else {},
        ),
        seed=args.seed,
    )


def widths(d_sae: int) -> list[int]:
    return [d_sae // 8, d_sae // 4, d_sae // 2, d_sae]


def sparsify(name: str, args: argparse.Namespace, first: Tensor, start: dict[str, Tensor]) -> tuple[Step, Look]:
    """Its own forward, loss and constraint, with torch's Adam as its trainer uses it."""
    from sparsify import SparseCoder, SparseCoderConfig

    transcodes, skips = args.architecture in TRANSCODERS, "skip" in args.architecture
    coder = SparseCoder(
        args.d, SparseCoderConfig(num_latents=args.d_sae, k=args.k, transcode=transcodes, skip_connection=skips)
    )
    coder.b_dec.data = goal_of(args, first).mean(0)
    if transcodes:
        coder.encoder.bias.data = -first[:, : args.d].mean(0) @ coder.encoder.weight.data.T
    adam = torch.optim.Adam(coder.parameters(), lr=LR)

    def step(x: Tensor) -> None:
        if not transcodes:
            coder.set_decoder_norm_to_unit_norm()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=name.endswith("autocast")):
            loss = coder(x[:, : args.d], goal_of(args, x)).fvu
        loss.backward()
        if not transcodes:
            coder.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()

    def look(x: Tensor) -> tuple[Tensor, Tensor]:
        out = coder(x[:, : args.d])
        return out.sae_out, (out.latent_acts > 0).sum(-1)

    return step, look


def dictionary_learning(
    name: str, args: argparse.Namespace, first: Tensor, start: dict[str, Tensor]
) -> tuple[Step, Look]:
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = {"topk": TopKTrainer, "batchtopk": BatchTopKTrainer}[args.architecture](
        steps=10**6, activation_dim=args.d, dict_size=args.d_sae, k=args.k, layer=9, lm_name="", lr=LR,
        warmup_steps=0, decay_start=None, threshold_start_step=0, seed=args.seed, device="cpu",
    )  # fmt: skip
    steps = 0

    def step(x: Tensor) -> None:
        nonlocal steps
        trainer.update(steps, x)
        steps += 1

    def look(x: Tensor) -> tuple[Tensor, Tensor]:
        whole_batch = {"use_threshold": False} if args.architecture == "batchtopk" else {}
        acts = trainer.ae.encode(x, **whole_batch)
        return trainer.ae.decode(acts), (acts > 0).sum(-1)

    return step, look


def sae_lens(name: str, args: argparse.Namespace, first: Tensor, start: dict[str, Tensor]) -> tuple[Step, Look]:
    import sae_lens.saes as saes
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.sae import TrainStepInput
    from sae_lens.training.sae_trainer import SAETrainer

    kind = {
        "topk": "TopK", "batchtopk": "BatchTopK", "matryoshka": "MatryoshkaBatchTopK", "jumprelu": "JumpReLU",
        "standard": "Standard", "gated": "Gated",
    }[args.architecture]  # fmt: skip
    options: dict[str, Any] = {}
    if "TopK" in kind:
        options["k"] = args.k
    if args.architecture == "matryoshka":
        options["matryoshka_widths"] = widths(args.d_sae)
    for coefficient, value in OPTIONS.get(args.architecture, {}).items():
        options[f"{coefficient}_coefficient"] = value
    config = getattr(saes, f"{kind}TrainingSAEConfig")(d_in=args.d, d_sae=args.d_sae, **options)
    sae = getattr(saes, f"{kind}TrainingSAE")(config)
    for key, tensor in sae.named_parameters():
        if key in start:
            tensor.data.copy_(start[key])
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=10**9,
            train_batch_size_samples=args.batch,
            lr=LR,
            lr_end=LR,
            autocast=name.endswith("autocast"),
        ),
        sae,
        iter(()),
    )

    def step(x: Tensor) -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    def look(x: Tensor) -> tuple[Tensor, Tensor]:
        inputs = TrainStepInput(
            sae_in=x,
            coefficients=trainer.get_coefficients(),
            dead_neuron_mask=None,
            n_training_steps=0,
            is_logging_step=False,
        )
        out = sae.training_forward_pass(inputs)
        return out.sae_out, (out.feature_acts > 0).sum(-1)

    return step, look


# ---------------------------------------------------------------------------------------------------- one contender


def contend(name: str, args: argparse.Namespace) -> None:
    """A contender's process: a step for every line on standard input, its seconds on standard output; FVU and L0 at the
    end."""
    folder = Path(args.folder)
    rows, held_out = (torch.from_numpy(np.load(folder / f"{part}.npy")) for part in ("rows", "held_out"))
    start = torch.load(folder / "start.pt")
    make = {"ours": ours, "sparsify": sparsify, "sae-lens": sae_lens, "dictionary-learning": dictionary_learning}
    answers, sys.stdout = sys.stdout, sys.stderr
    torch.manual_seed(args.seed)
    step, look = make[name.split(",")[0]](name, args, rows[: args.batch], start)
    print("ready", file=answers, flush=True)
    batches = rows.split(args.batch)
    for turn, _ in enumerate(sys.stdin):
        begun = time.perf_counter()
        step(batches[turn % len(batches)])
        print(time.perf_counter() - begun, file=answers, flush=True)
    errors, total, fired = 0.0, 0.0, 0.0
    with torch.no_grad():
        for x in held_out.split(args.batch):
            x_hat, l0 = look(x)
            goal = goal_of(args, x)
            errors += float((x_hat - goal).double().square().sum())
            total += float((goal - goal_of(args, held_out).mean(0)).double().square().sum())
            fired += float(l0.sum())
    print(json.dumps({"fvu": errors / total, "l0": fired / len(held_out)}), file=answers, flush=True)


# ---------------------------------------------------------------------------------------------------- the run


def write_rows(args: argparse.Namespace, folder: Path) -> None:
    """The same rows, in the same order, and the same start for everyone: rows.npy, held_out.npy, start.pt."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from training.numerics.shards import open_capture
    from training.numerics.transcoding import Units

    transcodes, wanted = args.architecture in TRANSCODERS, args.rounds * args.batch
    if args.capture:
        capture = open_capture(args.capture)
        hook = tuple(capture.hook_names[:2]) if transcodes else capture.hook_names[0]
        wanted = min(
            wanted, capture.split_rows("train") // args.batch * args.batch
        )  # more are taken from the first again
        stream = capture.batches(hook, args.batch, seed=args.seed, n_rows=wanted)
        rows = torch.cat(list(stream))
        held_out = torch.cat(list(capture.batches(hook, 4096, split="held_out", shuffle=False)))
    else:
        width = args.d * (2 if transcodes else 1)
        rows, held_out = (torch.randn(n, width) + 1 for n in (min(wanted, 32 * args.batch), args.batch))
    args.d = rows.shape[1] // (2 if transcodes else 1)
    rows = rows[: len(rows) // args.batch * args.batch]
    sae = our_sae(args)
    if transcodes:
        units = Units.of(sae, rows[: args.batch])
        rows, held_out = units.apply(sae, rows), units.apply(sae, held_out)
        sae.b_dec.data.copy_(goal_of(args, rows[: args.batch]).mean(0))
    else:
        scale = args.d**0.5 / rows[:100_000].norm(dim=1).mean()
        rows, held_out = rows * scale, held_out * scale
        sae.b_dec.data.copy_(rows[: args.batch].mean(0))
    np.save(folder / "rows.npy", rows.numpy())
    np.save(folder / "held_out.npy", held_out.numpy())
    start = {name: tensor.detach().contiguous() for name, tensor in sae.named_parameters()}
    if args.architecture.startswith("jumprelu"):
        start["threshold"].fill_(0.01)
    torch.save(start, folder / "start.pt")


class Result(NamedTuple):
    """What a contender reached: rows a second, its speed relative to the fastest peer (without one to our autograd, where
    that takes part), held-out FVU and L0."""

    rows: float
    ratio: float | None
    fvu: float
    l0: float


def run(args: argparse.Namespace, folder: Path, pause: float = PAUSE) -> dict[str, Result]:
    """All contenders of one configuration, by name."""
    names = [name for name, kinds in CONTENDERS.items() if args.architecture in kinds]
    names = [name for name in names if (not args.only or name in args.only) and (args.peers or "ours" in name)]
    children = {name: start(name, args, folder) for name in names}
    for name, child in children.items():
        if child.stdout is None or child.stdout.readline().strip() != "ready":
            raise SystemExit(f"{name} does not start; --verbose shows why.")
    seconds: dict[str, list[float]] = {name: [] for name in children}
    for _ in range(args.rounds // args.turn):
        for name, child in children.items():
            time.sleep(pause)
            for step in range(args.turn):
                print("step", file=child.stdin, flush=True)
                taken = float(child.stdout.readline())  # type: ignore[union-attr]
                seconds[name] += [taken] if step or args.turn == 1 else []
    medians = {name: statistics.median(taken[2:] or taken) for name, taken in seconds.items()}
    peers = [name for name in names if "ours" not in name]
    compared = [name for name in peers if name in STOCK] or peers or [name for name in names if "autograd" in name]
    fastest = min((medians[name] for name in compared), default=None)
    results = {}
    for name, child in children.items():
        child.stdin.close()  # type: ignore[union-attr]
        quality = json.loads(child.stdout.readline())  # type: ignore[union-attr]
        child.wait()
        ratio = fastest / medians[name] if fastest else None
        results[name] = Result(args.batch / medians[name], ratio, quality["fvu"], quality["l0"])
    return results


def start(name: str, args: argparse.Namespace, folder: Path) -> "subprocess.Popen[str]":
    given = [
        f"--{key.replace('_', '-')}={getattr(args, key)}"
        for key in ("architecture", "d", "d_sae", "k", "batch", "seed")
    ]
    return subprocess.Popen(
        [
            sys.executable if name.startswith("ours") else args.peers,
            __file__,
            f"--contender={name}",
            f"--folder={folder}",
            *given,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=sys.stderr if args.verbose else subprocess.DEVNULL,
        text=True,
    )


def title(args: argparse.Namespace) -> str:
    return f"{args.architecture}, {args.d} x {args.d_sae}, k {args.k}, batch {args.batch}, {args.rounds} steps"


def speed(args: argparse.Namespace) -> dict[str, Result]:
    """One configuration, printed."""
    with tempfile.TemporaryDirectory() as folder:
        write_rows(args, Path(folder))
        results = run(args, Path(folder))
    print(f"{title(args)}, seed {args.seed}")
    peers = [name for name in results if "ours" not in name]
    fastest = "the fastest stock peer" if set(STOCK) & set(peers) else "the fastest peer" if peers else "autograd"
    for name, made in results.items():
        ratio = f"{made.ratio:6.2f} x {fastest}" if made.ratio else ""
        print(f"{name:20} {made.rows:9,.0f} rows/s {ratio}   FVU {made.fvu:.4f}  L0 {made.l0:.1f}", flush=True)
    return results


def grid(args: argparse.Namespace, widths: list[int], batches: list[int]) -> None:
    """Every width with every batch, and a table of ours against the fastest peers as they come and with autocast."""
    lines = []
    for d_sae, batch in product(widths, batches):
        results = speed(argparse.Namespace(**vars(args) | {"d_sae": d_sae, "batch": batch}))
        ours, peers = results["ours"], {name: made for name, made in results.items() if "ours" not in name}
        cells = [str(d_sae), str(batch), f"{ours.rows:,.0f}"]
        for kind in (False, True):
            same = {name: made for name, made in peers.items() if name.endswith("autocast") == kind}
            best = max(same, key=lambda name: same[name].rows, default=None)
            cells.append(f"{ours.rows / same[best].rows:.1f} ({best.partition(',')[0]})" if best else "-")
        lines.append(cells)
    print(f"\n{args.architecture}, k {args.k}, {args.rounds} steps each")
    for cells in (["d_sae", "batch", "ours, rows/s", "/ fastest as it comes", "/ fastest with autocast"], ["--:"] * 5):
        print(f"| {' | '.join(cells)} |")
    for cells in lines:
        print(f"| {' | '.join(cells)} |")


def quality(args: argparse.Namespace) -> None:
    """Held-out FVU and L0 of each seed, and their mean and range."""
    other = "sparsify" if args.architecture in SPARSIFY else "sae-lens"
    args.only = args.only or ["ours", "ours, autograd" if args.architecture in TRANSCODERS[2:] else other]
    found: dict[str, list[Result]] = {}
    for seed in range(args.seed, args.seed + args.seeds):
        own = argparse.Namespace(**vars(args) | {"seed": seed})
        with tempfile.TemporaryDirectory() as folder:
            write_rows(own, Path(folder))
            args.d = own.d
            for name, made in run(own, Path(folder), pause=0).items():
                found.setdefault(name, []).append(made)
                print(f"seed {seed}  {name:20} FVU {made.fvu:.4f}  L0 {made.l0:.1f}", flush=True)
    print(f"{title(args)}, {args.rounds * args.batch:,} rows, {args.seeds} seeds")
    for name, results in found.items():
        fvus = [made.fvu for made in results]
        l0 = statistics.mean(made.l0 for made in results)
        print(
            f"{name:20} FVU {statistics.mean(fvus):.4f} ({min(fvus):.4f} to {max(fvus):.4f})  L0 {l0:.1f}", flush=True
        )


def numbers(text: str) -> list[int]:
    """Of a list with commas between."""
    return [int(part) for part in text.split(",")]


STOCK = ("sparsify", "dictionary-learning", "sae-lens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", help="the python of an environment with the peers; else that of `make peers`")
    parser.add_argument("--capture", type=Path)
    parser.add_argument("--random", action="store_true", help="random rows of width --d")
    parser.add_argument(
        "--architecture", default="topk", choices=sorted({kind for kinds in CONTENDERS.values() for kind in kinds})
    )
    parser.add_argument("--d", type=int, default=576, help="width of random rows")
    parser.add_argument("--d-sae", "--width", type=numbers, default=[4608], help="one width, or several: 4608,9216")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=numbers, default=[2048], help="rows a step, or several: 1024,2048")
    parser.add_argument("--rounds", "--steps", type=int, default=64)
    parser.add_argument("--turn", type=int, default=1, help="steps that one contender makes before the next one's turn")
    parser.add_argument("--quality", action="store_true", help="FVU after the same rows instead of speed")
    parser.add_argument("--seeds", type=int, default=3, help="with --quality: how many, from --seed on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", metavar="NAME", help="only these contenders")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes, batches = args.d_sae, args.batch
    args.d_sae, args.batch = sizes[0], batches[0]
    if args.contender:
        contend(args.contender, args)
        return
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from tests.bench import inputs

    args.peers = args.peers or inputs.peer_python()
    if args.architecture in TRANSCODERS and not (args.capture or args.random):
        parser.error("A transcoder needs --capture, of two hook points, or --random.")
    args.capture = None if args.random else args.capture or inputs.capture()
    if len(sizes) * len(batches) > 1:
        if args.quality:
            parser.error("--quality takes one width and one batch.")
        if args.only and "ours" not in args.only:
            parser.error("A table compares ours with the others: --only must name ours.")
        grid(args, sizes, batches)
    elif args.quality:
        quality(args)
    else:
        speed(args)


if __name__ == "__main__":
    main()
