"""Steering against its definition: x + decode(z') - decode(z), with z' made from the dense codes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from inference.numerics.steer import (
    MODES,
    Edit,
    Steering,
    SteeringError,
    check_steering,
    steering_hook,
    steering_hooks,
)
from saes.numerics.lm import UnknownHookPoint, hooked
from tests.tiny_models import D_MODEL, RESID, tiny_sae

CLOSE = {"rtol": 1e-5, "atol": 2e-5}  # float32, activations of size about 1
VALUES = {"add": 3.0, "scale": 2.5, "clamp": 4.0, "ablate": 0.0, "cap": 0.5}


def inputs(seed: int = 5) -> Tensor:
    return torch.randn(2, 7, D_MODEL, generator=torch.Generator().manual_seed(seed))


def strongest(sae: Any, x: Tensor, count: int) -> list[int]:
    """The features that fire most on x."""
    return sae.encode(x).sum((0, 1)).topk(count).indices.tolist()


def by_definition(sae: Any, x: Tensor, edits: list[Edit]) -> Tensor:
    """Dense, in float64, with the modes written out once more."""
    sae, x = sae.double(), x.double()
    z = sae.encode(x)
    new = z.clone()
    for edit in edits:
        old = z[..., edit.feature]
        new[..., edit.feature] = {
            "add": old + edit.value,
            "scale": old * edit.value,
            "clamp": torch.full_like(old, edit.value),
            "ablate": torch.zeros_like(old),
            "cap": old.clamp(max=edit.value),
        }[edit.mode]
    changed = x + sae.decode(new, x) - sae.decode(z, x)
    sae.float()
    return changed.float()


@pytest.mark.parametrize("normalisation", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("architecture", ["topk", "standard", "jumprelu"])
@pytest.mark.parametrize("mode", list(MODES))
def test_every_mode_equals_its_definition(mode: str, architecture: str, normalisation: str) -> None:
    sae, x = tiny_sae(architecture, normalize_activations=normalisation), inputs()
    if architecture == "jumprelu":
        sae.threshold += torch.linspace(0, 1, 96)
    edits = [Edit(i, mode, VALUES[mode]) for i in [*strongest(sae, x, 3), 95]]
    steered = steering_hook(sae, edits)(x)
    torch.testing.assert_close(steered, by_definition(sae, x, edits), **CLOSE)
    assert (steered - x).abs().max() > 0.1


def test_mixed_modes_equal_the_definition() -> None:
    sae, x = tiny_sae(), inputs()
    a, b, c, d = strongest(sae, x, 4)
    edits = [Edit(a, "add", -2.0), Edit(b, "ablate"), Edit(c, "clamp", 5.0), Edit(d, "scale", -1.0)]
    torch.testing.assert_close(steering_hook(sae, edits)(x), by_definition(sae, x, edits), **CLOSE)


def test_one_edit_moves_x_along_its_decoder_row() -> None:
    """By exactly v * W_dec[i] for add: nothing of the SAE's error enters."""
    sae, x = tiny_sae(), inputs()
    shift = steering_hook(sae, [Edit(11, "add", 2.5)]).shift(x)
    assert torch.equal(shift, (2.5 * sae.W_dec[11]).expand_as(x))
    z = sae.encode(x)[..., 11]
    torch.testing.assert_close(
        steering_hook(sae, [Edit(11, "clamp", 1.5)])(x) - x, (1.5 - z)[..., None] * sae.W_dec[11], **CLOSE
    )


@pytest.mark.parametrize("edit", [Edit(3, "add", 0.0), Edit(3, "scale", 1.0), Edit(3, "ablate")])
def test_edits_without_effect_leave_x_bit_identical(edit: Edit) -> None:
    sae, x = tiny_sae("standard"), inputs()
    if edit.mode == "ablate":
        sae.b_enc[3] = -1000  # a feature that does not fire
    assert torch.equal(steering_hook(sae, [edit])(x), x)


