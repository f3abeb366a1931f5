"""A pass that begins after the recorded blocks is the whole pass, to the bit, whatever is changed where."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from saes.numerics.lm import LM, hooked
from tests.tiny_models import FAMILIES, tiny_lm
from training.numerics.replay import Prefix

BLOCKS = {  # done when a hook point is reached, by its name
    "hook_embed": 0,
    "blocks.0.hook_resid_pre": 0,
    "blocks.0.hook_resid_post": 1,
    "blocks.1.hook_resid_pre": 1,
    "blocks.1.hook_mlp_out": 1,
    "blocks.1.hook_resid_post": 2,
}
IDS = torch.randint(2, 40, (3, 20), generator=torch.Generator().manual_seed(0))


def halved(x: Tensor) -> Tensor:
    return x * 0.5


def logits(lm: LM) -> Tensor:
    with torch.no_grad():
        found: Tensor = lm.model(input_ids=IDS, use_cache=False).logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("hook", BLOCKS)
def test_a_replayed_pass_is_the_whole_pass(family: str, hook: str, tiny_model_dir: Path) -> None:
    lm = tiny_lm(family, tiny_model_dir)
    plain = logits(lm)
    with hooked(lm, {hook: halved}):
        changed = logits(lm)
    assert not torch.equal(plain, changed)
    prefix = Prefix(lm, [hook])
    assert len(prefix.blocks) == BLOCKS[hook]
    with prefix.recorded():
        assert torch.equal(logits(lm), plain)
    with prefix.replayed(), hooked(lm, {hook: halved}):
        assert torch.equal(logits(lm), changed)
    assert torch.equal(logits(lm), plain), "the model is as it was"


def test_the_prefix_is_not_computed_again_and_the_first_hook_point_ends_it(tiny_model_dir: Path) -> None:
    lm = tiny_lm("llama", tiny_model_dir)
    prefix = Prefix(lm, ["blocks.1.hook_resid_post", "blocks.1.hook_resid_pre"])
    assert len(prefix.blocks) == 1
    ran: list[int] = []
    for n, layer in enumerate(lm.model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, n=n: ran.append(n))
    with prefix.recorded():
        logits(lm)
    with prefix.replayed():
        logits(lm)
    assert ran == [0, 1, 1]


def test_models_not_known_to_hand_on_nothing_else_run_whole(tiny_model_dir: Path) -> None:
    known = tiny_lm("llama", tiny_model_dir)
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=known.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    lm = LM(MixtralForCausalLM(config).requires_grad_(False), known.tokenizer, "mixtral")
    prefix = Prefix(lm, ["blocks.1.hook_resid_post"])
    assert not prefix.blocks
    plain = logits(lm)
    with prefix.recorded():
        logits(lm)
    with prefix.replayed():
        assert torch.equal(logits(lm), plain)
