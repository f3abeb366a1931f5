"""Hook points on tiny real models of every family, held against what the models themselves compute."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    PreTrainedModel,
)

from saes.numerics.hooks import FAMILIES, LMError, UnknownHookPoint
from saes.numerics.lm import LM, hooked

VOCAB, D, LAYERS, HEADS = 50, 16, 3, 4
COMMON: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
LLAMA: dict[str, Any] = COMMON | {
    "hidden_size": D, "intermediate_size": 24, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": 2, "head_dim": 6, "max_position_embeddings": 64,
}  # fmt: skip
NEOX = {key: value for key, value in LLAMA.items() if key not in ("num_key_value_heads", "head_dim")}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": COMMON | {"n_embd": D, "n_layer": LAYERS, "n_head": HEADS, "n_inner": 24, "n_positions": 64},
    "gpt_neox": NEOX,
    "gpt_neox sequential": NEOX | {"use_parallel_residual": False},
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), LLAMA),
}
SANDWICHED = ("gemma2", "gemma3_text", "gemma3")  # a norm between each sub-layer and the residual stream


def random_model(model: PreTrainedModel) -> PreTrainedModel:
    """Weights that make every module differ from the identity; norms start as ones, biases as zeros."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.requires_grad_(False)


def tiny(name: str) -> LM:
    config = AutoConfig.for_model(name.split()[0], **CONFIGS[name])
    return LM(random_model(AutoModelForCausalLM.from_config(config)), None, name)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=CONFIGS)
def lm(request: pytest.FixtureRequest) -> LM:
    return tiny(request.param)


