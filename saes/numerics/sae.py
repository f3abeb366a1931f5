"""What every sparse autoencoder is: a config, four tensors in one orientation, and the way from x to codes and back."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

LAYER_NORM_EPS = 1e-5  # SAELens' constant: added to the standard deviation on the way in, not on the way out

# How x is scaled before it is encoded. The last two were folded into the weights when training ended, so at run time
# they are the identity; the word is kept because it says how the tensors came to be.
PER_ROW_NORMALIZATIONS = ("constant_norm_rescale", "layer_norm")
NORMALIZATIONS = ("none", *PER_ROW_NORMALIZATIONS, "expected_average_only_in", "covariance_whitening")


class SAEError(ValueError):
    """An SAE that cannot be, or an input it cannot take. The message is one sentence for a person."""


@dataclass(frozen=True)
class SAEConfig:
    """Everything about an SAE that is not a tensor.

    `d_out` None means `d_in` and is filled in, so it always reads as a number. `k` is TopK's number of features kept
    per row. `options` are the architecture's own settings, by the names its class gives them. `metadata` is whatever
    else a file carried and is written back when saving. The dtype is not here: the tensors know it.

    Raises SAEError when a size is not a positive whole number, when b_dec is to be subtracted from inputs of another
    width, or when the normalisation is not one of NORMALIZATIONS.
    """

    architecture: str
    d_in: int
    d_sae: int
    hook_name: str = ""
    model_name: str = ""
    d_out: int = None  # type: ignore[assignment]  # replaced below, so that every reader gets an int
    apply_b_dec_to_input: bool = True
    normalize_activations: str = "none"
    k: Any = None  # a whole number; BatchTopK's may be a fraction
    hook_name_out: str = ""  # of a transcoder: what it predicts
    options: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.d_out is None:
            object.__setattr__(self, "d_out", self.d_in)
        for name in ("d_in", "d_sae", "d_out"):
            require_positive_int(name, getattr(self, name))
        if self.apply_b_dec_to_input and self.d_out != self.d_in:
            raise SAEError("apply_b_dec_to_input needs d_out to equal d_in; an SAE with another target cannot have it.")
        if self.normalize_activations not in NORMALIZATIONS:
            raise SAEError(
                f"normalize_activations is {self.normalize_activations!r}, which is not known; "
                f"it must be one of {', '.join(NORMALIZATIONS)}."
            )

    def with_(self, **changes: Any) -> Self:
        """A copy with some fields changed, checked again."""
        return replace(self, **changes)


class SAE(nn.Module):
    """The common frame of all architectures.

        x'    = normalise(x)                                     (n, d_in)
        z     = (x' - [b_dec]) @ W_enc + b_enc                   (n, d_sae)   pre_activations
        acts  = activation(z)                                    (n, d_sae)   encode; each architecture's own
        x_hat = denormalise(acts @ W_dec + b_dec)                (n, d_out)   decode

    b_dec is subtracted only with `apply_b_dec_to_input`. x and x_hat are in the language model's own activation space.
    Inputs may have any number of leading dimensions, are converted to the dtype of the weights, and results keep it.

    Where the normalisation depends on the row (`layer_norm`, `constant_norm_rescale`) the way back needs x as well:
    `decode(acts, x)`. `forward` does this by itself.
    """

    architecture: ClassVar[str]
    reconstructs: ClassVar[bool] = True  # x_hat is of the hook point that x is from
    row_by_row: ClassVar[bool] = True  # a row's codes do not depend on the other rows
    log_sparsity: Tensor | None = None  # log10 of how often each feature fired (d_sae,), where the files said it
    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter

    def __init__(
        self, config: SAEConfig, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        """All tensors zero: `build_sae` initialises them for training, a format module fills them from a file."""
        super().__init__()
        if config.architecture != self.architecture:
            raise SAEError(f"A {self.architecture} SAE cannot have a config of architecture {config.architecture!r}.")
        self.config = config
        for name, shape in self.parameter_shapes(config).items():
            self._put(name, nn.Parameter(torch.zeros(shape, device=device, dtype=dtype)))

    def _put(self, name: str, tensor: nn.Parameter) -> None:
        """Register a parameter; a dotted name, as files have it, goes into modules made for it."""
        *path, leaf = name.split(".")
        place: nn.Module = self
        for part in path:
            if part not in place._modules:
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        place.register_parameter(leaf, tensor)

    def tensor(self, name: str) -> Tensor:
        """A parameter by the name that `parameter_shapes` gives it."""
        return self.get_parameter(name)

    @classmethod
    def parameter_shapes(cls, config: SAEConfig) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor; what a file of weights is held against before anything is built."""
        glu = {"W_gate": (config.d_in, config.d_sae), "b_gate": (config.d_sae,)} if config.options.get("glu") else {}
        return {
            "W_enc": (config.d_in, config.d_sae),
            "b_enc": (config.d_sae,),
            "W_dec": (config.d_sae, config.d_out),
            "b_dec": (config.d_out,),
        } | glu

    def pre_activations(self, x: Tensor) -> Tensor:
        """z (n, d_sae) of x (n, d_in). Raises SAEError when x has another width."""
        x = self.encoder_input(x)
        z = x @ self.W_enc + self.b_enc
        return z * (x @ self.tensor("W_gate") + self.tensor("b_gate")).sigmoid() if self.glu else z

    def encoder_input(self, x: Tensor) -> Tensor:
        """x' - [b_dec] (n, d_in): what W_enc is multiplied with."""
        x = self.normalise(x)
        return x - self.b_dec if self.config.apply_b_dec_to_input else x

    @property
    def glu(self) -> bool:
        """Option `glu` (OpenMOSS): z is multiplied by sigmoid(x' @ W_gate + b_gate)."""
        return bool(self.config.options.get("glu"))

    def activation(self, z: Tensor) -> Tensor:
        """Codes (n, d_sae) of pre-activations (n, d_sae)."""
        raise NotImplementedError

    def encode(self, x: Tensor) -> Tensor:
        """Dense codes (n, d_sae) of x (n, d_in)."""
        return self.activation(self.pre_activations(x))

    def decode(self, acts: Tensor, x: Tensor | None = None) -> Tensor:
        """x_hat (n, d_out) of dense codes (n, d_sae). `x` (n, d_in) is needed only by per-row normalisations."""
        return self.denormalise(acts @ self.W_dec + self.b_dec, x)

    def forward(self, x: Tensor) -> Tensor:
        """x_hat (n, d_out) of x (n, d_in)."""
        return self.decode(self.encode(x), x)

    def encode_sparse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The codes that fire, as (values (n, m), indices (n, m) int64), largest first.

        m is the largest L0 of the batch; a slot left over holds value 0 and index 0. Largest means by magnitude, for the
        SAEs whose codes may be negative.
        """
        acts = self.encode(x)
        m = int((acts != 0).sum(-1).max()) if acts.numel() else 0
        indices = acts.abs().topk(m, dim=-1).indices
        return blank_zeros(acts.gather(-1, indices), indices)

    def decode_sparse(self, values: Tensor, indices: Tensor, x: Tensor | None = None) -> Tensor:
        """`decode` of codes in the form `encode_sparse` returns; reads only the W_dec rows that are named."""
        m = values.shape[-1]
        if m == 0:
            sums = self.b_dec.new_zeros(*values.shape[:-1], self.config.d_out)
        else:
            flat = embedding_bag(
                indices.reshape(-1, m), self.W_dec, per_sample_weights=values.reshape(-1, m), mode="sum"
            )
            sums = flat.view(*values.shape[:-1], self.config.d_out)
        return self.denormalise(sums + self.b_dec, x)

    def normalise(self, x: Tensor) -> Tensor:
        """x (n, d_in) of the language model -> x' (n, d_in) that the encoder reads.

        constant_norm_rescale: x * sqrt(d_in) / |x|.  layer_norm: (x - mean) / (std + 1e-5), std with n - 1.
        (Definitions of SAELens 6, which names them.)
        """
        if x.shape[-1] != self.config.d_in:
            raise SAEError(
                f"This SAE reads vectors of {self.config.d_in} numbers, but was given vectors of {x.shape[-1]}; "
                "take activations from the model and hook point it was trained on."
            )
        x = x.to(self.W_dec.dtype)
        if self.config.normalize_activations not in PER_ROW_NORMALIZATIONS:
            return x
        shift, scale = self._row_statistics(x)
        return (x - shift) / (scale + LAYER_NORM_EPS if self._is_layer_norm else scale)

    def denormalise(self, y: Tensor, x: Tensor | None) -> Tensor:
        """Undo `normalise` on a reconstruction y (n, d_out), with the statistics of the rows of x (n, d_in)."""
        if self.config.normalize_activations not in PER_ROW_NORMALIZATIONS:
            return y
        shift, scale = self._row_statistics(self._required(x))
        return y * scale + shift

    def decoder_scale(self, x: Tensor) -> Tensor | None:
        """By what (n, 1) a unit of a code enters the output of each row of x (n, d_in), or None where it is 1.

        A change dz of code i moves x_hat by `dz * decoder_scale * W_dec[i]`; an edit must use this, not W_dec alone.
        """
        if self.config.normalize_activations not in PER_ROW_NORMALIZATIONS:
            return None
        return self._row_statistics(x.to(self.W_dec.dtype))[1]

    @property
    def _is_layer_norm(self) -> bool:
        return self.config.normalize_activations == "layer_norm"

    def _required(self, x: Tensor | None) -> Tensor:
        if x is None:
            raise SAEError(
                "What this SAE decodes depends on x as well as on the codes (it normalises rows, skips or predicts): "
                "call decode(acts, x)."
            )
        return x.to(self.W_dec.dtype)

    def _row_statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(shift, scale), each (n, 1), of the per-row normalisations."""
        if self._is_layer_norm:
            return x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        norm = x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)  # a zero row stays zero, not NaN
        return torch.zeros_like(norm), norm / self.config.d_in**0.5


def encodes_as(sae: SAE, kind: type[SAE]) -> bool:
    """Whether this SAE, a transcoder perhaps, has the plain encoder of that class: activation(x' @ W_enc + b_enc)."""
    names = ("encode", "pre_activations", "encoder_input", "activation")
    return not sae.glu and all(getattr(type(sae), name) is getattr(kind, name) for name in names)


def blank_zeros(values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Give slots that do not fire (value 0) the index 0, so that they never name a feature."""
    return values, torch.where(values != 0, indices, 0)


def require_positive_int(name: str, value: object) -> None:
    """Raise SAEError unless `value` is a whole number of at least 1 (True is not a number here)."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SAEError(f"{name} must be a whole number of at least 1, but is {value!r}.")
