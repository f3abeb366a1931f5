"""Gradients in the form that the optimiser applies feature by feature, by compiled kernels."""

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saes.numerics.sae import SAE
from training.numerics.compiled import as_both, update_kernels
from training.numerics.sparse import CHUNK_FEATURES, bias_of
from training.numerics.threads import Scratch, share

TINY = 1e-6  # torch's, in clip_grad_norm_


class Rates(NamedTuple):
    """What Adam needs in one step: see update_kernels._adam."""

    weights: float
    biases: float
    beta1: float
    beta2: float
    root: float
    eps: float


class Targets(NamedTuple):
    """What a step changes: tensors in the training layout and Adam's moments by name; `unit`: decoder rows at norm 1."""

    tensors: Mapping[str, Tensor]
    moments: Mapping[str, dict[str, Tensor]]
    unit: bool

    def arrays(self, names: tuple[str, ...]) -> list[Any]:
        """Weights and both moments of each, as the kernels take them."""
        return [
            tensor.numpy()
            for name in names
            for tensor in (self.tensors[name], self.moments[name]["exp_avg"], self.moments[name]["exp_avg_sq"])
        ]


class RowGradients(Mapping[str, Tensor]):
    """Gradients of an SAE: a mapping like any other where one is looked up. `rows` names those of W_enc, its bias and
    W_dec, which `update` applies side by side for runs of features."""

    def __init__(self, sae: SAE) -> None:
        self.sae = sae
        self.bias = bias_of(sae)
        self.rows = ("W_enc", self.bias, "W_dec")

    @property
    @abstractmethod
    def tensors(self) -> Mapping[str, Tensor]:
        """All of them."""

    @abstractmethod
    def update(self, targets: Targets, rates: Rates, clip: float | None) -> tuple[dict[str, Tensor], float]:
        """Adam's step of `rows`, in place. Returns the other gradients and what they are still to be multiplied with so
        that all together have an L2 norm of at most `clip`. Decoder rows that are kept at norm 1 do not grow: their
        gradients have lost what lies along them before the norm is taken. The gradients may be used up."""

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


class SummedGradients(RowGradients):
    """Gradients as tensors in the training layout. squares: the sum of the squares of `rows`, where it is known."""

    def __init__(self, sae: SAE, tensors: dict[str, Tensor], squares: float | None = None) -> None:
        super().__init__(sae)
        self._tensors, self.squares = tensors, squares

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return self._tensors

    def update(self, targets: Targets, rates: Rates, clip: float | None) -> tuple[dict[str, Tensor], float]:
        others = {name: grad for name, grad in self._tensors.items() if name not in self.rows}
        factor = 1.0 if clip is None else self._factor(others, targets, clip)
        grads = [self._tensors[name].numpy() for name in self.rows]
        state = targets.arrays(self.rows)

        def task(first: int, last: int) -> None:
            update_kernels().update_rows(first, last, *grads, factor, *state, targets.unit, *rates)

        share(task, self.sae.config.d_sae, CHUNK_FEATURES)
        return others, factor

    def _factor(self, others: Mapping[str, Tensor], targets: Targets, clip: float) -> float:
        squares = self.squares
        if squares is None or targets.unit:
            squares = sum(share(lambda i, j: self._squares(i, j, targets), self.sae.config.d_sae, CHUNK_FEATURES))
        squares += sum(square_sum(grad) for grad in others.values())
        return min(1.0, clip / (math.sqrt(squares) + TINY))

    def _squares(self, first: int, last: int, targets: Targets) -> float:
        run = [self._tensors[name][first:last] for name in self.rows]
        if targets.unit:
            remove_parallel(run[2], targets.tensors["W_dec"][first:last])
        return sum(square_sum(part) for part in run)


