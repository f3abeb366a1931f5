"""What an SAE makes of activations: sums over a stream of rows, in float64, so that no result depends on the batches."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saes.numerics.sae import SAE

MAX_DENSE = 2**24  # entries of a dense (rows, d_sae) block: 64 MB in float32
DENSITY_EDGES = np.arange(-6.0, 0.01, 0.25)  # log10 of the firing rate
LEGACY_ROWS = 4096  # whose mean the legacy explained variance takes


class Rows(NamedTuple):
    """Some rows: x (n, d_in); goal (n, d_out), what x_hat is compared with where that is not x; context (n,), ascending
    numbers of the contexts they are from."""

    x: Tensor
    goal: Tensor | None = None
    context: np.ndarray | None = None


class ExplainedVariance:
    """Streaming 1 - E|x - x_hat|^2 / (E|x|^2 - |E x|^2), float64, over rows of (n, d) tensors."""

    def __init__(self) -> None:
        self.n = 0
        self.squared_error = self.squared_norm = 0.0
        self.sum: Tensor | float = 0.0

    def add(self, x: Tensor, x_hat: Tensor) -> None:
        x64, x_hat64 = x.double(), x_hat.double()
        self.n += len(x)
        self.squared_error += float((x64 - x_hat64).square().sum())
        self.squared_norm += float(x64.square().sum())
        self.sum = self.sum + x64.sum(0)

    @property
    def variance(self) -> float:
        """E|x|^2 - |E x|^2."""
        mean = torch.as_tensor(self.sum) / self.n
        return self.squared_norm / self.n - float(mean.square().sum())

    @property
    def value(self) -> float:
        return 1 - self.squared_error / self.n / self.variance if self.variance > 0 else float("nan")


@torch.no_grad()
def explained_variance(sae: SAE, x: Tensor) -> float:
    """Explained variance (see DEFINITIONS) of x (n, d_in), computed in blocks of bounded size."""
    running = ExplainedVariance()
    for part in blocks(sae, x):
        running.add(part, sae(part))
    return running.value


def blocks(sae: SAE, x: Tensor) -> Iterator[Tensor]:
    """x (n, d_in) in parts whose dense codes stay small, on the SAE's device and in its dtype."""
    device = sae.W_dec.device
    for part in x.split(max(1, MAX_DENSE // sae.config.d_sae)):
        yield part.to(device, sae.W_dec.dtype)


def density_histogram(fired: np.ndarray, n: int) -> dict[str, Any]:
    """{"edges" (log10), "counts", "dead"} of the firing rates fired / n; rates below the first edge count in bin 0."""
    rates = np.log10(fired[fired > 0] / n).clip(DENSITY_EDGES[0], 0)
    counts, edges = np.histogram(rates, bins=DENSITY_EDGES)
    return {"edges": edges.tolist(), "counts": counts.tolist(), "dead": int((fired == 0).sum())}


class Firing:
    """How often each feature fired: on how many tokens, and in how many contexts. Both (d_sae,) int64."""

    def __init__(self, d_sae: int, device: torch.device) -> None:
        self.tokens = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.contexts = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self._last = -1
        self._seen = torch.zeros(d_sae, dtype=torch.bool, device=device)

    def add(self, fired: Tensor, context: np.ndarray | None) -> None:
        """fired (n, d_sae) bool; a context may go on from the rows before."""
        self.tokens += fired.sum(0)
        if context is None:
            return
        cuts = [0, *(np.flatnonzero(np.diff(context)) + 1).tolist(), len(context)]
        for first, last in itertools.pairwise(cuts):
            here = fired[first:last].any(0)
            if context[first] == self._last:
                self.contexts += here & ~self._seen
                self._seen |= here
            else:
                self.contexts += here
                self._last, self._seen = int(context[first]), here


@dataclass
class Sums:
    """Totals over n rows; the last five per dimension (d_out,)."""

    n: int = 0
    of: dict[str, float] = field(default_factory=dict)
    x: Tensor | float = 0.0
    squares: Tensor | float = 0.0
    error: Tensor | float = 0.0
    error_squares: Tensor | float = 0.0

    def add(self, acts: Tensor, goal: Tensor, x_hat: Tensor) -> None:
        y, y_hat = goal.double(), x_hat.double()
        error = y - y_hat
        norm, norm_hat, dot = y.norm(dim=-1), y_hat.norm(dim=-1), (y * y_hat).sum(-1)
        tiny = torch.finfo(torch.float64).tiny
        totals = {
            "l0": (acts != 0).sum(),
            "l1": acts.abs().sum(dtype=torch.float64),
            "cosine": (dot / (norm * norm_hat).clamp_min(tiny)).sum(),
            "l2_norm_in": norm.sum(),
            "l2_norm_out": norm_hat.sum(),
            "l2_ratio": (norm_hat / norm.clamp_min(tiny)).sum(),
            "norm": norm_hat.square().sum(),
            "dot": dot.sum(),
        }
        self.n += len(y)
        self.of = {name: self.of.get(name, 0.0) + float(value) for name, value in totals.items()}
        self.x, self.squares = self.x + y.sum(0), self.squares + y.square().sum(0)
        self.error, self.error_squares = self.error + error.sum(0), self.error_squares + error.square().sum(0)


@dataclass(frozen=True)
class Reconstruction:
    """What was found: metrics by name, how often each feature fired, the mean of what was to be reconstructed (d_out,)."""

    values: dict[str, Any]
    firing: Firing
    mean: Tensor
    n: int


@torch.no_grad()
def reconstruction(sae: SAE, batches: Iterable[Tensor | Rows], progress: Any = None) -> Reconstruction | None:
    """Metrics of a stream of rows; None when there were none."""
    sums, firing = Sums(), Firing(sae.config.d_sae, sae.W_dec.device)
    legacy, legacy_rows = 0.0, _Legacy()
    for batch in batches:
        rows = batch if isinstance(batch, Rows) else Rows(batch)
        first = 0
        for x in blocks(sae, rows.x):
            here = slice(first, first + len(x))
            goal = x if rows.goal is None else rows.goal[here].to(x)
            acts = sae.encode(x)
            x_hat = sae.decode(acts, x)
            sums.add(acts, goal, x_hat)
            firing.add(acts != 0, None if rows.context is None else rows.context[here])
            legacy += legacy_rows.add(goal, x_hat)
            first += len(x)
        if progress is not None:
            progress(sums.n)
    if not sums.n:
        return None
    legacy += legacy_rows.rest()
    mean = torch.as_tensor(sums.x) / sums.n
    return Reconstruction(_values(sae, sums, firing, legacy), firing, mean, sums.n)


class _Legacy:
    """Sums of 1 - |e|^2 / |x - mean x|^2 over groups of exactly LEGACY_ROWS rows, whatever the batches."""

    def __init__(self) -> None:
        self.goal: list[Tensor] = []
        self.error: list[Tensor] = []
        self.waiting = 0

    def add(self, goal: Tensor, x_hat: Tensor) -> float:
        self.goal.append(goal)
        self.error.append((goal.double() - x_hat.double()).square().sum(-1))
        self.waiting += len(goal)
        total = 0.0
        while self.waiting >= LEGACY_ROWS:
            goals, errors = torch.cat(self.goal), torch.cat(self.error)
            total += self._sum(goals[:LEGACY_ROWS], errors[:LEGACY_ROWS])
            self.goal, self.error = [goals[LEGACY_ROWS:]], [errors[LEGACY_ROWS:]]
            self.waiting -= LEGACY_ROWS
        return total

    def rest(self) -> float:
        return self._sum(torch.cat(self.goal), torch.cat(self.error)) if self.waiting else 0.0

    @staticmethod
    def _sum(goal: Tensor, error: Tensor) -> float:
        wide = goal.double()
        spread = (wide - wide.mean(0)).square().sum(-1)
        return float((1 - error / spread).sum())


def _values(sae: SAE, sums: Sums, firing: Firing, legacy: float) -> dict[str, Any]:
    n, d_sae = sums.n, sae.config.d_sae
    means = {name: total / n for name, total in sums.of.items()}
    x, squares, error, error_squares = (
        torch.as_tensor(total) / n for total in (sums.x, sums.squares, sums.error, sums.error_squares)
    )
    mse, square = float(error_squares.sum()), float(squares.sum())
    variance = square - float(x.square().sum())
    spread = squares - x.square()
    varies = spread > 1e-12 * squares
    each = 1 - error_squares[varies] / spread[varies]
    fired = firing.tokens.cpu().numpy()
    dead = int((fired == 0).sum())
    found = 1 - mse / variance if variance > 0 else float("nan")
    saebench = square - (square / sae.config.d_out) ** 2
    return {
        "l0": means["l0"],
        "l1": means["l1"],
        "mse": mse,
        "mse_per_dimension": mse / sae.config.d_out,
        "explained_variance": found,
        "fvu": 1 - found,
        "explained_variance_per_dimension": float(each.mean()) if len(each) else float("nan"),
        "explained_variance_centred": (
            1 - float((error_squares - error.square()).sum()) / variance if variance > 0 else float("nan")
        ),
        "explained_variance_legacy": legacy / n,
        "explained_variance_saebench": 1 - mse / saebench if saebench else float("nan"),
        "cosine": means["cosine"],
        "l2_norm_in": means["l2_norm_in"],
        "l2_norm_out": means["l2_norm_out"],
        "l2_ratio": means["l2_ratio"],
        "relative_reconstruction_bias": means["norm"] / means["dot"] if means["dot"] else float("nan"),
        "dead_features": dead,
        "alive_fraction": 1 - dead / d_sae,
        "dense_features": int((fired > 0.1 * n).sum()),
        "density_histogram": density_histogram(fired, n),
    }
