"""Generation against recomputation without a cache, alone and beside others; prompts that cannot be taken."""

import threading
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch

from inference.numerics.generate import GenerationError, PromptError, generate, prompt_ids
from inference.numerics.steer import SCOPES, Edit, Steering, steering_hooks
from saes.numerics.lm import hooked
from tests.tiny_models import FAMILIES, RESID, tiny_lm, tiny_sae

PROMPT = "Paris is the capital of"


@lru_cache
def family_lm(family: str, folder: Any) -> Any:
    lm = tiny_lm(family, folder)
    lm.tokenizer.chat_template = "<bos>{{ messages[0]['content'] }}"
    return lm


TEMPLATE = (
    "{% for message in messages %}<bos>{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}answer:{% endif %}"
)


def steer(scope: str = "all", feature: int = 11, value: float = 4.0, seed: str = "topk") -> Steering:
    return Steering(tiny_sae(seed), "blocks.0.hook_resid_post", [Edit(feature, "add", value)], scope)  # type: ignore[arg-type]


@torch.no_grad()
def without_cache(lm: Any, ids: list[int], count: int, steering: list[Steering]) -> tuple[list[int], list[float]]:
    """Greedy ids and log-probabilities, the whole text computed anew for every token."""
    text, logprobs = list(ids), []
    control = lambda start, n: [token == 0 for token in text[start : start + n]]  # noqa: E731
    with hooked(lm, steering_hooks(lm, steering, len(ids), special=control)):
        for _ in range(count):
            scores = lm.model(torch.tensor([text]), use_cache=False).logits[0, -1].log_softmax(0)
            text.append(int(scores.argmax()))
            logprobs.append(float(scores.max()))
    return text[len(ids) :], logprobs


@pytest.mark.parametrize("scope", ["none", *SCOPES])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_recomputation_without_a_cache(scope: str, family: str, tiny_model_dir: Any) -> None:
    """Two SAEs in two layers, on every family; windows of sliding attention are shorter than the text."""
    lm = family_lm(family, tiny_model_dir)
    steering = [] if scope == "none" else [steer(scope), Steering(tiny_sae("standard"), RESID, [Edit(5, "clamp", 6.0)])]
    if steering and scope == "from":
        steering[0] = replace(steering[0], first=6)
    made = generate(
        lm, [{"content": PROMPT}] if scope == "not_special" else PROMPT, steering=steering, max_new_tokens=12
    )
    ids, logprobs = without_cache(lm, made.prompt_ids, len(made.ids), steering)
    assert made.ids == ids and (scope != "not_special" or made.prompt_ids[0] == 0)
    assert made.logprobs == pytest.approx(logprobs, abs=1e-4)


def test_scopes_differ(lm: Any) -> None:
    plain, everywhere, generated = (
        generate(lm, PROMPT, steering=s, max_new_tokens=8) for s in ([], [steer("all")], [steer("generated")])
    )
    assert everywhere.logprobs[0] != plain.logprobs[0]
    assert generated.logprobs[0] == plain.logprobs[0]  # the first token comes from untouched prompt positions
    assert generated.logprobs[1:] != plain.logprobs[1:]


def test_steering_without_edits_is_bit_identical(lm: Any) -> None:
    plain = generate(lm, PROMPT, max_new_tokens=10)
    same = generate(lm, PROMPT, steering=[Steering(tiny_sae(), RESID)], max_new_tokens=10)
    assert (same.ids, same.logprobs) == (plain.ids, plain.logprobs)


def test_seeded_sampling_is_private(lm: Any) -> None:
    one = generate(lm, PROMPT, max_new_tokens=16, temperature=1.0, seed=3)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert generate(lm, PROMPT, max_new_tokens=16, temperature=1.0, seed=3).ids == one.ids
    assert torch.equal(torch.get_rng_state(), state)
    assert generate(lm, PROMPT, max_new_tokens=16, temperature=1.0, seed=4).ids != one.ids


def test_the_smallest_temperature_is_greedy(lm: Any) -> None:
    greedy = generate(lm, PROMPT, max_new_tokens=8)
    assert generate(lm, PROMPT, max_new_tokens=8, temperature=5e-324).ids == greedy.ids


def test_two_at_once_get_what_they_would_get_alone(lm: Any) -> None:
    """Different edits of one shared SAE, and one without any, many times over, in threads that run the same model."""
    sae = tiny_sae()
    requests = [
        [],
        [Steering(sae, "blocks.0.hook_resid_post", [Edit(11, "add", 6.0)])],
        [Steering(sae, "blocks.0.hook_resid_post", [Edit(20, "clamp", 9.0)], "generated")],
    ]
    alone = [generate(lm, PROMPT, steering=steering, max_new_tokens=24) for steering in requests]
    together: list[list[Any]] = [[] for _ in requests]
    start = threading.Barrier(len(requests))

    def run(i: int) -> None:
        start.wait()
        for _ in range(3):
            together[i].append(generate(lm, PROMPT, steering=requests[i], max_new_tokens=24))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, made in enumerate(together):
        assert len(made) == 3
        for one in made:
            assert one.ids == alone[i].ids
            assert one.logprobs == pytest.approx(alone[i].logprobs, abs=1e-5)
    assert len({tuple(made.logprobs) for made in alone}) == len(requests)


