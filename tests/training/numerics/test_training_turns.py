"""Whose the tokens of a conversation are: held against transformers' own assistant mask, and captured alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from saes.numerics.lm import LM, load_lm
from tests.training.chats import CHATS, chatting
from training.numerics.capture import capture
from training.numerics.documents import Conversation, CorpusError
from training.numerics.shards import CaptureError, open_capture
from training.numerics.tokens import TokenPolicy, iter_contexts, written
from training.numerics.turns import TurnsError, plain_spans, spans_of

HOOK = "blocks.1.hook_resid_post"
OPEN = "{% generation %}"
CLOSE = "{% endgeneration %}"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}" + OPEN + "{{ m.content }}<|im_end|>"
    + CLOSE + "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)  # fmt: skip
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]{% else %}"
    + OPEN + " {{ m.content | trim }}{{ eos_token }}" + CLOSE + "{% endif %}{% endfor %}"
)  # fmt: skip
THINKING = (  # leaves the reasoning of earlier turns out, as reasoning models' templates do
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% set said = m.content %}"
    "{% if m.role == 'assistant' and not loop.last %}{% set said = said.split('</think>')[-1] %}{% endif %}"
    "{% if m.role == 'assistant' %}" + OPEN + "{{ said }}<|im_end|>" + CLOSE + "{% else %}{{ said }}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)  # fmt: skip
COUNTING = (  # each turn says how many there are and repeats what was said: neither way can tell
    "{% for m in messages %}<{{ messages | length }}>{{ m.role }}: {{ m.content }} ({{ m.content }})\n{% endfor %}"
)
REASONED = [
    {"role": "user", "content": "Why is it assistant?"},
    {"role": "assistant", "content": "<think>a while</think>Because."},
    {"role": "user", "content": "assistant"},
    {"role": "assistant", "content": "<think>again</think>assistant"},
]


def write_by(template: str, tokenizer: Any) -> Any:
    def write(messages: Any, **options: Any) -> str:
        return tokenizer.apply_chat_template(list(messages), chat_template=template, tokenize=False, **options)

    return write


@pytest.fixture(scope="module")
def chat_dir(tiny_model_dir, tmp_path_factory) -> Path:
    return chatting(tiny_model_dir, tmp_path_factory.mktemp("turns"), CHATML)


@pytest.fixture(scope="module")
def lm(chat_dir) -> LM:
    return load_lm(chat_dir)


@pytest.fixture(scope="module")
def tokenizer(chat_dir) -> Any:
    return AutoTokenizer.from_pretrained(chat_dir)


def conversations() -> list[Conversation]:
    return [Conversation(tuple(chat), f"chats.jsonl line {i}") for i, chat in enumerate(CHATS, start=1)]


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("template", [CHATML, LLAMA, THINKING])
@pytest.mark.parametrize("chat", [CHATS[0], REASONED])
def test_the_assistants_tokens_are_those_of_transformers(tokenizer, template, chat, marked):
    """transformers needs the marks of {% generation %}; ours are found with and without them."""
    own = template if marked else template.replace(OPEN, "").replace(CLOSE, "")
    tokenizer.chat_template = own
    policy = TokenPolicy(1024, chat_template=True, roles=("assistant",), packed=False, prepend_bos=False)
    (context,) = iter_contexts([Conversation(tuple(chat))], tokenizer, policy)
    peer = tokenizer.apply_chat_template(
        list(chat), chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    n = context.length
    assert context.ids[:n].tolist() == peer["input_ids"] and context.kept is not None
    ids = np.array(peer["input_ids"])
    said = [tokenizer.decode(ids[np.array(mask, dtype=bool)]) for mask in (context.kept[:n], peer["assistant_masks"])]
    for end in ("<|im_end|>", tokenizer.eos_token):  # counts where the generation prompt tells where the turn begins
        said = ["".join(text.replace(end, "").split()) for text in said]  # a space may be the template's or the turn's
    assert said[0] == said[1] != ""


def test_a_content_that_reads_like_its_header_is_not_mistaken(tokenizer):
    text, spans = spans_of(REASONED, ["assistant"], write_by(CHATML, tokenizer))
    assert [text[a:b] for a, b in spans] == [
        "<think>a while</think>Because.<|im_end|>", "<think>again</think>assistant<|im_end|>",
    ]  # fmt: skip
    text, spans = spans_of(REASONED, ["user"], write_by(CHATML, tokenizer))
    assert [text[a:b] for a, b in spans] == ["Why is it assistant?", "assistant"]


def test_tool_calls_are_the_assistants(tokenizer):
    template = CHATML.replace(
        "{{ m.content }}<|im_end|>" + CLOSE, "{{ m.content }}{{ m.tool_calls }}<|im_end|>" + CLOSE
    )
    chat = [CHATS[0][0], {"role": "assistant", "content": "", "tool_calls": [{"name": "look"}]}]
    text, ((start, end),) = spans_of(chat, ["assistant"], write_by(template, tokenizer))
    assert text[start:end] == "[{'name': 'look'}]<|im_end|>"


@pytest.mark.parametrize("roles", [["assistant"], ["user"], ["user", "assistant"]])
def test_a_template_that_does_not_let_turns_be_told_apart_is_refused(tokenizer, roles):
    with pytest.raises(TurnsError, match=r"does not let the tokens of message [12] .* be told from the rest; keep"):
        spans_of(CHATS[0], roles, write_by(COUNTING, tokenizer))
    tokenizer.chat_template = COUNTING
    policy = TokenPolicy(chat_template=True, roles=tuple(roles))
    with pytest.raises(
        CorpusError, match=r"^chats\.jsonl line 1: the model's chat template does not let the tokens of"
    ):
        list(written(conversations(), tokenizer, policy))


def test_messages_joined_plainly_keep_their_contents(tokenizer):
    chat = conversations()[3]
    text, spans = chat.plain(), plain_spans(chat, ["assistant"])
    assert [text[a:b] for a, b in spans] == [m["content"] for m in chat.messages if m["role"] == "assistant"]


@pytest.mark.parametrize(
    ("policy", "documents", "says"),
    [
        ({"chat_template": True}, ["a text"], "Document 1 is a text, which has no roles; keep the tokens of all."),
        ({"plain_chats": True}, ["a text"], "Document 1 is a text, which has no roles"),
    ],
)
def test_texts_have_no_roles(tokenizer, policy, documents, says):
    with pytest.raises(CorpusError) as caught:
        list(written(documents, tokenizer, TokenPolicy(roles=("assistant",), **policy)))
    assert says in str(caught.value)


def test_roles_need_conversations_that_become_text():
    with pytest.raises(CorpusError, match="choose how these become text"):
        TokenPolicy(roles=("assistant",))
    assert "roles" not in TokenPolicy().facts(), "captures that were begun before go on"


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("way", ["chat_template", "plain_chats"])
def test_a_capture_of_one_role_is_part_of_the_capture_of_all(lm, tmp_path, packed, way):
    policy = TokenPolicy(context_length=32, packed=packed, **{way: True})
    own = TokenPolicy(**{**policy.facts(), "roles": ("assistant",)})
    for name, each in (("all", policy), ("own", own)):
        capture(lm, conversations(), [HOOK], tmp_path / name, policy=each, shard_tokens=256)
    capture(lm, conversations(), [HOOK], tmp_path / "stream", policy=own, stored=False, shard_tokens=256)
    every, some, stream = (open_capture(tmp_path / name) for name in ("all", "own", "stream"))
    assert some.manifest["policy"]["roles"] == ["assistant"]
    assert np.array_equal(every.contexts(), some.contexts()), "the model reads the same"
    kept = np.zeros(some.contexts().shape, dtype=bool)
    for _, context, position in some.rows(HOOK):
        kept[context, position] = True
    again = list(iter_contexts(conversations(), lm.tokenizer, TokenPolicy(**some.manifest["policy"])))
    special = np.isin(every.contexts(), some.manifest["special_ids"])
    assert np.array_equal(kept, np.stack([one.kept for one in again if one.kept is not None]) & ~special), "rebuilt"
    x = [rows for rows, context, position in every.rows(HOOK)]
    at = [(context, position) for _, context, position in every.rows(HOOK)]
    mask = np.concatenate([kept[context, position] for context, position in at])
    mine = torch.cat([rows for rows, _, _ in some.rows(HOOK)])
    assert 0 < len(mine) < every.n_rows and torch.equal(torch.cat(x)[torch.from_numpy(mask)], mine)
    assert torch.equal(torch.cat([rows for rows, _, _ in stream.rows(HOOK)]), mine)
    seen = lm.tokenizer.decode(some.contexts()[kept])
    assert "Paris" in seen and "What" not in seen and "Why" not in seen


def test_special_tokens_of_a_turn_are_stored_where_special_tokens_are(lm, tmp_path):
    policy = TokenPolicy(32, store_special=True, chat_template=True, roles=("assistant",))
    capture(lm, conversations(), [HOOK], tmp_path / "c", policy=policy)
    made = open_capture(tmp_path / "c")
    positions = np.concatenate([position for _, _, position in made.rows(HOOK)])
    assert (positions > 0).all(), "a BOS before a context is nobody's"


def test_a_role_without_tokens_leaves_nothing(lm, tmp_path):
    policy = TokenPolicy(32, chat_template=True, roles=("tool",))
    with pytest.raises(CaptureError, match="No conversation has a token of tool"):
        capture(lm, conversations(), [HOOK], tmp_path / "c", policy=policy)
    assert not (tmp_path / "c").exists()