class PairGradients(RowGradients):
    """The gradients of a sparse step as its pairs, not yet summed, so that the optimiser can sum a feature's pairs just
    when it updates the feature.

    pairs: bounds, rows, values and dz, sorted by feature (see kernels.py). x (n, d_in) and residual (parts, n, d_out): both
    float32 or both bfloat16. scale: of residual, for dL/dx_hat. widths: where the parts end. others: the gradients of what
    has no row a feature, of b_dec the decoder's part. features, extra: some features, and the gradients to add to theirs.
    """

    def __init__(
        self,
        sae: SAE,
        pairs: tuple[Tensor, ...],
        x: Tensor,
        residual: Tensor,
        scale: float,
        widths: list[int],
        others: Mapping[str, Tensor],
        features: Tensor,
        extra: Mapping[str, Tensor],
        scratch: Scratch,
    ) -> None:
        super().__init__(sae)
        self.pairs, self.x, self.residual, self.scale, self.others = pairs, x, residual, scale, others
        self.widths, self.features, self.extra, self.scratch = widths, features, extra, scratch

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return self._sums

    @cached_property
    def _sums(self) -> Mapping[str, Tensor]:
        return self._summed(Scratch(), self.sae.W_enc.detach().t().contiguous(), unit=False).tensors

    def _summed(self, scratch: Scratch, W_enc: Tensor, unit: bool) -> SummedGradients:
        """The sums, in the scratch memory."""
        shapes = self._shapes(self.sae.config.d_sae)
        grads = {name: scratch(f"d{name}", *shape) for name, shape in shapes.items()}
        weights = [W_enc.numpy(), self.sae.W_dec.detach().numpy()]
        inputs, into = self._inputs(), [tensor.numpy() for tensor in grads.values()]

        def task(first: int, last: int) -> tuple[float, Tensor]:
            through = torch.empty(self.sae.config.d_in)
            squares = update_kernels().sum_features(first, last, *inputs, *weights, unit, *into, through.numpy())
            return squares, through

        squares, through = zip(*share(task, self.sae.config.d_sae, CHUNK_FEATURES), strict=True)
        return SummedGradients(self.sae, grads | self._others(through), sum(squares))

    def _shapes(self, features: int) -> dict[str, tuple[int, ...]]:
        """Of the gradients of so many features."""
        d_in, d_out = self.sae.config.d_in, self.sae.config.d_out
        return {"W_enc": (features, d_in), self.bias: (features,), "W_dec": (features, d_out)}

    def _inputs(self) -> tuple[Any, ...]:
        place = torch.full((self.sae.config.d_sae,), -1, dtype=torch.int32)
        if self.extra:
            place[self.features] = torch.arange(len(self.features), dtype=torch.int32)
        extra = self.extra or {name: torch.empty(shape) for name, shape in self._shapes(0).items()}
        return (
            *(part.numpy() for part in self.pairs),
            *as_both(self.x, self.residual),
            self.residual.dtype == torch.float32,
            self.scale,
            np.array(self.widths),
            place.numpy(),
            *(extra[name].contiguous().numpy() for name in self.rows),
        )

    def _others(self, through: Iterable[Tensor]) -> dict[str, Tensor]:
        """`others`, with what reaches b_dec through the encoder's input."""
        if not self.sae.config.apply_b_dec_to_input:
            return {**self.others}
        return {**self.others, "b_dec": self.others["b_dec"] - torch.stack([*through]).sum(0)}

    def update(self, targets: Targets, rates: Rates, clip: float | None) -> tuple[dict[str, Tensor], float]:
        if clip is not None:
            summed = self._summed(self.scratch, targets.tensors["W_enc"], targets.unit)
            return summed.update(targets, rates, clip)
        inputs, state = self._inputs(), targets.arrays(self.rows)

        def task(first: int, last: int) -> Tensor:
            through = torch.empty(self.sae.config.d_in)
            update_kernels().update_features(first, last, *inputs, *state, targets.unit, *rates, through.numpy())
            return through

        return self._others(share(task, self.sae.config.d_sae, CHUNK_FEATURES)), 1.0


def square_sum(tensor: Tensor) -> float:
    """The sum of the squares, in a fixed order: torch's own depends on the number of threads."""
    return float(update_kernels().square_sum(tensor.contiguous().view(-1).numpy()))


def remove_parallel(grad: Tensor, W_dec: Tensor) -> Tensor:
    """grad_i -= (grad_i . w_i) w_i for rows w_i of norm 1, in place; both (d_sae, d_out)."""
    return grad.addcmul_(torch.linalg.vecdot(grad, W_dec).unsqueeze(1), W_dec, value=-1)