def test_streams_what_it_returns(lm: Any) -> None:
    seen: list[tuple[int, str]] = []
    reports: list[tuple[int, int | None, str]] = []
    made = generate(
        lm, PROMPT, max_new_tokens=40, temperature=3.0, on_token=lambda *t: seen.append(t),
        progress=lambda *r: reports.append(r),
    )  # fmt: skip
    assert [id for id, _ in seen] == made.ids
    assert "".join(made.pieces) == made.text
    assert [piece for _, piece in seen][:-1] == made.pieces[:-1]
    whole = lm.tokenizer.decode(made.prompt_ids + made.ids, skip_special_tokens=True)
    assert whole == PROMPT + made.text
    assert reports[-1][0] == len(made.ids)
    assert made.tokens_per_second == pytest.approx(len(made.ids) / made.seconds)
    assert made.prompt_tokens[0] == "P" or "".join(made.prompt_tokens) == PROMPT


def test_characters_of_several_tokens_come_whole(llama: Any) -> None:
    from inference.numerics.generate import _Decoder

    prompt = llama.tokenizer("é 日")["input_ids"]
    new = llama.tokenizer(" ok 😀本!")["input_ids"]
    decoder = _Decoder(llama.tokenizer, prompt)
    pieces = [decoder.push(i) for i in new]
    assert "".join(pieces) == " ok 😀本!"
    assert "😀" in pieces
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    decoder.push(llama.tokenizer("😀")["input_ids"][0])
    assert decoder.finish()[-1] == "\N{REPLACEMENT CHARACTER}"


def test_a_nul_that_a_model_writes_can_be_stored(llama: Any) -> None:
    from inference.numerics.generate import _Decoder

    decoder = _Decoder(llama.tokenizer, llama.tokenizer("one")["input_ids"])
    pieces = [decoder.push(token) for token in llama.tokenizer(" a\0b")["input_ids"]]
    assert "".join(pieces) == " a<0x00>b" and "<0x00>" in pieces


def test_stops_at_end_of_sequence(llama: Any) -> None:
    first = generate(llama, PROMPT, max_new_tokens=6)
    assert first.stopped == "length"
    before = llama.model.generation_config.eos_token_id
    llama.model.generation_config.eos_token_id = [1, first.ids[0]]
    try:
        made = generate(llama, PROMPT, max_new_tokens=6)
    finally:
        llama.model.generation_config.eos_token_id = before
    assert made.ids == first.ids[:1]
    assert made.stopped == "eos"


class Stop(Exception):
    pass


def test_stopping_leaves_no_hook(lm: Any) -> None:
    plain = generate(lm, PROMPT, max_new_tokens=4)

    def stop(done: int, total: int | None, step: str) -> None:
        raise Stop

    with pytest.raises(Stop):
        generate(lm, PROMPT, steering=[steer()], max_new_tokens=4, progress=stop)
    assert generate(lm, PROMPT, max_new_tokens=4).logprobs == plain.logprobs


# ---------------------------------------------------------------------------------------------------- prompts


def test_policy_is_the_tokenizers(llama: Any) -> None:
    ids, policy = prompt_ids(llama, PROMPT)
    assert ids == llama.tokenizer(PROMPT)["input_ids"]
    assert (policy.n_prompt_tokens, policy.bos, policy.chat_template) == (len(ids), False, False)
    assert prompt_ids(llama, "<bos>" + PROMPT)[1].bos


def test_chat_goes_through_the_template(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = [{"role": "user", "content": "What is the capital?"}]
    with pytest.raises(PromptError, match="tiny-llama has no chat template"):
        generate(llama, messages)
    monkeypatch.setattr(llama.tokenizer, "chat_template", TEMPLATE)
    ids, policy = prompt_ids(llama, messages)
    assert llama.tokenizer.decode(ids) == "<bos>user: What is the capital?\nanswer:"
    assert (policy.bos, policy.chat_template) == (True, True)
    assert generate(llama, messages, max_new_tokens=3).prompt_ids == ids
    monkeypatch.setattr("saes.numerics.chat.TEMPLATE_SECONDS", 0.2)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    monkeypatch.setattr(llama.tokenizer, "chat_template", endless)
    with pytest.raises(PromptError, match=r"not done after 0\.2 s of computing"):
        prompt_ids(llama, [{"role": "user", "content": "hi"}])
    monkeypatch.setattr(llama.tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(PromptError, match=r"does not take these messages: roles must alternate\."):
        generate(llama, messages)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        ({"prompt": ""}, PromptError, "The prompt is empty"),
        ({"prompt": []}, PromptError, "The chat is empty"),
        ({"prompt": [{"role": "user", "content": ""}]}, PromptError, "The chat is empty"),
        ({"prompt": PROMPT, "max_new_tokens": 300}, PromptError, "300 new ones .* reads at most 256 in all"),
        ({"prompt": PROMPT, "max_new_tokens": 0}, GenerationError, "choose one from 1 to 4,096"),
        ({"prompt": PROMPT, "temperature": float("nan")}, GenerationError, "The temperature is nan"),
        ({"prompt": PROMPT, "temperature": -1.0}, GenerationError, "The temperature is -1.0"),
        ({"prompt": PROMPT, "seed": -1}, GenerationError, "The seed is -1"),
    ],
)
def test_bad_input(call: dict[str, Any], error: type[Exception], sentence: str, llama: Any) -> None:
    with pytest.raises(error, match=sentence):
        generate(llama, **call)


def test_a_huge_prompt_is_refused(llama: Any) -> None:
    with pytest.raises(PromptError, match=r"The prompt has 100,000 tokens .* reads at most 256"):
        generate(llama, "!" * 100_000)


def test_edits_beyond_float_range_are_named(llama: Any) -> None:
    edits = [Edit(i, "add", 3e38) for i in range(20)]
    with pytest.raises(GenerationError, match="no longer finite numbers; use smaller steering values"):
        generate(llama, PROMPT, steering=[Steering(tiny_sae(), RESID, edits)], max_new_tokens=2)
