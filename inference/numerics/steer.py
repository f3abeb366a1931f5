"""Steering: change a few codes of an SAE while the model runs, and nothing else.

x' = x + decode(z') - decode(z), which keeps what the SAE does not explain (x - decode(z), the error term). The decoder
is affine, so this equals x + sum over edited features i of (z'_i - z_i) * W_dec[i], and only those are touched.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from saes.numerics.jumprelu import JumpReLUSAE
from saes.numerics.lm import LM
from saes.numerics.sae import SAE, encodes_as
from saes.numerics.standard import StandardSAE

LARGEST_VALUE = torch.finfo(torch.float32).max
Scope = Literal["all", "generated", "not_special", "from"]
SCOPES: dict[str, str] = {
    "all": "every token, the prompt included",
    "generated": "tokens the model has written; prompt positions keep their activations",
    "not_special": "every token but control tokens such as BOS and those of a chat template",
    "from": "every token from a position of the text on, counted from 0, BOS included",
}
Special = Callable[
    [int, int], Sequence[bool]
]  # (start, n) -> which of the n tokens from position start are control tokens


class SteeringError(ValueError):
    """An edit that cannot be made; the message is one sentence."""


@dataclass(frozen=True)
class Mode:
    """What an edit with value v does to a code z: `formula` in words of z and v, `change` = z' - z.

    `reads_code` False: the change does not depend on z, so the SAE need not be run.
    """

    formula: str
    change: Callable[[Tensor, Tensor], Tensor]
    reads_code: bool = True

    def apply(self, z: Tensor, v: Tensor) -> Tensor:
        """z' of codes z, elementwise with values v."""
        return z + self.change(z, v)


MODES: dict[str, Mode] = {
    "add": Mode("z' = z + v", lambda z, v: v.expand_as(z), reads_code=False),
    "scale": Mode("z' = z * v", lambda z, v: z * (v - 1)),
    "clamp": Mode("z' = v", lambda z, v: v - z),
    "ablate": Mode("z' = 0", lambda z, v: -z),
    "cap": Mode("z' = min(z, v)", lambda z, v: torch.minimum(z, v) - z),
}


@dataclass(frozen=True)
class Edit:
    """One feature and what becomes of its code. `value` is not used by ablate."""

    feature: int
    mode: str
    value: float = 0.0


@dataclass(frozen=True)
class Steering:
    """The edits of one SAE at one hook point, at the tokens of `scope`; `first` is the position that scope "from" begins
    with. A scale v and an add w of one feature are z' = z * v + w: the changes of both add up. Without edits nothing is
    hooked at all."""

    sae: SAE
    hook_name: str
    edits: Sequence[Edit] = field(default_factory=tuple)
    scope: Scope = "all"
    first: int = 0


def check_edits(sae: SAE, edits: Sequence[Edit]) -> None:
    """Raises SteeringError for the first edit that cannot be made on this SAE."""
    if not (sae.reconstructs and sae.row_by_row):
        raise SteeringError(
            f"This SAE is a {sae.config.architecture}: a feature of it is not a direction of the activations it reads, "
            "so it cannot steer them."
        )
    if sae.config.d_out != sae.config.d_in:
        raise SteeringError(
            f"This SAE reads {sae.config.d_in} numbers and writes {sae.config.d_out}, so it cannot steer its input."
        )
    seen: dict[int, str] = {}
    for edit in edits:
        if edit.mode not in MODES:
            raise SteeringError(f'There is no steering mode "{edit.mode}"; choose one of {", ".join(MODES)}.')
        if not isinstance(edit.feature, int) or not 0 <= edit.feature < sae.config.d_sae:
            raise SteeringError(
                f"There is no feature {edit.feature}; this SAE has features 0 to {sae.config.d_sae - 1}."
            )
        if not abs(edit.value) <= LARGEST_VALUE:  # NaN compares false
            raise SteeringError(f"The steering value of feature {edit.feature} is {edit.value}; give a finite number.")
        if edit.feature in seen and {seen[edit.feature], edit.mode} != {"add", "scale"}:
            raise SteeringError(f"Feature {edit.feature} is edited twice; keep one edit of it, or a scale and an add.")
        seen[edit.feature] = "both" if edit.feature in seen else edit.mode


def check_steering(lm: LM, steering: Steering) -> None:
    """Raises SteeringError when the edits or the scope are wrong or the SAE does not fit the model at the hook point,
    UnknownHookPoint when the model has no such hook point."""
    check_edits(steering.sae, steering.edits)
    if steering.scope not in SCOPES:
        raise SteeringError(f'There is no steering scope "{steering.scope}"; choose one of {", ".join(SCOPES)}.')
    if not isinstance(steering.first, int) or steering.first < 0:
        raise SteeringError(f"Edits cannot begin with token {steering.first}; positions are counted from 0.")
    d, d_in = lm.resolve(steering.hook_name).d, steering.sae.config.d_in
    if d != d_in:
        raise SteeringError(
            f"The SAE reads vectors of {d_in} numbers, but {steering.hook_name} of {lm.name or 'this model'} has {d}; "
            "choose the model and hook point the SAE was trained on."
        )


