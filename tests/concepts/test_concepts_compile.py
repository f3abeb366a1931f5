"""Configs to steering edits: what adds up, what is refused, what mi_crow's files mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from concepts import compile as compiler
from concepts.compile import ConfigError, compile, of_mi_crow, to_mi_crow


def on(feature: int, mode: str, value: float = 0.0) -> dict[str, Any]:
    return {"feature": feature, "mode": mode, "value": value}


def kin(mode: str, value: float = 0.0, *members: tuple[int, float, int]) -> dict[str, Any]:
    chosen = members or ((3, 1.0, 1), (17, 0.5, -1), (40, 0.0, 1))
    return {
        "concept": "family", "mode": mode, "value": value,
        "members": [{"feature": f, "weight": w, "sign": s} for f, w, s in chosen],
    }  # fmt: skip


def test_the_modes_are_those_of_steering() -> None:
    from concepts.config_forms import ConfigEditForm
    from concepts.dictionary_views import STEERING_ROWS
    from inference.edit_forms import MAX_EDITS, MAX_VALUE
    from inference.models import Generation
    from inference.numerics.steer import MODES

    assert tuple(MODES) == compiler.MODES and compiler.LARGEST == MAX_VALUE and STEERING_ROWS == MAX_EDITS
    labels = dict(Generation.Mode.choices)
    assert [(m, labels[m]) for m in compiler.MODES] == list(ConfigEditForm().fields["mode"].choices)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (kin("add", 4.0), [on(3, "add", 4.0), on(17, "add", -2.0)]),
        (kin("scale", 3.0), [on(3, "scale", 3.0), on(17, "scale", 0.0)]),
        (kin("clamp", 4.0), [on(3, "clamp", 4.0), on(17, "clamp", -2.0)]),
        (kin("ablate"), [on(3, "ablate"), on(17, "ablate")]),
        (kin("cap", 4.0, (3, 1.0, 1), (17, 0.5, 1)), [on(3, "cap", 4.0), on(17, "cap", 2.0)]),
        (kin("add", 0.0), []),
        (kin("scale", 1.0), []),
    ],
)
def test_a_concept_reaches_its_members_by_weight_and_sign(edit: dict[str, Any], expected: list[Any]) -> None:
    assert compile([edit]) == expected


def test_neutral_is_the_identity() -> None:
    assert compile([]) == [] and compile([on(1, "add", 0.0), on(2, "scale", 1.0)]) == []
    assert compile([on(1, "add", 2.0), on(1, "add", -2.0), on(2, "scale", 4.0), on(2, "scale", 0.25)]) == []


def test_edits_of_one_feature_add_up_or_are_refused() -> None:
    assert compile([kin("add", 4.0), on(3, "add", 1.5)]) == [on(3, "add", 5.5), on(17, "add", -2.0)]
    assert compile([on(3, "scale", 2.0), on(3, "scale", 3.0)]) == [on(3, "scale", 6.0)]
    assert compile([on(3, "ablate"), on(3, "ablate")]) == [on(3, "ablate")]
    assert compile([on(3, "clamp", 2.0), on(3, "clamp", 2.0)]) == [on(3, "clamp", 2.0)]
    assert compile([on(3, "cap", 2.0), on(3, "cap", 1.5)]) == [on(3, "cap", 1.5)]
    with pytest.raises(ConfigError, match="feature 17 is of the other direction"):
        compile([kin("cap", 4.0)])
    for a, b in [("add", "cap"), ("scale", "cap"), ("add", "clamp"), ("scale", "ablate"), ("clamp", "ablate")]:
        with pytest.raises(ConfigError, match=r"Feature 3 is moved by .* contradict each other"):
            compile([on(3, a, 2.0), on(3, b, 2.0)])
    with pytest.raises(ConfigError, match="clamp 2 and by clamp 3"):
        compile([on(3, "clamp", 2.0), on(3, "clamp", 3.0)])
    both = [on(3, "add", 1.5), on(3, "scale", 2.0), on(3, "add", 1.0), on(3, "scale", 3.0)]
    assert compile(both) == [on(3, "scale", 6.0), on(3, "add", 2.5)] and compiler.moves(both)[0].at(2.0) == 14.5
    assert compile([on(3, "scale", 2.0), on(3, "add", 1.0), on(3, "scale", 0.5)]) == [on(3, "add", 1.0)]
    assert compile([on(3, "scale", 2.0), on(3, "add", 1.0), on(3, "add", -1.0)]) == [on(3, "scale", 2.0)]
    with pytest.raises(ConfigError, match="scale 2 and by clamp 1, which contradict"):
        compile([on(3, "scale", 2.0), on(3, "clamp", 1.0)])
    with pytest.raises(ConfigError, match="moved by add 2e"):
        compile([on(3, "scale", 2.0), on(3, "add", 1e6), on(3, "add", 1e6)])
    assert [move.asked for move in compiler.moves([kin("add", 1.0), on(3, "add", 1.0)])] == [[0, 1], [0]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "4", None, True, 1e7])
def test_a_value_that_is_no_usable_number_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="give a number between"):
        compile([on(3, "add", value)])


def test_the_preview_computes_as_steering_does() -> None:
    from inference.numerics.steer import MODES

    for mode in compiler.MODES:
        for z in (0.0, 1.0, 3.0):
            applied = MODES[mode].apply(torch.tensor(z), torch.tensor(2.0))
            assert compiler.Move(3, mode, 2.0).at(z) == applied.item(), mode


def test_sums_and_products_stay_within_bounds() -> None:
    with pytest.raises(ConfigError, match="choose smaller strengths"):
        compile([on(3, "scale", 1e5), on(3, "scale", 1e5)])
    with pytest.raises(ConfigError, match="more than 1,000 features"):
        compile([on(i, "add", 1.0) for i in range(1001)])


# -- mi_crow
def computed(content: dict[str, Any], n: int, z: torch.Tensor) -> torch.Tensor:
    """z' as mi_crow 1.0.0 computes it: ones everywhere, the bias zeros and the listed ones only where some are listed."""
    multiplication, bias = torch.ones(n), torch.ones(n)
    for i, value in content.get("weights", content.get("edits", {})).items():
        multiplication[int(i)] = value
    if content.get("bias"):
        bias = torch.zeros(n)
        for i, value in content["bias"].items():
            bias[int(i)] = value
    neutral = torch.equal(multiplication, torch.ones(n)) and torch.equal(bias, torch.ones(n))
    return z if neutral else z * multiplication + bias


