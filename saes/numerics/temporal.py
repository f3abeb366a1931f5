"""Temporal SAE: attention over the codes of earlier positions predicts what it can, the rest is coded sparsely."""

from math import isfinite

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from saes.numerics.sae import SAE, SAEConfig, SAEError, require_positive_int
from saes.numerics.topk import keep_topk

PROJECTION_EPS = 1e-6


class TemporalSAE(SAE):
    """Reads sequences: x (..., positions, d_in), in order. With s the scale, lam = 1 / (4 d_in), E = W_enc or W_dec.T:

        r = s * x - [b_dec]
        for each attention layer:
            c    = relu(lam * r @ E)                                  codes of what is left
            p    = relu(attention(keys and values: c one position back, queries: c))
            a    = <p @ W_dec, r> / (|p @ W_dec| + 1e-6)^2
            pred += a * p;    r -= a * (p @ W_dec)
        acts  = topk(relu(lam * r @ E))        encode: the novel codes
        x_hat = ((acts + pred) @ W_dec + b_dec) / s

    Decoding needs x as well, because the predicted codes do: `decode(acts, x)`. Options: `n_heads`, `n_attn_layers`,
    `bottleneck_factor`, `sae_diff_type` (topk or relu), `kval_topk`, `tied_weights`, `activation_normalization_factor`
    (s). (Definition and names of SAELens 6.) Raises SAEError for options that do not fit together.
    """

    architecture = "temporal"
    row_by_row = False

    def __init__(
        self, config: SAEConfig, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(config, device=device, dtype=dtype)
        self.n_heads, self.n_layers, _width = _sizes(config)
        self.scale = config.options.get("activation_normalization_factor", 1.0)
        if isinstance(self.scale, bool) or not isinstance(self.scale, int | float) or not isfinite(self.scale):
            raise SAEError(f"activation_normalization_factor must be a number, but is {self.scale!r}.")
        if self.scale <= 0:
            raise SAEError(f"activation_normalization_factor must be above 0, but is {self.scale!r}.")
        self.tied = config.options.get("tied_weights", True)
        kind, self.kval = config.options.get("sae_diff_type", "topk"), config.options.get("kval_topk")
        if kind not in ("topk", "relu"):
            raise SAEError(f"sae_diff_type must be topk or relu, but is {kind!r}.")
        if kind == "relu":
            self.kval = None
        elif self.kval is not None:
            require_positive_int("kval_topk", self.kval)
            if self.kval > config.d_sae:
                raise SAEError(f"kval_topk is {self.kval}, but this SAE has only {config.d_sae} features (d_sae).")

    @classmethod
    def parameter_shapes(cls, config: SAEConfig) -> dict[str, tuple[int, ...]]:
        """Names with a dot become underscores in the module and dots again in its state."""
        _, n_layers, width = _sizes(config)
        d = config.d_sae
        shapes: dict[str, tuple[int, ...]] = {"W_dec": (d, config.d_in), "b_dec": (config.d_in,)}
        if not config.options.get("tied_weights", True):
            shapes["W_enc"] = (config.d_in, d)
        for layer in range(n_layers):
            for name, rows in (("k_ctx", width), ("q_target", width), ("v_ctx", d), ("c_proj", d)):
                shapes |= {
                    f"attn_layers.{layer}.{name}.weight": (rows, d),
                    f"attn_layers.{layer}.{name}.bias": (rows,),
                }
        return shapes

    def pre_activations(self, x: Tensor) -> Tensor:
        return self._split(x)[0]

    def encode(self, x: Tensor) -> Tensor:
        """Novel codes (..., positions, d_sae)."""
        return self.activation(self.pre_activations(x))

    def activation(self, z: Tensor) -> Tensor:
        return z.relu() if self.kval is None else keep_topk(z, self.kval)

    def predicted(self, x: Tensor) -> Tensor:
        """The codes (..., positions, d_sae) that earlier positions predict."""
        return self._split(x)[1]

    def decode(self, acts: Tensor, x: Tensor | None = None) -> Tensor:
        codes = acts + self.predicted(self._required(x))
        x_hat = codes @ self.W_dec
        if not self.tied or self.config.apply_b_dec_to_input:
            x_hat = x_hat + self.b_dec
        return self.denormalise(x_hat / self.scale, x)

    def decode_sparse(self, values: Tensor, indices: Tensor, x: Tensor | None = None) -> Tensor:
        acts = values.new_zeros(*values.shape[:-1], self.config.d_sae).scatter_add(-1, indices, values)
        return self.decode(acts, x)

    def normalise(self, x: Tensor) -> Tensor:
        return super().normalise(x) * self.scale

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(z, pred) (..., positions, d_sae): pre-activations of the novel part, and the predicted codes."""
        rest = self.encoder_input(x)
        if rest.dim() < 2:
            raise SAEError("A temporal SAE reads whole sequences: x needs the shape (positions, d_in).")
        encoder = self.W_dec.t() if self.tied else self.W_enc
        lam = 1 / (4 * self.config.d_in)
        predicted = rest.new_zeros(*rest.shape[:-1], self.config.d_sae)
        for layer in range(self.n_layers):
            codes = ((rest * lam) @ encoder).relu()
            p = self._attention(layer, codes).relu()
            direction = p @ self.W_dec
            norm = direction.norm(dim=-1, keepdim=True) + PROJECTION_EPS
            share = (direction * rest).sum(-1, keepdim=True) / norm.pow(2)
            predicted = predicted + p * share
            rest = rest - share * direction
        return (rest * lam) @ encoder, predicted

    def _attention(self, layer: int, codes: Tensor) -> Tensor:
        earlier = torch.cat([torch.zeros_like(codes[..., :1, :]), codes[..., :-1, :]], dim=-2)
        query = self._heads(self._linear(layer, "q_target", codes))
        key, value = (self._heads(self._linear(layer, name, earlier)) for name in ("k_ctx", "v_ctx"))
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
        return self._linear(layer, "c_proj", mixed.transpose(-3, -2).flatten(-2))

    def _linear(self, layer: int, name: str, x: Tensor) -> Tensor:
        stem = f"attn_layers.{layer}.{name}"
        return linear(x, self.tensor(f"{stem}.weight"), self.tensor(f"{stem}.bias"))

    def _heads(self, x: Tensor) -> Tensor:
        """(..., positions, d) -> (..., heads, positions, d / heads)."""
        return x.unflatten(-1, (self.n_heads, -1)).transpose(-3, -2)


def _sizes(config: SAEConfig) -> tuple[int, int, int]:
    """(heads, attention layers, width of keys and queries). Raises SAEError."""
    options = config.options
    heads, layers, factor = (
        options.get(name, default)
        for name, default in (("n_heads", 8), ("n_attn_layers", 1), ("bottleneck_factor", 64))
    )
    for name, value in (("n_heads", heads), ("n_attn_layers", layers), ("bottleneck_factor", factor)):
        require_positive_int(name, value)
    if layers > 64:
        raise SAEError(f"n_attn_layers is {layers}, which no temporal SAE has.")
    if config.d_sae % (heads * factor):
        raise SAEError(
            f"d_sae ({config.d_sae}) must be a multiple of n_heads x bottleneck_factor ({heads} x {factor})."
        )
    return heads, layers, config.d_sae // factor
