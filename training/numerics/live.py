"""What is measured while an SAE trains: a look at held-out rows, and the memory in use."""

import psutil
import torch
from torch import Tensor

from saes.numerics.sae import SAE
from training.numerics.reconstruction import ExplainedVariance, blocks
from training.numerics.transcoding import sides


@torch.no_grad()
def look(sae: SAE, x: Tensor) -> dict[str, float]:
    """How well rows x (n, d_in), of a transcoder (n, d_in + d_out), are reconstructed or predicted:
    "explained_variance" and "cosine" as definitions.DEFINITIONS has them, and

        explained_variance_per_dimension = mean over d of 1 - E(x_d - x_hat_d)^2 / Var(x_d)

    which no single dimension of large variance can rule. Sums are in float64; dimensions that never vary are left out.
    """
    running, cosines = ExplainedVariance(), 0.0
    sums = torch.zeros(3, sae.config.d_out, dtype=torch.float64, device=sae.W_dec.device)
    for rows in blocks(sae, x):
        given, part = sides(sae, rows)
        x_hat = sae(given)
        running.add(part, x_hat)
        wide, error = part.double(), (part - x_hat).double()
        sums += torch.stack([wide.sum(0), wide.square().sum(0), error.square().sum(0)])
        cosines += float(torch.cosine_similarity(part, x_hat, dim=-1).double().sum())
    mean, square, error = sums / len(x)
    spread = square - mean.square()
    varies = spread > 1e-12 * square
    each = 1 - error[varies] / spread[varies]
    return {
        "explained_variance": running.value,
        "explained_variance_per_dimension": float(each.mean()) if len(each) else float("nan"),
        "cosine": cosines / len(x),
    }


def memory_used(device: torch.device) -> int:
    """Bytes: of a GPU the most that was allocated since the process began, else what of this process is resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)