def steered(edits: list[dict[str, Any]], z: torch.Tensor) -> torch.Tensor:
    """z' as steering computes it."""
    from inference.numerics.steer import MODES

    moved = z.clone()
    for edit in edits:
        moved[:, edit["feature"]] += MODES[edit["mode"]].change(z[:, edit["feature"]], torch.tensor(edit["value"]))
    return moved


@pytest.mark.parametrize(
    ("content", "ones"),
    [
        ({"weights": {"5": 2.0}, "bias": {"5": 0.0}}, None),
        ({"weights": {"5": 0.0}, "bias": {"5": 3.0, "2": -1.0}}, None),
        ({"edits": {"5": 0.0}, "bias": {"1": 0.5}}, None),
        ({"weights": {}, "bias": {}}, None),
        ({"weights": {"5": 1.0}, "bias": {}}, None),
        ({"weights": {"5": 0.0}, "bias": {}}, True),
        ({"weights": {"5": 2.0}, "bias": {}}, True),
        ({"weights": {"5": 2.0, "1": -0.5}, "bias": {"5": 1.0, "2": 4.0}}, None),
    ],
)
def test_a_config_of_mi_crow_means_what_mi_crow_computes(content: dict[str, Any], ones: bool | None) -> None:
    z = torch.rand(7, 8)
    edits = compile(of_mi_crow(content, 8, ones))
    torch.testing.assert_close(steered(edits, z), computed(content, 8, z))
    torch.testing.assert_close(computed(to_mi_crow(edits), 8, z), steered(edits, z))


def test_an_empty_bias_is_asked_about_and_never_applied_silently() -> None:
    content = {"weights": {"5": 2.0}, "bias": {}}
    with pytest.raises(ConfigError, match="adds 1 to every feature"):
        of_mi_crow(content, 8)
    assert compile(of_mi_crow(content, 8, ones=False)) == [on(5, "scale", 2.0)]
    ones = compile(of_mi_crow(content, 8, ones=True))
    assert len(ones) == 9 and [edit for edit in ones if edit["feature"] == 5] == [
        on(5, "scale", 2.0),
        on(5, "add", 1.0),
    ]
    with pytest.raises(ConfigError, match="adds 1 to all 16,384 features"):
        of_mi_crow(content, 16384, ones=True)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"weights": {"8": 2.0}}, "There is no feature 8; this SAE has features 0 to 7."),
        ({"weights": {"-1": 2.0}}, "There is no feature -1"),
        ({"weights": {"../5": 2.0}}, "is not the number of a feature"),
        ({"weights": {"5": "2"}}, "give a number between"),
        ({"weights": {"5": float("nan")}}, "give a number between"),
        ({"weights": [5]}, "must map feature numbers to numbers"),
    ],
)
def test_a_config_of_mi_crow_that_cannot_be_is_refused(content: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        of_mi_crow(content, 8)