class SteeringHook:
    """x (b, t, d) -> x' (b, t, d). Positions before `first` keep their activations, and with `special` control tokens.

    `start` is the position of x[:, 0] in the whole text: with a key-value cache each call sees only the newest tokens.
    The hook itself holds no state that a call changes, so one hook may serve several threads.
    """

    def __init__(self, sae: SAE, edits: Sequence[Edit], first: int = 0, special: Special | None = None) -> None:
        check_edits(sae, edits)
        self.sae = sae
        self.first = first
        self.special = special
        self.modes = [MODES[edit.mode] for edit in edits]
        self.ids = torch.tensor([edit.feature for edit in edits], dtype=torch.int64, device=sae.W_dec.device)
        self.values = torch.tensor([float(edit.value) for edit in edits], device=sae.W_dec.device)
        self.directions = sae.W_dec.detach()[self.ids].float()
        self.threshold: Tensor | None = None  # of each edited feature, where no other one decides with it
        if encodes_as(sae, StandardSAE):
            self.threshold = torch.zeros(len(self.ids), device=self.ids.device)
        elif encodes_as(sae, JumpReLUSAE):
            self.threshold = sae.tensor("threshold").detach()[self.ids]

    def __call__(self, x: Tensor, start: int = 0) -> Tensor | None:
        shift = self.shift(x, start)
        return None if shift is None else (x.float() + shift).to(x.dtype)

    @torch.no_grad()
    def shift(self, x: Tensor, start: int = 0) -> Tensor | None:
        """x' - x (b, t, d) in float32, or None where no position is edited."""
        skipped = min(max(self.first - start, 0), x.shape[1])
        if skipped == x.shape[1] or not self.modes:
            return None
        kept = self._kept(start + skipped, x.shape[1] - skipped)
        if all(kept):
            return None
        edited = x[:, skipped:].to(self.ids.device)
        shift = self._change(edited) @ self.directions
        scale = self.sae.decoder_scale(edited)
        shift = (shift if scale is None else shift * scale).to(x.device)
        if any(kept):
            shift[:, torch.tensor(kept, device=shift.device)] = 0
        return torch.cat([shift.new_zeros(x.shape[0], skipped, x.shape[2]), shift], dim=1) if skipped else shift

    def _kept(self, start: int, n: int) -> Sequence[bool]:
        """Which of n positions keep their activations because of the token that is there."""
        return self.special(start, n) if self.special else [False] * n

    def _change(self, x: Tensor) -> Tensor:
        """z' - z (b, t, edits) of the edited features."""
        shape = (*x.shape[:-1], len(self.modes))
        z = self.codes(x) if any(mode.reads_code for mode in self.modes) else x.new_zeros(shape, dtype=torch.float32)
        return torch.stack([mode.change(z[..., j], self.values[j]) for j, mode in enumerate(self.modes)], dim=-1)

    def codes(self, x: Tensor) -> Tensor:
        """z (b, t, edits) of the edited features alone.

        Codes of a standard or a JumpReLU SAE do not depend on each other, so only those columns are computed. Others
        choose among all features: the whole selection is made and the edited ones are read from it.
        """
        sae = self.sae
        if self.threshold is not None:
            z = sae.encoder_input(x) @ sae.W_enc[:, self.ids] + sae.b_enc[self.ids]
            return (z.relu() * (z > self.threshold)).float()
        values, indices = sae.encode_sparse(x)
        return torch.where(indices[..., None] == self.ids, values[..., None], 0).sum(-2).float()


def no_special(start: int, n: int) -> Sequence[bool]:
    return [False] * n


def steering_hook(
    sae: SAE,
    edits: Sequence[Edit],
    scope: Scope = "all",
    prompt_length: int = 0,
    first: int = 0,
    special: Special = no_special,
) -> SteeringHook:
    """The function on x (b, t, d) that makes the edits, for saes.numerics.lm.hooked.

    With scope "generated", positions below `prompt_length` are left alone; with "from", those below `first`; with
    "not_special", those that `special` names. Raises SteeringError.
    """
    begin = {"generated": prompt_length, "from": first}.get(scope, 0)
    return SteeringHook(sae, edits, begin, special if scope == "not_special" else None)


def steering_hooks(
    lm: LM,
    steering: Sequence[Steering],
    prompt_length: int,
    position: Callable[[], int] = lambda: 0,
    special: Special = no_special,
) -> Mapping[str, Callable[[Tensor], Tensor | None]]:
    """Everything to hook for several SAEs, by hook point; nothing for a Steering without edits.

    SAEs at one hook point all read the same unedited x and their shifts add up, so their order does not matter.
    `position` tells where the tokens of the present forward pass begin, `special` which tokens of the text are control
    tokens. Raises SteeringError, UnknownHookPoint.
    """
    hooks: dict[str, list[SteeringHook]] = {}
    for one in steering:
        check_steering(lm, one)
        name = lm.resolve(one.hook_name).name
        same = [
            e
            for other in steering
            if other.sae is one.sae and lm.resolve(other.hook_name).name == name
            for e in other.edits
        ]
        check_edits(one.sae, same)
        if one.edits:
            hook = steering_hook(one.sae, one.edits, one.scope, prompt_length, one.first, special)
            hooks.setdefault(name, []).append(hook)
    return {name: _together(parts, position) for name, parts in hooks.items()}


def _together(hooks: Sequence[SteeringHook], position: Callable[[], int]) -> Callable[[Tensor], Tensor | None]:
    def steer(x: Tensor) -> Tensor | None:
        shifts = [shift for hook in hooks if (shift := hook.shift(x, position())) is not None]
        return (x.float() + torch.stack(shifts).sum(0)).to(x.dtype) if shifts else None

    return steer
