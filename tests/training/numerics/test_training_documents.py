"""Conversations as documents: read from files, made into tokens; held against transformers' own chat tokens."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from saes.numerics.lm import load_lm
from tests.training.chats import CHATS, chatting, jsonl, sharegpt
from training.numerics.capture import capture
from training.numerics.corpus_files import read_documents
from training.numerics.documents import Conversation, CorpusError
from training.numerics.shards import open_capture
from training.numerics.tokens import TokenPolicy, Written, iter_contexts, iter_documents, written

HOOK = "blocks.1.hook_resid_post"


def put(folder: Path, name: str, content: str) -> Path:
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return path


def messages_of(path: Path, field: str | None = None) -> list[list[dict[str, Any]]]:
    found = list(read_documents(path, text_field=field))
    assert all(isinstance(one, Conversation) for one in found)
    return [list(one.messages) for one in found if isinstance(one, Conversation)]


@pytest.fixture(scope="module")
def chat_dir(tiny_model_dir, tmp_path_factory) -> Path:
    return chatting(tiny_model_dir, tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def tokenizer(chat_dir) -> Any:
    return AutoTokenizer.from_pretrained(chat_dir)


# -- files -----------------------------------------------------


def test_every_form_of_a_file_gives_the_same_conversations(tmp_path):
    shared = [sharegpt(chat) for chat in CHATS]
    files = [
        put(tmp_path, "a.jsonl", jsonl([{"id": i, "messages": chat} for i, chat in enumerate(CHATS)])),
        put(tmp_path, "b.jsonl", jsonl([{"id": i, "conversations": chat} for i, chat in enumerate(shared)])),
        put(tmp_path, "c.jsonl", jsonl(CHATS)),
        put(tmp_path, "d.jsonl", jsonl([{"id": i, "data": {"chat": chat}} for i, chat in enumerate(CHATS)])),
        tmp_path / "e.parquet",
        tmp_path / "f.parquet",
        tmp_path / "g.parquet",
    ]
    number = list(range(len(CHATS)))
    pq.write_table(pa.table({"id": number, "messages": CHATS}), files[4], row_group_size=7)
    pq.write_table(pa.table({"id": number, "conversations": shared}), files[5])
    pq.write_table(pa.table({"id": number, "data": [{"chat": chat, "n": 1} for chat in CHATS]}), files[6])
    for file in files:
        assert messages_of(file, "data.chat" if file.stem in "dg" else None) == CHATS, file.name


def test_a_row_is_known_by_file_and_number(tmp_path):
    file = put(tmp_path, "a.jsonl", "\n" + jsonl([{"messages": CHATS[0]}, {"messages": []}, {"messages": CHATS[1]}]))
    found = list(read_documents(file))
    assert [one.where for one in found if isinstance(one, Conversation)] == ["a.jsonl line 2", "a.jsonl line 4"]


def test_what_else_a_message_holds_is_kept_and_nulls_of_parquet_are_not(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]}
    parts = {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]}
    file = put(tmp_path, "a.jsonl", jsonl([{"messages": [parts, call]}]))
    assert messages_of(file) == [[{"role": "user", "content": "one two"}, call | {"content": ""}]]
    mixed = [[{"role": "user", "content": "a", "name": "Ada"}, {"role": "assistant", "content": "b", "name": None}]]
    pq.write_table(pa.table({"messages": mixed}), tmp_path / "b.parquet")
    assert messages_of(tmp_path / "b.parquet") == [
        [{"role": "user", "content": "a", "name": "Ada"}, {"role": "assistant", "content": "b"}]
    ]


def test_text_comes_before_messages_and_a_name_before_both(tmp_path):
    file = put(tmp_path, "a.jsonl", jsonl([{"text": "plain", "messages": CHATS[0]}]))
    assert list(read_documents(file)) == ["plain"]
    assert messages_of(file, "messages") == [CHATS[0]]


CHAT = {"messages": CHATS[0]}


@pytest.mark.parametrize(
    "rows, field, says",
    [
        ([{"text": "a"}, CHAT], None, "a.jsonl line 2 holds a conversation and a.jsonl line 1 text; keep texts and"),
        ([CHAT, {"text": "a"}], None, "a.jsonl line 2 holds text and a.jsonl line 1 a conversation; keep texts and"),
        ([CHAT, "bare text"], None, "a.jsonl line 2 holds text and a.jsonl line 1 a conversation"),
        ([CHAT, {"messages": ["hi", "ho"]}], None, 'line 2: message 1 is a str, not an object with "role" and'),
        (
            [{"messages": [{"speaker": "x", "content": "y"}]}],
            None,
            'message 1 has no "role" (it has: speaker, content)',
        ),
        ([{"messages": [{"role": "user", "content": 3}]}], None, "message 1 holds a content of type int, not text"),
        (
            [{"conversations": [{"from": "narrator", "value": "y"}]}],
            None,
            'message 1 is from "narrator"; known are human',
        ),
        (
            [{"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}],
            None,
            "message 1 holds a part of type image; only text can be read",
        ),
        (
            [{"meta": {"body": "x", "n": 1}}],
            None,
            "line 1 holds several fields (body, n), not text or messages; name one",
        ),
        (
            [{"meta": {"body": "x", "n": 1}, "id": 2}],
            "meta.text",
            'no field "meta.text" in line 1 (there are: meta.body, meta.n, id)',
        ),
    ],
)
def test_rows_that_are_neither_get_one_sentence(tmp_path, rows, field, says):
    with pytest.raises(CorpusError) as caught:
        list(read_documents(put(tmp_path, "a.jsonl", jsonl(rows)), text_field=field))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_table_with_nested_columns_lists_them_and_reads_one(tmp_path):
    table = pa.table(
        {"id": [1, 2], "data": [{"text": "first", "meta": {"n": 1}}, {"text": "second", "meta": {"n": 2}}]}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(CorpusError) as caught:
        list(read_documents(tmp_path / "a.parquet"))
    assert "(there are: id, data, data.text, data.meta, data.meta.n)" in str(caught.value)
    assert list(read_documents(tmp_path / "a.parquet", text_field="data.text")) == ["first", "second"]
    with pytest.raises(CorpusError, match=r"row 1 holds several fields \(text, meta\)"):
        list(read_documents(tmp_path / "a.parquet", text_field="data"))


# -- tokens -----------------------------------------------------


def conversations() -> list[Conversation]:
    return [Conversation(tuple(chat), f"chats.jsonl line {number}") for number, chat in enumerate(CHATS, start=1)]


def test_the_template_gives_the_tokens_that_transformers_gives(tokenizer):
    own = [tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"] for chat in CHATS]
    made = iter_documents(conversations(), tokenizer, TokenPolicy(chat_template=True, prepend_bos=False))
    assert [ids.tolist() for ids in made] == own


def test_a_text_is_the_message_of_a_user(tokenizer):
    policy = TokenPolicy(chat_template=True, prepend_bos=False)
    message = Conversation(({"role": "user", "content": "Why?"},))
    assert list(written(["Why?"], tokenizer, policy)) == list(written([message], tokenizer, policy))


def test_messages_joined_plainly(tokenizer):
    (made,) = written(conversations()[:1], tokenizer, TokenPolicy(plain_chats=True))
    text = made.text
    assert text.startswith("user: What is the capital of number 0?\n\nassistant: Paris is")
    assert text.endswith("\n\nuser: Why?\n\nassistant: The cat sat on the mat.")
    assert list(written(["a text"], tokenizer, TokenPolicy(plain_chats=True))) == [Written("a text")]
    calls = Conversation(({"role": "assistant", "content": "", "tool_calls": [{}]},), "a.jsonl line 3")
    with pytest.raises(CorpusError, match=r"a\.jsonl line 3: message 1 calls tools, which joining"):
        list(written([calls], tokenizer, TokenPolicy(plain_chats=True)))


@pytest.mark.parametrize(
    "policy, messages, says",
    [
        ({}, CHATS[0], "b.jsonl line 9 is a conversation; put it through the model's chat template, or join"),
        (
            {"chat_template": True},
            [{"role": "system", "content": "Be brief."}, *CHATS[0]],
            "b.jsonl line 9: the model's chat template does not take these messages: System role not supported.",
        ),
        (
            {"chat_template": True},
            [*CHATS[0], {"role": "assistant", "content": "again"}],
            "b.jsonl line 9: the model's chat template does not take these messages: Roles must alternate.",
        ),
    ],
)
def test_what_cannot_become_text_is_named_by_its_row(tokenizer, policy, messages, says):
    with pytest.raises(CorpusError) as caught:
        list(written([Conversation(tuple(messages), "b.jsonl line 9")], tokenizer, TokenPolicy(**policy)))
    assert says in str(caught.value)


def test_a_policy_says_one_thing():
    with pytest.raises(CorpusError, match="choose one of the two"):
        TokenPolicy(chat_template=True, plain_chats=True)
    assert (
        "plain_chats" not in TokenPolicy().facts() and TokenPolicy(**TokenPolicy(plain_chats=True).facts()).plain_chats
    )


@pytest.mark.parametrize("packed", [True, False])
def test_contexts_of_a_capture_are_rebuilt_from_the_conversations(chat_dir, tokenizer, tmp_path, packed):
    policy = TokenPolicy(context_length=32, chat_template=True, packed=packed)
    lm = load_lm(chat_dir)
    manifest = capture(lm, conversations(), [HOOK], tmp_path / "c", policy=policy, shard_tokens=256)
    assert manifest is not None and manifest["policy"]["chat_template"]
    made = open_capture(tmp_path / "c")
    again = list(iter_contexts(conversations(), tokenizer, policy))
    assert np.array_equal(made.contexts(), np.stack([context.ids for context in again]))
    assert made.documents().tolist() == [context.document for context in again]
    own = [tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"] for chat in CHATS]
    bos = tokenizer.bos_token_id
    if packed:
        rebuilt, stream = [], [token for ids in own for token in (*ids, tokenizer.eos_token_id)]
        while len(rebuilt) < made.n_contexts:
            n = 32 if stream[0] == bos else 31  # a BOS that the template wrote is not doubled
            rebuilt.append(([bos] if n == 31 else []) + stream[:n])
            stream = stream[n:]
        assert made.contexts().tolist() == rebuilt and len(stream) < 32
        assert rebuilt[0][1] != bos and any(bos in row[1:] for row in rebuilt), (
            "also where a chat begins within a context"
        )
    else:
        lengths = made.lengths()
        assert lengths is not None
        rows = [made.contexts()[i, : lengths[i]].tolist() for i in range(made.n_contexts) if made.documents()[i] == 3]
        assert rows[0] == own[3][:32] and [row[0] for row in rows] == [bos] * len(rows)
        assert rows[0] + [token for row in rows[1:] for token in row[1:]] == own[3]


def test_a_template_that_refuses_a_late_row_leaves_nothing_half_made(chat_dir, tmp_path):
    system = Conversation(({"role": "system", "content": "Be brief."}, *CHATS[0]), "chats.jsonl line 41")
    with pytest.raises(CorpusError, match=r"chats\.jsonl line 41: the model's chat template does not take"):
        policy = TokenPolicy(context_length=32, chat_template=True)
        capture(load_lm(chat_dir), [*conversations(), system], [HOOK], tmp_path / "c", policy=policy)
    assert not (tmp_path / "c" / "manifest.json").exists()