def test_formulas_say_what_is_done() -> None:
    z, v = torch.tensor([0.0, 1.5, 4.0]), torch.tensor(2.5)
    for mode in MODES.values():
        expected = eval(mode.formula.partition("=")[2], {"z": z, "v": v, "min": torch.minimum})  # noqa: S307
        torch.testing.assert_close(mode.apply(z, v), torch.as_tensor(expected).expand(3).float())


def test_half_precision_rounds_once() -> None:
    sae, x = tiny_sae(), inputs().bfloat16()
    edits = [Edit(4, "add", 1.0)]
    steered = steering_hook(sae, edits)(x)
    assert torch.equal(steered, (x.float() + sae.W_dec[4]).bfloat16())


def test_prompt_positions_are_left_alone() -> None:
    sae, x = tiny_sae(), inputs()
    edits = [Edit(4, "add", 1.0), Edit(5, "clamp", 2.0)]
    everywhere = steering_hook(sae, edits)(x)
    hook = steering_hook(sae, edits, "generated", prompt_length=4)
    whole = hook(x)
    assert torch.equal(whole[:, :4], x[:, :4])
    torch.testing.assert_close(whole[:, 4:], everywhere[:, 4:])
    assert hook(x[:, :4]) is None
    torch.testing.assert_close(hook(x[:, 2:6], start=2), torch.cat([x[:, 2:4], everywhere[:, 4:6]], 1))
    torch.testing.assert_close(hook(x[:, 6:], start=6), everywhere[:, 6:])


def test_control_tokens_are_left_alone() -> None:
    sae, x = tiny_sae(), inputs()
    edits = [Edit(4, "add", 1.0), Edit(5, "clamp", 2.0)]
    control = [True, False, False, True, False, False, False]
    hook = steering_hook(sae, edits, "not_special", special=lambda start, n: control[start : start + n])
    everywhere = steering_hook(sae, edits)(x)
    expected = torch.where(torch.tensor(control)[:, None], x, everywhere)
    assert torch.equal(hook(x)[:, control], x[:, control])
    torch.testing.assert_close(hook(x), expected)
    assert hook(x[:, 3:4], start=3) is None
    torch.testing.assert_close(hook(x[:, 2:5], start=2), expected[:, 2:5])


def test_edits_begin_with_a_position() -> None:
    sae, x = tiny_sae(), inputs()
    hook = steering_hook(sae, [Edit(4, "add", 1.0)], "from", prompt_length=2, first=5)
    assert torch.equal(hook(x)[:, :5], x[:, :5])
    torch.testing.assert_close(hook(x)[:, 5:], x[:, 5:] + sae.W_dec[4], **CLOSE)
    assert hook(x[:, :3], start=2) is None


# ---------------------------------------------------------------------------------------------------- in a model


def logits(lm: Any, steering: list[Steering], ids: Tensor) -> Tensor:
    with torch.no_grad(), hooked(lm, steering_hooks(lm, steering, ids.shape[1])):
        return lm.model(ids).logits


def some_ids(lm: Any) -> Tensor:
    return torch.tensor([lm.tokenizer("Paris is the capital of France.")["input_ids"]])


def test_no_edits_no_hook(lm: Any) -> None:
    ids = some_ids(lm)
    assert steering_hooks(lm, [Steering(tiny_sae(), RESID)], 3) == {}
    with torch.no_grad():
        assert torch.equal(logits(lm, [Steering(tiny_sae(), RESID)], ids), lm.model(ids).logits)


@pytest.mark.parametrize("hook_name", ["blocks.0.hook_resid_post", "blocks.1.hook_mlp_out", "blocks.1.hook_resid_pre"])
def test_one_edit_shifts_x_at_the_hook(hook_name: str, lm: Any) -> None:
    sae, ids = tiny_sae(), some_ids(lm)
    before = lm.activations(ids, [hook_name])[hook_name]
    with hooked(lm, steering_hooks(lm, [Steering(sae, hook_name, [Edit(11, "add", 2.5)])], 0)):
        after = lm.activations(ids, [hook_name])[hook_name]
    torch.testing.assert_close(after - before, (2.5 * sae.W_dec[11]).expand_as(before), **CLOSE)


