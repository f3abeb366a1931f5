"""What a concept config does, worked out without torch or Django: edits over features and concepts become one edit a feature.

An edit is {"feature": i, "mode": m, "value": v} or {"concept": name, "members": [{"feature", "weight", "sign"}, ...],
"mode": m, "value": v}. Strength v of a concept reaches its member of weight w and sign s as

  add     z' = z + s w v             neutral: v = 0
  scale   z' = z * (1 + s w (v - 1)) neutral: v = 1
  clamp   z' = s w v
  ablate  z' = 0 for every member of weight other than 0
  cap     z' = min(z, w v); refused for a concept with members of the other direction, of which nothing is too much

When several edits move one feature: adds add up, scales multiply, and both together are z' = z * scale + add, as mi_crow computes it; the
lowest cap holds, equal clamps and ablations are one.
Every other meeting is refused, because the result would depend on an order that nobody chose. Edits that change nothing are left out, so a config
that is neutral compiles to no edits, which steering leaves bit-identical.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

MODES = ("add", "scale", "clamp", "ablate", "cap")
LARGEST = 1e6  # as the steering form
MOST_FEATURES = 1000  # moved by one config: every one of them is computed at every token


class ConfigError(ValueError):
    """A config that cannot be made or compiled; the message is one sentence."""


@dataclass(frozen=True)
class Move:
    """What becomes of one feature, and which edits ask for it (their positions in the config, from 0). `shift` is what a
    scaled code is then moved by."""

    feature: int
    mode: str
    value: float
    asked: list[int] = field(default_factory=list)
    shift: float = 0.0

    def edits(self) -> list[dict[str, Any]]:
        """As steering takes them: one, or a scale and an add."""
        edits = [{"feature": self.feature, "mode": self.mode, "value": self.value}]
        return edits + ([{"feature": self.feature, "mode": "add", "value": self.shift}] if self.shift else [])

    def at(self, z: float) -> float:
        """z' of a code z."""
        if self.mode == "cap":
            return min(z, self.value)
        return {"add": z + self.value, "scale": z * self.value + self.shift, "clamp": self.value, "ablate": 0.0}[
            self.mode
        ]


