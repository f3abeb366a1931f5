"""Matching pursuit: features are taken one after the other, each from what the ones before left over."""

from math import isfinite

import torch
from torch import Tensor, nn

from saes.numerics.sae import SAE, SAEConfig, SAEError, require_positive_int


class MatchingPursuitSAE(SAE):
    """Tied to its decoder. From r = x' - [b_dec], repeat:

        i = argmax r @ W_dec.T;   v = relu(r . W_dec[i]);   acts[i] += v;   r -= v * W_dec[i]

    A row ends when its set of features stays the same (`stop_on_duplicate_support`), when |r| < `residual_threshold`
    (0: never), or after `max_iterations` (d_in unless said). b_dec is added back only where it was subtracted.
    (SAELens 6's options and rules.) Raises SAEError for options that are not what they should be.
    """

    architecture = "matching_pursuit"

    def __init__(
        self, config: SAEConfig, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(config, device=device, dtype=dtype)
        options = config.options
        limit = options.get("residual_threshold", 1e-2)
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not (isfinite(limit) and limit >= 0):
            raise SAEError(f"residual_threshold must be a number of at least 0, but is {limit!r}.")
        most = options.get("max_iterations") or config.d_in
        require_positive_int("max_iterations", most)
        stop = options.get("stop_on_duplicate_support", True)
        if not isinstance(stop, bool):
            raise SAEError(f"stop_on_duplicate_support must be true or false, but is {stop!r}.")
        self.residual_threshold, self.max_iterations, self.stop_on_duplicate_support = float(limit), int(most), stop

    @classmethod
    def parameter_shapes(cls, config: SAEConfig) -> dict[str, tuple[int, ...]]:
        return {"W_dec": (config.d_sae, config.d_out), "b_dec": (config.d_out,)}

    @property
    def W_enc(self) -> nn.Parameter:  # type: ignore[override]  # the decoder again
        return self.W_dec.t()  # type: ignore[return-value]

    def pre_activations(self, x: Tensor) -> Tensor:
        return self.encoder_input(x) @ self.W_dec.t()

    def encode(self, x: Tensor) -> Tensor:
        rest = self.encoder_input(x)
        shape, rest = rest.shape, rest.reshape(-1, rest.shape[-1])
        acts = rest.new_zeros(len(rest), self.config.d_sae)
        live = torch.arange(len(rest), device=rest.device)  # rows not yet at their end
        for _ in range(self.max_iterations):
            if not len(live):
                break
            r = rest[live]
            chosen = (r @ self.W_dec.t()).argmax(-1)
            rows = self.W_dec[chosen]
            values = (r * rows).sum(-1).relu()
            fresh = (acts[live, chosen] == 0) & (values > 0)  # does this step change which features fire?
            acts = acts.index_put((live, chosen), values, accumulate=True)
            r = r - values[:, None] * rows
            rest = rest.index_put((live,), r)
            done = torch.zeros_like(fresh)
            if self.stop_on_duplicate_support:
                done |= ~fresh
            if self.residual_threshold > 0:
                done |= r.norm(dim=-1) < self.residual_threshold
            live = live[~done]
        return acts.view(*shape[:-1], self.config.d_sae)

    def activation(self, z: Tensor) -> Tensor:
        raise SAEError("Matching pursuit has no activation of its own: its codes follow from x step by step.")

    def decode(self, acts: Tensor, x: Tensor | None = None) -> Tensor:
        x_hat = acts @ self.W_dec
        return self.denormalise(x_hat + self.b_dec if self.config.apply_b_dec_to_input else x_hat, x)

    def decode_sparse(self, values: Tensor, indices: Tensor, x: Tensor | None = None) -> Tensor:
        acts = values.new_zeros(*values.shape[:-1], self.config.d_sae).scatter_add(-1, indices, values)
        return self.decode(acts, x)
