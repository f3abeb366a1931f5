"""What training a transcoder needs beside what any SAE does: its goal beside its input, and units for either of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from saes.numerics.sae import SAE
from saes.numerics.transcoders import Skip
from training.numerics.checkpoint import TrainingError


def sides(sae: SAE, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(x, goal) of training rows: what the SAE reads and what its x_hat is to be.

    Of a transcoder rows are (n, d_in + d_out), the activations of the same tokens at its two hook points side by side;
    any other SAE is to reconstruct its input: (n, d_in), and both are the rows themselves.
    """
    if sae.reconstructs:
        return rows, rows
    x, goal = rows.split([sae.config.d_in, sae.config.d_out], dim=-1)
    return x, goal


def codes_goal(sae: SAE, rows: Tensor) -> Tensor:
    """What the codes of training rows are to make with b_dec, (n, d_out): the goal, less what a skip makes of x."""
    x, goal = sides(sae, rows)
    return goal - F.linear(x, sae.W_skip.detach()) if isinstance(sae, Skip) else goal


def row_width(sae: SAE) -> int:
    """Numbers in a training row."""
    return sae.config.d_in if sae.reconstructs else sae.config.d_in + sae.config.d_out


@dataclass(frozen=True)
class Units:
    """The space a transcoder is trained in; its two hook points may differ in scale by orders of magnitude.

        x' = (x - mean) / scale;   goal' = goal / scale_out

    mean (d_in,); scale and scale_out (): the root of the variance per dimension of the first batch's x and goal, so that
    a squared error in this space is in units of the goal's variance per dimension, and coefficients of penalties mean
    what they mean for an SAE. The mean of goal is b_dec's, which begins there. `fold` puts all three into the weights.
    """

    mean: Tensor
    scale: Tensor
    scale_out: Tensor

    @classmethod
    def of(cls, sae: SAE, rows: Tensor) -> Units:
        """Measured on a batch (n, d_in + d_out). Raises TrainingError where a side does not vary or is not finite."""
        x, goal = sides(sae, rows)
        scales = [(side - side.mean(0)).square().mean().sqrt() for side in (x, goal)]
        if not all(0 < float(scale) < math.inf for scale in scales):
            raise TrainingError("The first batch has no variance, or is not finite; check the capture.")
        return cls(x.mean(0), *scales)

    def apply(self, sae: SAE, rows: Tensor) -> Tensor:
        """Rows (n, d_in + d_out) of the language model in this space."""
        x, goal = sides(sae, rows)
        return torch.cat([(x - self.mean) / self.scale, goal / self.scale_out], dim=-1)

    @torch.no_grad()
    def fold(self, sae: SAE) -> None:
        """A transcoder of this space to the same one of the language model's own, in place.

        z stays as it is: W_enc / scale, b_enc - mean @ W_enc / scale. Of the output: W_dec and b_dec times scale_out,
        W_skip scale_out / scale, and b_dec less what W_skip makes of the mean.
        """
        sae.W_enc.div_(self.scale)
        sae.b_enc.sub_(self.mean @ sae.W_enc)
        sae.W_dec.mul_(self.scale_out)
        sae.b_dec.mul_(self.scale_out)
        if isinstance(sae, Skip):
            sae.W_skip.mul_(self.scale_out / self.scale)
            sae.b_dec.sub_(sae.W_skip @ self.mean)

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return {f"units.{name}": tensor for name, tensor in vars(self).items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], device: torch.device) -> Units | None:
        """What `tensors` returned; None where the checkpoint has none."""
        if "units.mean" not in tensors:
            return None
        return cls(*(tensors[f"units.{name}"].to(device) for name in cls.__dataclass_fields__))