def compile(edits: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The steering edits of a config: [{feature, mode, value}], in order of the features, each once, or scaled and added to.

    Raises ConfigError for a mode nobody knows, a number that is not finite, edits of one feature that contradict each
    other, or too many features.
    """
    return [edit for move in moves(edits) for edit in move.edits()]


def moves(edits: Iterable[Mapping[str, Any]]) -> list[Move]:
    """As `compile`, with the edits that ask for each."""
    found: dict[int, Move] = {}
    for number, edit in enumerate(edits):
        for one in _moves_of(edit, number):
            found[one.feature] = _together(found[one.feature], one) if one.feature in found else one
        if len(found) > MOST_FEATURES:
            raise ConfigError(f"This config moves more than {MOST_FEATURES:,} features; leave some of its edits out.")
    moved = [_checked(move) for move in found.values() if move.shift or not is_neutral(move.mode, move.value)]
    return sorted(moved, key=lambda move: move.feature)


def is_neutral(mode: str, value: float) -> bool:
    """Does the edit leave every code as it is?"""
    return (mode == "add" and value == 0) or (mode == "scale" and value == 1)


def _moves_of(edit: Mapping[str, Any], number: int) -> list[Move]:
    mode, value = edit.get("mode"), edit.get("value", 0.0)
    if mode not in MODES:
        raise ConfigError(f'There is no mode "{str(mode)[:40]}"; choose one of {", ".join(MODES)}.')
    value = 0.0 if mode == "ablate" else number_of(value, "The value of an edit")
    if "feature" in edit:
        return [Move(edit["feature"], mode, value, [number])]
    members = [member for member in edit.get("members", ()) if member["weight"]]
    other = next((member["feature"] for member in members if member["sign"] < 0), None)
    if mode == "cap" and other is not None:
        name = str(edit.get("concept"))[:60]
        raise ConfigError(
            f"{name} cannot be capped: its feature {other} is of the other direction. Cap features by number."
        )
    return [
        Move(member["feature"], mode, _of_member(mode, value, member["weight"] * member["sign"]), [number])
        for member in members
    ]


def number_of(value: Any, what: str) -> float:
    """A finite number of a size steering takes. Raises ConfigError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:  # NaN compares false
        raise ConfigError(f"{what} is {str(value)[:40]}; give a number between -{LARGEST:,.0f} and {LARGEST:,.0f}.")
    return float(value)


def _of_member(mode: str, value: float, share: float) -> float:
    """The member's own value; `share` is sign times weight."""
    if mode == "ablate":
        return 0.0
    return 1 + share * (value - 1) if mode == "scale" else share * value


def _together(a: Move, b: Move) -> Move:
    asked = a.asked + [number for number in b.asked if number not in a.asked]
    if {a.mode, b.mode} <= {"add", "scale"}:
        return _affine(a.feature, _factor(a) * _factor(b), _shift(a) + _shift(b), asked)
    if a.mode == b.mode == "cap":
        return Move(a.feature, "cap", min(a.value, b.value), asked)
    if (a.mode, a.value) == (b.mode, b.value):
        return Move(a.feature, a.mode, a.value, asked)
    raise ConfigError(
        f"Feature {a.feature} is moved by {_words(a)} and by {_words(b)}, which contradict each other; only adds, "
        "scales and caps meet. Leave one of them out."
    )


def _factor(move: Move) -> float:
    return move.value if move.mode == "scale" else 1.0


def _shift(move: Move) -> float:
    return move.value if move.mode == "add" else move.shift


def _affine(feature: int, factor: float, shift: float, asked: list[int]) -> Move:
    """z' = z * factor + shift."""
    if factor == 1 and shift:
        return Move(feature, "add", shift, asked)
    return Move(feature, "scale", factor, asked, shift)


def _words(move: Move) -> str:
    return move.mode if move.mode == "ablate" else f"{move.mode} {move.value:.4g}"


def _checked(move: Move) -> Move:
    for edit in move.edits():
        if not abs(edit["value"]) <= LARGEST:
            raise ConfigError(
                f"Feature {move.feature} would be moved by {edit['mode']} {edit['value']:.4g}, more than {LARGEST:,.0f}; "
                "choose smaller strengths."
            )
    return move


# ------------------------------------------------------------------------------------------------ mi_crow's config files
#
# mi_crow computes z' = z * weights + bias on every feature. Weights not listed are 1. Biases not listed are 0, except that
# an empty "bias" means 1 for every feature of the SAE: nobody writes that on purpose, so whoever reads such a file must say
# what it is to mean.

ONES_ASKED = (
    'Its "bias" is empty. mi_crow then adds 1 to every feature of the SAE at every token, which is seldom meant: say '
    "whether to leave that out or to do as mi_crow does."
)


def of_mi_crow(content: Mapping[str, Any], n_features: int, ones: bool | None = None) -> list[dict[str, Any]]:
    """The edits of a mi_crow config file.

    ones: what an empty bias means, False: nothing, True: 1 for every feature, as mi_crow computes it. Raises ConfigError:
    when that is not said and matters, for features the SAE does not have and for numbers that are not finite.
    """
    weights = _by_feature(content, "weights" if "weights" in content else "edits", n_features)
    bias = _by_feature(content, "bias", n_features)
    if not bias and any(
        weight != 1 for weight in weights.values()
    ):  # with all weights 1 and all biases 1 mi_crow leaves the codes alone
        if ones is None:
            raise ConfigError(ONES_ASKED)
        if ones and n_features > MOST_FEATURES:
            raise ConfigError(
                f"As mi_crow computes it, this file adds 1 to all {n_features:,} features; a config moves at most "
                f"{MOST_FEATURES:,}. Leave the ones out."
            )
        bias = dict.fromkeys(range(n_features), 1.0) if ones else {}
    named = sorted(weights.keys() | bias.keys())
    return [edit for i in named for edit in _of_affine(i, weights.get(i, 1.0), bias.get(i, 0.0))]


def _by_feature(content: Mapping[str, Any], key: str, n_features: int) -> dict[int, float]:
    given = content.get(key) or {}
    if not isinstance(given, Mapping):
        raise ConfigError(f'"{key}" must map feature numbers to numbers.')
    return {
        feature_of(name, n_features): number_of(value, f"The {key} of feature {str(name)[:20]}")
        for name, value in given.items()
    }


def feature_of(value: Any, n_features: int) -> int:
    """A feature's number, given as one or as its digits. Raises ConfigError when the SAE has no such feature."""
    text = str(value).strip()
    if isinstance(value, bool) or not (text.isascii() and text.removeprefix("-").isdigit()):
        raise ConfigError(f'"{text[:40]}" is not the number of a feature.')
    if text.startswith("-") or len(text) > 12 or int(text) >= n_features:
        raise ConfigError(f"There is no feature {text[:20]}; this SAE has features 0 to {n_features - 1:,}.")
    return int(text)


def _of_affine(feature: int, weight: float, bias: float) -> list[dict[str, Any]]:
    """The edits that say z' = z * weight + bias: one where one is enough, else a scale and an add."""
    if weight == 0:
        return [{"feature": feature, "mode": "clamp" if bias else "ablate", "value": bias}]
    scale = [{"feature": feature, "mode": "scale", "value": weight}] if weight != 1 else []
    return scale + ([{"feature": feature, "mode": "add", "value": bias}] if bias or not scale else [])


def to_mi_crow(edits: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The config file with which mi_crow computes the same codes z'.

    The bias is never empty, so that mi_crow does not take it for ones. What it cannot hold: names of concepts, and the
    SAE's error term, which mi_crow drops whatever the file says. Raises ConfigError for a cap, which it cannot say.
    """
    weights: dict[str, float] = {}
    bias: dict[str, float] = {}
    for edit in compile(edits):
        name = str(edit["feature"])
        if edit["mode"] == "cap":
            raise ConfigError(f"mi_crow multiplies and shifts, so it cannot cap feature {name}.")
        if edit["mode"] == "add":
            bias[name] = edit["value"]
        else:
            weights[name] = edit["value"] if edit["mode"] == "scale" else 0.0
            if edit["mode"] == "clamp":
                bias[name] = edit["value"]
    return {"weights": weights, "bias": bias or {next(iter(weights), "0"): 0.0}}
