"""Corpora that are one JSON array, and what stands beside the messages of a conversation."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests.training.chats import CHATS, jsonl
from training.numerics import corpus_files
from training.numerics.corpus_files import read_documents
from training.numerics.documents import Conversation, CorpusError

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"x": {"type": "number"}}}}


def put(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("piece", [1, 7, 2**20])
def test_an_array_is_read_as_its_lines_would_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indent: int | None, piece: int
) -> None:
    monkeypatch.setattr(corpus_files, "JSON_PIECE", piece)
    rows = [{"id": i, "text": f'Text {i}: ünï\\ "quoted" [ {{ 😀 {"x" * i}'} for i in range(30)]
    array = put(tmp_path, "a.json", "\n " + json.dumps(rows, indent=indent, ensure_ascii=bool(indent)) + "\n")
    assert list(read_documents(array)) == list(read_documents(put(tmp_path, "a.jsonl", jsonl(rows))))
    texts = [row["text"] for row in rows]
    assert list(read_documents(put(tmp_path, "b.json", json.dumps(texts, indent=indent)))) == texts


def test_conversations_and_named_fields_in_an_array(tmp_path: Path) -> None:
    chats = list(read_documents(put(tmp_path, "a.json", json.dumps([{"messages": chat} for chat in CHATS]))))
    assert [list(chat.messages) for chat in chats if isinstance(chat, Conversation)] == CHATS
    assert isinstance(chats[1], Conversation) and chats[1].where == "a.json item 2"
    rows = [{"data": {"body": "one"}}, {"data": {"body": "two"}}]
    assert list(read_documents(put(tmp_path, "b.json", json.dumps(rows)), text_field="data.body")) == ["one", "two"]


def test_json_lines_by_the_name_of_json(tmp_path: Path) -> None:
    rows = [{"text": "one"}, {"text": "two"}]
    assert list(read_documents(put(tmp_path, "a.json", jsonl(rows)))) == ["one", "two"]


@pytest.mark.parametrize(
    "text, says",
    [
        ('{\n "data": ["a"]\n}', "a.json is one JSON object; save its documents as an array"),
        ('"text"', "a.json is not a JSON array: it begins with '\"'"),
        ('["one", "two', "a.json item 2 is not valid JSON (Unterminated string"),
        ('["one", {"text": tru', "a.json item 2 is not valid JSON"),
        ('["one", "two"', "a.json is not a valid JSON array after item 2 (the file ends there: it was cut)"),
        ('["one" "two"]', "a.json is not a valid JSON array after item 1"),
        ('["one", ]', "a.json item 2 is not valid JSON (Expecting value)"),
        ('["one", {"text": x' + " " * 200 + '}, "three"]', "a.json item 2 is not valid JSON (Expecting value)"),
        ('["one"] ["two"]', "a.json goes on after the end of its array"),
        ('["one", 5]', "a.json item 2 holds a value of type int, not text or messages"),
        ('[{"body": 1, "name": 2}]', 'a.json: no field "text" in item 1 (there are: body, name)'),
        ("[]", "a.json holds no text"),
        ("  ", "a.json holds no text"),
        ("[" * 100_000, "a.json item 1 is nested too deeply to be a document"),
    ],
)
def test_a_malformed_array_is_one_sentence(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(CorpusError) as error:
        list(read_documents(put(tmp_path, "a.json", text)))
    assert says in str(error.value)


def test_an_item_that_is_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_files, "MAX_ROW_CHARS", 1000)
    monkeypatch.setattr(corpus_files, "JSON_PIECE", 100)
    with pytest.raises(CorpusError, match=r"a\.json item 2 is longer than 1,000 characters; split it"):
        list(read_documents(put(tmp_path, "a.json", json.dumps(["one", "x" * 5000]))))


def test_memory_holds_one_item_and_not_the_file(tmp_path: Path) -> None:
    file = put(tmp_path, "a.json", json.dumps([f"{i} " + "word " * 4000 for i in range(1500)]))
    assert file.stat().st_size > 28e6
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_documents(file)) == 1500
        assert tracemalloc.get_traced_memory()[1] < 12e6
    finally:
        tracemalloc.stop()


# ---------------------------------------------------------------------------------------------------- beside messages


def documents(folder: Path, rows: list[dict[str, Any]], kind: str) -> list[Any]:
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")
    else:
        put(folder, f"a.{kind}", json.dumps(rows) if kind == "json" else jsonl(rows))
    return list(read_documents(folder / f"a.{kind}"))


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_system_and_tools_beside_messages_belong_to_them(tmp_path: Path, kind: str) -> None:
    rows = [
        {"messages": CHATS[0], "system": "Be brief.", "tools": json.dumps([TOOL])},
        {"messages": CHATS[1], "system": None, "tools": ""},
        {"messages": [{"role": "system", "content": "Its own."}, *CHATS[2]], "system": "Be brief.", "tools": "[]"},
    ]
    first, second, third = documents(tmp_path, rows, kind)
    assert list(first.messages) == [{"role": "system", "content": "Be brief."}, *CHATS[0]] and first.tools == (TOOL,)
    assert list(second.messages) == CHATS[1] and second.tools == ()
    assert third.messages[0]["content"] == "Its own." and len(third.messages) == len(CHATS[2]) + 1


def test_tools_as_objects_lose_what_parquet_filled_in(tmp_path: Path) -> None:
    other = {"type": "function", "function": {"name": "sub", "description": "minus"}}
    rows = [{"messages": CHATS[0], "tools": [TOOL]}, {"messages": CHATS[1], "tools": [other]}]
    assert [chat.tools for chat in documents(tmp_path, rows, "parquet")] == [(TOOL,), (other,)]


def test_a_text_with_a_system_column_is_a_text(tmp_path: Path) -> None:
    rows = [{"text": "plain", "system": "Be brief.", "tools": "not JSON"}]
    for kind in ("jsonl", "parquet"):
        assert documents(tmp_path, rows, kind) == ["plain"]


@pytest.mark.parametrize(
    "beside, says",
    [
        ({"system": {"a": 1}}, 'a.jsonl line 1: "system" holds a value of type dict, not text'),
        ({"tools": "{not json"}, 'a.jsonl line 1: "tools" is text that is not valid JSON'),
        ({"tools": '{"name": "add"}'}, 'a.jsonl line 1: "tools" is not a list of objects'),
        ({"tools": ["add"]}, 'a.jsonl line 1: "tools" is not a list of objects'),
    ],
)
def test_bad_columns_beside_messages_are_one_sentence(tmp_path: Path, beside: dict[str, Any], says: str) -> None:
    with pytest.raises(CorpusError) as error:
        documents(tmp_path, [{"messages": CHATS[0]} | beside], "jsonl")
    assert says in str(error.value)


def test_tools_are_not_lost_by_joining_plainly(tmp_path: Path) -> None:
    (chat,) = documents(tmp_path, [{"messages": CHATS[0], "tools": [TOOL]}], "jsonl")
    with pytest.raises(CorpusError, match=r"a\.jsonl line 1 has tools beside its messages, which joining them plainly"):
        chat.plain()