@pytest.fixture(scope="module")
def llama() -> LM:
    return tiny("llama")


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(2, VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def acts(lm: LM, ids: Tensor) -> dict[str, Tensor]:
    return lm.activations(ids, [point.name for point in lm.hook_points()])


@torch.inference_mode()
def hidden_states(lm: LM, ids: Tensor) -> tuple[Tensor, ...]:
    return lm.model(ids, output_hidden_states=True).hidden_states


def test_every_architecture_of_the_table_is_tested():
    assert {name.split()[0] for name in CONFIGS} | {"gemma3"} == set(FAMILIES)


def test_shapes_are_what_the_points_promise(lm, acts):
    assert len(acts) == 1 + LAYERS * (7 if lm.name == "gpt_neox" else 8)
    for point in lm.hook_points():
        assert acts[point.name].shape == (2, 7, point.d), point


def test_residual_stream_is_that_of_output_hidden_states(lm, ids, acts):
    states = hidden_states(lm, ids)
    for layer in range(LAYERS):
        torch.testing.assert_close(acts[f"blocks.{layer}.hook_resid_pre"], states[layer])
    for layer in range(LAYERS - 1):  # transformers gives the last one only after the final norm
        torch.testing.assert_close(acts[f"blocks.{layer}.hook_resid_post"], states[layer + 1])


def test_attention_and_mlp_add_up_to_the_residual_stream(lm, acts):
    for layer in range(LAYERS):
        at = {name.removeprefix(f"blocks.{layer}."): x for name, x in acts.items() if f"blocks.{layer}." in name}
        after_attention = at["hook_resid_pre"] + at["hook_attn_out"]
        if lm.name == "gpt_neox":
            assert "hook_resid_mid" not in at, "attention and MLP run side by side"
        else:
            torch.testing.assert_close(at["hook_resid_mid"], after_attention)
        torch.testing.assert_close(at["hook_resid_post"], after_attention + at["hook_mlp_out"])


@torch.inference_mode()
def test_what_goes_into_a_layer_gives_what_comes_out_of_it(lm, acts):
    for layer in range(LAYERS):
        points = {p.name.removeprefix(f"blocks.{layer}."): p for p in lm.hook_points() if p.layer == layer}
        block = lm.model.get_submodule(points["hook_resid_post"].module)

        def run(name: str, points: Any = points, layer: int = layer) -> Tensor:
            return lm.model.get_submodule(points[name].module)(acts[f"blocks.{layer}.{name}"])

        attn_out, mlp_out = run("attn.hook_z"), run("mlp.hook_in")
        torch.testing.assert_close(run("mlp.hook_post"), mlp_out)
        if lm.name in SANDWICHED:
            attn_out = block.post_attention_layernorm(attn_out)
            mlp_out = block.post_feedforward_layernorm(mlp_out)
        torch.testing.assert_close(acts[f"blocks.{layer}.hook_attn_out"], attn_out)
        torch.testing.assert_close(acts[f"blocks.{layer}.hook_mlp_out"], mlp_out)


def test_embedding_is_what_the_first_block_reads(lm, acts):
    embedded, first = acts["hook_embed"], acts["blocks.0.hook_resid_pre"]
    if lm.name == "gpt2":
        embedded = embedded + lm.model.transformer.wpe.weight[:7]
    torch.testing.assert_close(embedded, first)


def test_every_point_can_be_changed_and_the_change_reaches_the_logits(lm, ids):
    with torch.inference_mode():
        plain = lm.model(ids).logits
        for point in lm.hook_points():
            if point.layer not in (None, 1):
                continue
            with hooked(lm, {point.name: lambda x: x + torch.linspace(-1, 1, x.shape[-1])}):
                assert not torch.allclose(lm.model(ids).logits, plain, atol=1e-4), point
            with hooked(lm, {point.name: lambda x: None}):
                assert torch.equal(lm.model(ids).logits, plain), point
        assert torch.equal(lm.model(ids).logits, plain), "nothing is left behind"


def test_deeper_blocks_and_the_head_are_not_run(lm, ids):
    ran: list[str] = []
    blocks = lm.hook_points()[1].module.rsplit(".", 1)[0]
    watched = [f"{blocks}.{layer}" for layer in range(LAYERS)]
    modules = {path: lm.model.get_submodule(path) for path in watched} | {"head": lm.model.get_output_embeddings()}
    handles = [
        module.register_forward_pre_hook(lambda *_, path=path: ran.append(path)) for path, module in modules.items()
    ]
    try:
        lm.activations(ids, ["blocks.1.hook_mlp_out", "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"])
        assert ran == watched[:2], "one pass, up to block 1"
        ran.clear()
        lm.activations(ids, [f"blocks.{LAYERS - 1}.hook_resid_post"])
        assert ran == watched, "no head"
    finally:
        for handle in handles:
            handle.remove()


def test_gemma_3_with_vision_hooks_its_language_model(ids):
    text = Gemma3TextConfig(**LLAMA)
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    config = Gemma3Config(text_config=text, vision_config=vision | {"image_size": 8, "patch_size": 4})
    lm = LM(random_model(Gemma3ForConditionalGeneration(config)), None)  # type: ignore[arg-type]
    point = lm.resolve("blocks.1.hook_mlp_out")
    assert "vision" not in point.module and point.module.endswith("layers.1.post_feedforward_layernorm")
    at = lm.activations(ids, ["blocks.1.hook_resid_post", "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"])
    torch.testing.assert_close(at["blocks.1.hook_resid_post"], sum(list(at.values())[1:]))


def test_unknown_architecture_still_has_its_residual_stream(ids):
    config = AutoConfig.for_model("opt", vocab_size=VOCAB, hidden_size=D, num_hidden_layers=2, num_attention_heads=2,
                                  ffn_dim=24, word_embed_proj_dim=D, max_position_embeddings=64)  # fmt: skip
    lm = LM(random_model(AutoModelForCausalLM.from_config(config)), None)  # type: ignore[arg-type]
    assert [point.name for point in lm.hook_points()][1:3] == ["blocks.0.hook_resid_pre", "blocks.0.hook_resid_post"]
    got = lm.activations(ids, ["blocks.0.hook_resid_post"])["blocks.0.hook_resid_post"]
    torch.testing.assert_close(got, hidden_states(lm, ids)[1])


@pytest.mark.parametrize(
    ("name", "expected", "module", "d"),
    [
        ("blocks.1.hook_resid_post", "blocks.1.hook_resid_post", "model.layers.1", D),
        ("model.layers.1", "blocks.1.hook_resid_post", "model.layers.1", D),
        ("layers.1", "blocks.1.hook_resid_post", "model.layers.1", D),
        ("model.layers.1.output", "blocks.1.hook_resid_post", "model.layers.1", D),
        ("model.layers.1.input", "blocks.1.hook_resid_pre", "model.layers.1", D),
        ("layers.0.mlp", "blocks.0.hook_mlp_out", "model.layers.0.mlp", D),
        ("model.layers.2.self_attn.o_proj.input", "blocks.2.attn.hook_z", "model.layers.2.self_attn.o_proj", 24),
        ("embed_tokens", "hook_embed", "model.embed_tokens", D),
        ("layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj.output", "model.layers.0.self_attn.q_proj", 24),
        ("layers.0.self_attn.input", "model.layers.0.self_attn.input", "model.layers.0.self_attn", D),
        ("model.norm", "model.norm.output", "model.norm", D),
        ("lm_head", "lm_head.output", "lm_head", VOCAB),
    ],
)
def test_names_and_module_paths_are_resolved(llama, ids, name, expected, module, d):
    point = llama.resolve(name)
    assert (point.name, point.module, point.d) == (expected, module, d)
    assert llama.resolve(point.name) == point
    assert llama.activations(ids, [name])[name].shape == (2, 7, d)


def test_gpt2_paths_of_sparsify_are_resolved():
    assert tiny("gpt2").resolve("h.1").name == "blocks.1.hook_resid_post"
    assert tiny("gpt2").resolve("transformer.h.1.attn.c_proj.input").name == "blocks.1.attn.hook_z"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("blocks.3.hook_resid_post", r"There is no layer 3 .*: this model's layers are 0 to 2\."),
        ("model.layers.40", r"There is no layer 40 .* 0 to 2\."),
        ("blocks.1.hook_resid_pots", r"did you mean blocks\.1\.hook_resid_post or "),
        ("blocks.-1.hook_resid_post", r"no hook point 'blocks\.-1\.hook_resid_post'; did you mean"),
        ("", r"no hook point ''; the names are like blocks\.2\.hook_resid_post\."),
        ("\n" + "x" * 100_000, r"the names are like"),
        (".output", "no hook point '.output'"),
        ("model.layers", "is a ModuleList, whose output cannot be hooked"),
        ("model.rotary_emb", "is a LlamaRotaryEmbedding"),
        ("embed_tokens.input", "is a Embedding, whose input cannot be hooked"),
    ],
)
def test_unknown_names_are_one_sentence_with_a_way_on(llama, name, sentence):
    with pytest.raises(UnknownHookPoint, match=sentence) as caught:
        llama.resolve(name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_hook_point_without_a_part_in_the_pass_is_reported(ids):
    lm = tiny("llama")
    lm.model.model.layers[0].mlp.spare = torch.nn.Linear(D, D)
    with pytest.raises(LMError, match=r"mlp\.spare\.output took no part in the forward pass"):
        lm.activations(ids, ["layers.0.mlp.spare", "blocks.0.hook_resid_post"])


@pytest.mark.parametrize(
    ("tokens", "sentence"),
    [
        (torch.zeros(2, 0, dtype=torch.int64), "non-empty"),
        (torch.zeros(7, dtype=torch.int64), "batch, time"),
        (torch.zeros(1, 7), "integers"),
        (torch.zeros(1, 65, dtype=torch.int64), "65 tokens, but llama reads at most 64"),
        (torch.full((1, 2), VOCAB), "Token 50 is outside this model's vocabulary of 50"),
        (torch.full((1, 2), -1), "Token -1 is outside"),
    ],
)
def test_tokens_a_model_cannot_take_are_refused(llama, tokens, sentence):
    with pytest.raises(LMError, match=sentence):
        llama.activations(tokens, ["blocks.0.hook_resid_post"])


def test_padding_does_not_change_the_real_tokens(llama, ids):
    name = "blocks.2.hook_resid_post"
    alone = llama.activations(ids[:, :5], [name])[name]
    mask = torch.tensor([[1] * 5 + [0] * 2] * 2)
    padded = llama.activations(ids, [name], attention_mask=mask)[name]
    torch.testing.assert_close(padded[:, :5], alone)


def test_nested_hooks_apply_in_order_and_activations_sees_the_result(llama, ids):
    name = "blocks.1.hook_resid_post"
    plain = llama.activations(ids, [name])[name]
    with hooked(llama, {name: lambda x: 2 * x}), hooked(llama, {"layers.1": lambda x: x + 1}):
        torch.testing.assert_close(llama.activations(ids, [name])[name], 2 * plain + 1)
    torch.testing.assert_close(llama.activations(ids, [name])[name], plain, rtol=0, atol=0)


def test_hooks_are_gone_after_an_error(llama, ids):
    plain = llama.activations(ids, ["layers.1"])["layers.1"]

    def fail(x: Tensor) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), hooked(llama, {"layers.0": fail}):
        llama.activations(ids, ["layers.1"])
    assert torch.equal(llama.activations(ids, ["layers.1"])["layers.1"], plain)