def test_saes_at_one_place_add_up(lm: Any) -> None:
    """Both read the unedited x, whatever their order and however the place is named."""
    ids, layer = some_ids(lm), lm.resolve(RESID).module
    one = Steering(tiny_sae(), RESID, [Edit(3, "clamp", 3.0)])
    two = Steering(tiny_sae("standard"), layer, [Edit(4, "clamp", 2.0)])
    assert len(steering_hooks(lm, [one, two], 0)) == 1
    x = lm.activations(ids, [RESID])[RESID]
    shifts = [steering_hook(s.sae, s.edits).shift(x) for s in (one, two)]
    hook = steering_hooks(lm, [two, one], 0)[RESID]
    torch.testing.assert_close(hook(x), x + shifts[0] + shifts[1], **CLOSE)
    torch.testing.assert_close(logits(lm, [one, two], ids), logits(lm, [two, one], ids))


BAD = [
    (Edit(3, "add", float("nan")), "value of feature 3 is nan"),
    (Edit(3, "add", float("inf")), "value of feature 3 is inf"),
    (Edit(3, "add", 1e300), "give a finite number"),
    (Edit(96, "add", 1.0), "There is no feature 96; this SAE has features 0 to 95"),
    (Edit(-1, "add", 1.0), "There is no feature -1"),
    (Edit(2.5, "add", 1.0), "There is no feature 2.5"),  # type: ignore[arg-type]
    (Edit(3, "boost", 1.0), 'no steering mode "boost"; choose one of add, scale, clamp, ablate'),
]


@pytest.mark.parametrize(("edit", "sentence"), BAD)
def test_bad_edits(edit: Edit, sentence: str, llama: Any) -> None:
    with pytest.raises(SteeringError, match=sentence):
        steering_hook(tiny_sae(), [edit])
    with pytest.raises(SteeringError, match=sentence):
        check_steering(llama, Steering(tiny_sae(), RESID, [edit]))


def test_a_scale_and_an_add_of_one_feature_are_affine() -> None:
    sae = tiny_sae()
    x = torch.randn(2, 5, sae.config.d_in)
    z = sae.encode(x)[..., 3]
    hook = steering_hook(sae, [Edit(3, "scale", 2.0), Edit(3, "add", 1.5)])
    moved = x + (z * 2.0 + 1.5 - z)[..., None] * sae.W_dec[3]
    torch.testing.assert_close(hook(x), moved.detach())
    with pytest.raises(SteeringError, match="Feature 3 is edited twice"):
        steering_hook(sae, [Edit(3, "scale", 2.0), Edit(3, "add", 1.5), Edit(3, "add", 1.0)])


def test_bad_combinations(llama: Any) -> None:
    sae = tiny_sae()
    with pytest.raises(SteeringError, match="Feature 3 is edited twice"):
        steering_hook(sae, [Edit(3, "add", 1.0), Edit(3, "ablate")])
    with pytest.raises(SteeringError, match="Feature 3 is edited twice"):
        steering_hooks(llama, [Steering(sae, name, [Edit(3, "ablate")]) for name in (RESID, "model.layers.1")], 0)
    with pytest.raises(
        SteeringError, match=r"reads vectors of 24 numbers, but blocks\.1\.hook_resid_post of .* has 32"
    ):
        check_steering(llama, Steering(tiny_sae(d_in=24), RESID, [Edit(3, "ablate")]))
    with pytest.raises(SteeringError, match='no steering scope "some"'):
        check_steering(llama, Steering(sae, RESID, [], "some"))  # type: ignore[arg-type]
    with pytest.raises(SteeringError, match="reads 32 numbers and writes 16"):
        check_steering(
            llama, Steering(tiny_sae("standard", d_out=16, apply_b_dec_to_input=False), RESID, [Edit(3, "ablate")])
        )
    with pytest.raises(UnknownHookPoint, match="no layer 9"):
        check_steering(llama, Steering(sae, "blocks.9.hook_resid_post", [Edit(3, "ablate")]))
