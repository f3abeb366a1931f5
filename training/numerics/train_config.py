"""How an SAE is trained: one frozen record, the same for a notebook, a job and a checkpoint."""

import math
from dataclasses import dataclass

from training.numerics.checkpoint import TrainingError
from training.numerics.hints import usual_rate
from training.numerics.initial import INITIALIZATIONS
from training.numerics.optim import ramp

PRECISIONS = ("fast", "float32", "bfloat16")
ALWAYS = 1e-3  # a bound below every gradient's norm
# Measured against SAELens (held-out FVU after 65k tokens, layer 9 of SmolLM2-135M): see docs/decisions.md.
KINDS_OF_TOPK = ("topk", "topk_transcoder", "topk_skip_transcoder")
DECODERS = dict.fromkeys(KINDS_OF_TOPK, "unit")  # the rest is "free"
CLIPS = dict.fromkeys(KINDS_OF_TOPK, 0.0)  # the rest is ALWAYS


@dataclass(frozen=True)
class TrainConfig:
    """How an SAE is trained (what it is, d_sae and k included, is its SAEConfig).

    n_tokens: rows to train on, in batches of batch_size; `steps`, when given, is used instead.
    lr: peak learning rate of Adam; None means 1e-3 / sqrt(d_sae / 2^14): the scaling of Gao et al. 2024 with a larger
        constant than theirs (2e-4), which suits runs of 0.1 to 10 million tokens. Measured on 524k tokens, TopK 4,608,
        held-out FVU: 0.147 with lr 1e-3, 0.125 with 2e-3 (the default there is 1.9e-3), 0.116 with 4e-3 but four times
        as many features silent on the held-out tokens.
    lr_warmup, lr_decay: shares of the steps in which the rate rises from 0 and falls back to 0, linearly.
    l1_coefficient, l1_warmup: ReLU only; the penalty's weight (for activations of mean norm sqrt(d_in)) and the share
        of the steps in which it rises from 0. Measured on the same tokens: 1 gives L0 219 and FVU 0.165, 2 gives 37 and
        0.326; activations with a larger mean, for their spread, want a smaller one. Gated uses both as well.
    l0_coefficient: JumpReLU only; weight of its L0 penalty, rising over l1_warmup too. target_l0: with it the penalty
        is quadratic around that L0. bandwidth: see losses.Terms. (Names and defaults of SAELens.)
    aux_coefficient: weight of the dead features' term. dead_after_tokens: a feature is dead after so many tokens
        without firing; None means a quarter of the run, at most 10 million (the usual number). Much less takes rare
        features for dead ones: the term then keeps them from firing.
    decoder: "unit" keeps decoder rows at norm 1, "free" lets them learn their norms, which are folded into the encoder at
        the end (SAELens). None: by DECODERS.
    initialization: None keeps the weights the SAE has (see build_sae); "saelens", "sparsify" or "dictionary_learning" begin
        as that peer does (see initial.begin), SAELens' with decoder rows that learn their norms.
    clip: bound on the norm of the gradient, 0 for none; None: by CLIPS. A bound that every gradient exceeds, as SAELens'
        1.0 does on sums of squares, gives each step the same weight in Adam's averages: without it the large gradients
        of the first steps keep later ones small.
    precision: of products: "fast" (see optim.matmul_precision), "float32", or "bfloat16", which where no kernels are (on a
        GPU, for transcoders, without numba) goes through torch.autocast and else is "fast".
    seed: of the first weights, and of the order of the rows (see `capture_batches`) unless `order_seed` is given: SAEs
        that share one stream have one order and seeds of their own. The loop itself draws no random numbers.
    log_every, checkpoint_every: in steps.
    """

    n_tokens: int = 1_000_000
    steps: int | None = None
    batch_size: int = 2048
    lr: float | None = None
    lr_warmup: float = 0.02
    lr_decay: float = 0.2
    betas: tuple[float, float] = (0.9, 0.999)
    decoder: str | None = None
    initialization: str | None = None
    l1_coefficient: float = 2.0
    l1_warmup: float = 0.05
    l0_coefficient: float = 1.0
    target_l0: float | None = None
    bandwidth: float = 0.05
    aux_coefficient: float = 1 / 32
    dead_after_tokens: int | None = None
    clip: float | None = None
    precision: str = "fast"
    seed: int = 0
    order_seed: int | None = None
    log_every: int = 20
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        for name in ("n_tokens", "steps", "batch_size", "dead_after_tokens", "log_every", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise TrainingError(f"{name} is {value}; it must be at least 1.")
        for name in ("lr", "l1_coefficient", "l0_coefficient", "aux_coefficient", "clip"):
            value = getattr(self, name)
            if value is not None and not (0 <= value < math.inf):
                raise TrainingError(f"{name} is {value}; it must be a number of at least 0.")
        for name in ("target_l0", "bandwidth"):
            value = getattr(self, name)
            if value is not None and not (0 < value < math.inf):
                raise TrainingError(f"{name} is {value}; it must be a number above 0.")
        for name in ("lr_warmup", "lr_decay", "l1_warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise TrainingError(f"{name} is {getattr(self, name)}; it is a share of the steps, from 0 to 1.")
        if self.decoder not in (None, "unit", "free"):
            raise TrainingError(f'decoder is "{self.decoder}"; choose "unit" or "free".')
        if self.initialization not in (None, *INITIALIZATIONS):
            raise TrainingError(
                f'initialization is "{self.initialization}"; choose one of {", ".join(INITIALIZATIONS)}, or none.'
            )
        if self.initialization == "saelens" and self.decoder == "unit":
            raise TrainingError(
                "SAELens begins with decoder rows of norm 0.1, which the first step would undo when they are kept at norm 1;"
                " choose free decoder rows, or another initialization."
            )
        if self.precision not in PRECISIONS:
            raise TrainingError(f'precision is "{self.precision}"; choose {", ".join(PRECISIONS)}.')
        object.__setattr__(self, "betas", tuple(self.betas))

    @property
    def total_steps(self) -> int:
        return self.steps or math.ceil(self.n_tokens / self.batch_size)

    @property
    def total_rows(self) -> int:
        return self.steps * self.batch_size if self.steps else self.n_tokens

    def lr_at(self, step: int, d_sae: int) -> float:
        peak = self.lr if self.lr is not None else usual_rate(d_sae)
        return peak * ramp(step, self.total_steps, self.lr_warmup, self.lr_decay)

    @property
    def order(self) -> int:
        """The seed of the order of the rows."""
        return self.seed if self.order_seed is None else self.order_seed

    def unit_decoder(self, architecture: str) -> bool:
        """Whether decoder rows are kept at norm 1."""
        own = "free" if self.initialization == "saelens" else DECODERS.get(architecture, "free")
        return (self.decoder or own) == "unit"

    def clip_of(self, architecture: str) -> float | None:
        """The bound on the gradient's norm, or None for none."""
        bound = CLIPS.get(architecture, ALWAYS) if self.clip is None else self.clip
        return bound or None

    @property
    def dead_after(self) -> int:
        return self.dead_after_tokens or min(10_000_000, max(self.total_rows // 4, self.batch_size))