def test_hook_that_changes_the_shape_is_refused(llama, ids):
    sentence = r"shape \(2, 7, 3\) in place of one of \(2, 7, 16\)"
    with pytest.raises(LMError, match=sentence), hooked(llama, {"layers.0": lambda x: x[..., :3]}):
        llama.activations(ids, ["layers.1"])


def test_two_threads_on_one_model_do_not_see_each_others_hooks(llama, ids):
    """The plain pass of the second thread runs wholly inside the hook of the first, and the other way round."""
    names = ["blocks.0.hook_resid_post", "blocks.2.hook_resid_post"]
    plain = llama.activations(ids, names)
    inside, done = threading.Event(), threading.Event()
    results: dict[str, dict[str, Tensor]] = {}

    def doubled_while_the_other_runs(x: Tensor) -> Tensor:
        inside.set()
        assert done.wait(240)
        return 2 * x

    def steered() -> None:
        with hooked(llama, {names[0]: doubled_while_the_other_runs}):
            results["steered"] = llama.activations(ids, names)

    thread = threading.Thread(target=steered)
    thread.start()
    assert inside.wait(240)
    with hooked(llama, {"blocks.1.hook_resid_post": lambda x: 0 * x}):
        mine = llama.activations(ids, names)
    unhooked = llama.activations(ids, names)
    done.set()
    thread.join(240)

    torch.testing.assert_close(results["steered"][names[0]], 2 * plain[names[0]])
    assert torch.equal(mine[names[0]], plain[names[0]])
    assert not torch.allclose(mine[names[1]], plain[names[1]])
    assert all(torch.equal(unhooked[name], plain[name]) for name in names)
    assert all(torch.equal(llama.activations(ids, names)[name], plain[name]) for name in names)
