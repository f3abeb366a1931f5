"""SAEs of several hook points at once. x, and x_hat, are the hook points' vectors side by side: (n, hooks * d)."""

from typing import Any

import torch
from torch import Tensor

from saes.numerics.sae import SAE, SAEConfig, SAEError, require_positive_int
from saes.numerics.topk import checked_k, keep_topk

ACTIVATIONS = ("relu", "jumprelu", "topk")


class SeveralHooks(SAE):
    """Base: the sizes, and an activation that is one of relu, jumprelu and topk (option `activation`).

    Option `hooks`: over how many hook points d_in is divided. Raises SAEError when it does not divide.
    """

    reconstructs = False

    def __init__(
        self, config: SAEConfig, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(config, device=device, dtype=dtype)
        self.hooks, self.d = hooks_and_width(config)
        self.kind = config.options.get("activation", "relu")
        if self.kind not in ACTIVATIONS:
            raise SAEError(f"The activation of several hook points is one of {', '.join(ACTIVATIONS)}.")
        self.k = checked_k(config) if self.kind == "topk" else None

    def activation(self, z: Tensor) -> Tensor:
        if self.k is not None:
            return keep_topk(z, self.k)
        return z.relu() * (z > self.tensor("threshold")) if self.kind == "jumprelu" else z.relu()

    def decode_sparse(self, values: Tensor, indices: Tensor, x: Tensor | None = None) -> Tensor:
        acts = values.new_zeros(*values.shape[:-1], self.config.d_sae).scatter_add(-1, indices, values)
        return self.decode(acts, x)

    def _apart(self, x: Tensor) -> Tensor:
        """(..., hooks * d) -> (..., hooks, d)."""
        return self.normalise(x).unflatten(-1, (self.hooks, self.d))


def hooks_and_width(config: SAEConfig) -> tuple[int, int]:
    """(how many hook points, width of one). Raises SAEError."""
    hooks: Any = config.options.get("hooks")
    require_positive_int("hooks", hooks)
    if config.d_in % hooks or config.d_out != config.d_in:
        raise SAEError(f"d_in ({config.d_in}) and d_out ({config.d_out}) must be the same multiple of hooks ({hooks}).")
    return hooks, config.d_in // hooks


def features_of_one(config: SAEConfig, hooks: int) -> int:
    """How many features read each hook point, where each reads one. Raises SAEError."""
    if config.d_sae % hooks:
        raise SAEError(f"d_sae ({config.d_sae}) must be a multiple of the number of layers ({hooks}).")
    return config.d_sae // hooks


class Crosscoder(SeveralHooks):
    """One set of features read from and written to several hook points (Lindsey et al. 2024).

        z     = sum over h of x_h @ W_enc[h] + b_enc[h]                  (n, d_sae)
        f_h   = activation(z * n_h) / n_h,  n_h = |W_dec[h] rows|        with option `by_decoder_norm`, else n_h = 1
        y_h   = f_h @ W_dec[h] + b_dec[h]

    W_enc (hooks, d, d_sae), b_enc (hooks, d_sae), W_dec (hooks, d_sae, d), b_dec (hooks, d), threshold (hooks, d_sae).
    `encode` gives the codes of the first hook point; `forward` uses each hook point's own, as `decode` does when given x.
    """

    architecture = "crosscoder"

    @classmethod
    def parameter_shapes(cls, config: SAEConfig) -> dict[str, tuple[int, ...]]:
        hooks, d = hooks_and_width(config)
        shapes = {
            "W_enc": (hooks, d, config.d_sae),
            "b_enc": (hooks, config.d_sae),
            "W_dec": (hooks, config.d_sae, d),
            "b_dec": (hooks, d),
        }
        return shapes | ({"threshold": (hooks, config.d_sae)} if config.options.get("activation") == "jumprelu" else {})

    def pre_activations(self, x: Tensor) -> Tensor:
        return torch.einsum("...hd,hds->...s", self._apart(x), self.W_enc) + self.b_enc.sum(0)

    def encode_hooks(self, x: Tensor) -> Tensor:
        """Codes (..., hooks, d_sae) of each hook point."""
        z = self.pre_activations(x)[..., None, :]
        if not self.config.options.get("by_decoder_norm", False):
            return self.activation(z.expand(*z.shape[:-2], self.hooks, -1))
        norms = self.W_dec.norm(dim=-1)
        return self.activation(z * norms) / norms.clamp_min(torch.finfo(norms.dtype).tiny)

    def encode(self, x: Tensor) -> Tensor:
        return self.encode_hooks(x)[..., 0, :]

    def decode(self, acts: Tensor, x: Tensor | None = None) -> Tensor:
        codes = acts[..., None, :].expand(*acts.shape[:-1], self.hooks, -1) if x is None else self.encode_hooks(x)
        return (torch.einsum("...hs,hsd->...hd", codes, self.W_dec) + self.b_dec).flatten(-2)


class CausalCrosscoder(SeveralHooks):
    """Features that read one hook point and write to that one and later ones: a weakly causal crosscoder.

        f_l = activation(x_l @ W_enc[l] + b_enc[l])                      (n, m), m = d_sae / hooks
        y_t = sum over l of f_l @ W_dec[l, :, t] + b_dec[t]

    acts (n, hooks * m), hook point after hook point. W_enc (hooks, d, m), b_enc and threshold (hooks, m), b_dec (hooks, d);
    W_dec (hooks, m, hooks, d), whose parts for hook points before the one that is read are zero in a trained one.
    Raises SAEError for an activation topk, which nothing published has. Source: Gemma Scope 2's technical report, 2.6.
    """

    architecture = "causal_crosscoder"

    @classmethod
    def parameter_shapes(cls, config: SAEConfig) -> dict[str, tuple[int, ...]]:
        hooks, d = hooks_and_width(config)
        m = features_of_one(config, hooks)
        shapes = {"W_enc": (hooks, d, m), "b_enc": (hooks, m), "W_dec": (hooks, m, hooks, d), "b_dec": (hooks, d)}
        if config.options.get("activation") == "topk":
            raise SAEError("A crosscoder whose features read one hook point each cannot have the activation topk here.")
        return shapes | ({"threshold": (hooks, m)} if config.options.get("activation") == "jumprelu" else {})

    def pre_activations(self, x: Tensor) -> Tensor:
        return (torch.einsum("...hd,hdm->...hm", self._apart(x), self.W_enc) + self.b_enc).flatten(-2)

    def activation(self, z: Tensor) -> Tensor:
        return super().activation(z.unflatten(-1, (self.hooks, -1))).flatten(-2)

    def decode(self, acts: Tensor, x: Tensor | None = None) -> Tensor:
        codes = acts.unflatten(-1, (self.hooks, -1))
        return (torch.einsum("...lm,lmtd->...td", codes, self.W_dec) + self.b_dec).flatten(-2)


class CrossLayerTranscoder(SeveralHooks):
    """Features of every layer that write to that layer and all later ones (Ameisen et al. 2025).

        f_l = activation(x_l @ W_enc[l] + b_enc[l])                      (n, m), m = d_sae / hooks
        y_t = sum over l <= t of f_l @ W_dec[l -> t] + b_dec[t]

    With activation topk every layer keeps its own k largest.
    acts (n, hooks * m), layer after layer. W_enc (hooks, d, m), b_enc (hooks, m), b_dec (hooks, d); W_dec (pairs, m, d)
    holds the pairs l <= t in the order (0, 0), (0, 1), (1, 1), (0, 2), ...: by target layer, then by source.
    """

    architecture = "clt"

    @classmethod
    def parameter_shapes(cls, config: SAEConfig) -> dict[str, tuple[int, ...]]:
        hooks, d = hooks_and_width(config)
        m = features_of_one(config, hooks)
        shapes = {
            "W_enc": (hooks, d, m),
            "b_enc": (hooks, m),
            "W_dec": (hooks * (hooks + 1) // 2, m, d),
            "b_dec": (hooks, d),
        }
        return shapes | ({"threshold": (config.d_sae,)} if config.options.get("activation") == "jumprelu" else {})

    def pre_activations(self, x: Tensor) -> Tensor:
        return (torch.einsum("...hd,hdm->...hm", self._apart(x), self.W_enc) + self.b_enc).flatten(-2)

    def activation(self, z: Tensor) -> Tensor:
        if self.k is None:
            return super().activation(z)
        return keep_topk(z.unflatten(-1, (self.hooks, -1)), self.k).flatten(-2)

    def decode(self, acts: Tensor, x: Tensor | None = None) -> Tensor:
        layers = acts.unflatten(-1, (self.hooks, -1)).unbind(-2)
        decoders, out = iter(self.W_dec), []
        for target in range(self.hooks):
            out.append(sum((layers[source] @ next(decoders) for source in range(target + 1)), self.b_dec[target]))
        return torch.cat(out, -1)
