"""Reading corpora and packing contexts: what comes out, and one sentence for every kind of bad input."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from training.numerics import corpus_files, tokens
from training.numerics.corpus_files import read_documents
from training.numerics.documents import CorpusError
from training.numerics.tokens import TokenPolicy, iter_contexts, special_ids, stored_mask


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_dir)


def put(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# -- files -----------------------------------------------------


def test_plain_text_is_split_at_form_feeds_and_double_blank_lines(tmp_path):
    path = put(tmp_path, "a.txt", "one\n\nstill one\n\n\ntwo\fthree\r\n\r\n\r\n\r\nfour\n")
    assert list(read_documents(path)) == ["one\n\nstill one", "two", "three", "four"]


def test_a_byte_order_mark_is_not_text(tmp_path):
    assert list(read_documents(put(tmp_path, "a.txt", b"\xef\xbb\xbfhello"))) == ["hello"]


def test_a_long_document_comes_in_pieces_that_lose_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_files, "MAX_DOCUMENT_CHARS", 10)
    text = "abcdefghij" * 3 + "klm"
    assert "".join(read_documents(put(tmp_path, "a.txt", text))) == text
    pieces = list(read_documents(put(tmp_path, "b.jsonl", json.dumps(text))))
    assert "".join(pieces) == text and max(map(len, pieces)) == 10


def test_a_row_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_files, "MAX_ROW_CHARS", 20)
    with pytest.raises(CorpusError, match=r"b.jsonl line 1 is longer than 20 characters"):
        list(read_documents(put(tmp_path, "b.jsonl", json.dumps("x" * 30))))


def test_tables(tmp_path):
    rows = [{"id": 1, "text": 'a "quoted",\nline'}, {"id": 2, "text": "b"}]
    jsonl = put(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)) + '\n\n"bare string"\n')
    csv = put(tmp_path, "a.csv", 'id,text\n1,"a ""quoted"",\nline"\n2,b\n')
    parquet = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), parquet)
    assert list(read_documents(jsonl)) == ['a "quoted",\nline', "b", "bare string"]
    assert list(read_documents(csv)) == list(read_documents(parquet)) == ['a "quoted",\nline', "b"]


def test_the_field_is_chosen_or_the_only_one(tmp_path):
    assert list(read_documents(put(tmp_path, "a.csv", "id,body\n1,hello\n"), text_field="body")) == ["hello"]
    assert list(read_documents(put(tmp_path, "b.csv", "body\nhello\n"))) == ["hello"]


def test_a_csv_field_may_be_longer_than_the_csv_module_allows_by_default(tmp_path):
    long = "x" * 200_000
    assert list(read_documents(put(tmp_path, "a.csv", f"text\n{long}\n"))) == [long]


def test_a_csv_may_be_separated_by_semicolons_or_tabs(tmp_path):
    assert list(read_documents(put(tmp_path, "a.csv", "id;text\n1;a, b\n"))) == ["a, b"]
    assert list(read_documents(put(tmp_path, "b.csv", "id\ttext\n1\ta, b; c\n"))) == ["a, b; c"]
    assert list(read_documents(put(tmp_path, "c.csv", "id,text\n1,a; b\n"))) == ["a; b"]


def test_half_of_a_surrogate_pair_becomes_the_replacement_character(tmp_path, tokenizer):
    file = put(tmp_path, "a.jsonl", '{"text": "cut \\ud83d here, whole \\ud83d\\ude00"}')
    text = "cut \ufffd here, whole \U0001f600"
    assert list(read_documents(file)) == [text]
    ids = next(tokens.iter_documents([text], tokenizer))
    assert tokenizer.decode(ids) == text


def test_a_folder_is_read_in_name_order(tmp_path):
    put(tmp_path, "b.txt", "second")
    put(tmp_path, "a.jsonl", '{"text": "first"}')
    put(tmp_path, ".hidden", b"\x00\xff")
    assert list(read_documents(tmp_path)) == ["first", "second"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.txt", b"\x89PNG\r\n\x1a\n\x00", "a.txt is not UTF-8 text"),
        ("a.txt", "fine\nnot\0fine", "a.txt is not a text file: line 2 holds a zero byte"),
        ("a.txt", "", "a.txt holds no text"),
        ("a.txt", " \n\n\n \n", "a.txt holds no text"),
        ("a.jsonl", '{"text": "a"}\n{"text": ', "a.jsonl line 2 is not valid JSON"),
        ("a.jsonl", '{"id": 1, "body": "a"}', 'no field "text" in line 1 (there are: id, body)'),
        ("a.jsonl", '{"text": "a"}\n{"text": 3}', "a.jsonl line 2 holds a value of type int, not text"),
        ("a.csv", "id,body\n1,a\n", 'no field "text" in the header (there are: id, body)'),
        ("a.csv", "id,text\n1\n", "a.csv line 2 has 1 columns where the header has 2"),
        ("a.csv", 'id,text\n1,"never closed\n2,b\n', "a.csv line 3 is not valid CSV (unexpected end of data)"),
        ("a.parquet", b"PAR1 cut", "a.parquet is not a readable Parquet file"),
        ("a.json", "[]", "a.json holds no text"),
    ],
)
def test_bad_files_get_one_sentence(tmp_path, name, content, sentence):
    with pytest.raises(CorpusError) as caught:
        list(read_documents(put(tmp_path, name, content)))
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_gets_one_sentence(tmp_path):
    with pytest.raises(CorpusError, match="There is no file or folder"):
        list(read_documents(tmp_path / "none.txt"))


# -- contexts -----------------------------------------------------


def encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_packing_joins_documents_by_eos_and_starts_with_bos(tokenizer):
    texts = ["The cat sat on the mat.", "", "Rome", "An exception is raised when the key is missing."]
    stream, owners = [], []
    for index, text in enumerate(texts):
        ids = [*encode(tokenizer, text), tokenizer.eos_token_id] if text else []
        stream += ids
        owners += [index] * len(ids)
    contexts = list(iter_contexts(texts, tokenizer, TokenPolicy(context_length=8)))
    assert len(contexts) == len(stream) // 7
    for i, context in enumerate(contexts):
        assert context.ids.dtype == np.int32
        assert context.ids.tolist() == [tokenizer.bos_token_id, *stream[7 * i : 7 * i + 7]]
        assert (context.document, context.last_document) == (owners[7 * i], owners[7 * i + 6])


def test_packing_without_bos(tokenizer):
    text = "Paris is the capital of France. " * 5
    contexts = list(iter_contexts([text], tokenizer, TokenPolicy(context_length=8, prepend_bos=False)))
    assert np.concatenate([c.ids for c in contexts]).tolist() == encode(tokenizer, text)[: 8 * len(contexts)]


def test_packing_does_not_depend_on_how_texts_are_batched(tokenizer, monkeypatch):
    texts = [f"document {i} is about number {i * i}." for i in range(50)]
    policy = TokenPolicy(context_length=16)
    at_once = [c.ids.tolist() for c in iter_contexts(texts, tokenizer, policy)]
    monkeypatch.setattr(tokens, "_BATCH_CHARS", 1)
    assert [c.ids.tolist() for c in iter_contexts(texts, tokenizer, policy)] == at_once


def test_too_little_text_is_refused(tokenizer):
    with pytest.raises(CorpusError, match=r"The texts give \d+ tokens, fewer than one context of 64"):
        list(iter_contexts(["short"], tokenizer, TokenPolicy(context_length=64)))
    with pytest.raises(CorpusError, match="The texts give 0 tokens"):
        list(iter_contexts([], tokenizer, TokenPolicy(context_length=64)))


def test_bos_needs_a_tokenizer_that_has_one(tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir, bos_token=None)
    with pytest.raises(CorpusError, match="no beginning-of-sequence token"):
        list(iter_contexts(["text"], tokenizer, TokenPolicy()))


@pytest.mark.parametrize("length", [1, 0, -5, 10**6])
def test_context_length_has_bounds(length):
    with pytest.raises(CorpusError, match="The context length is"):
        TokenPolicy(context_length=length)


def test_special_tokens_are_seen_but_not_stored(tokenizer):
    special = special_ids(tokenizer)
    assert special == {tokenizer.bos_token_id, tokenizer.eos_token_id}
    contexts = np.array([[tokenizer.bos_token_id, 5, tokenizer.eos_token_id, 9]])
    assert stored_mask(contexts, TokenPolicy(), special).tolist() == [[False, True, False, True]]
    assert stored_mask(contexts, TokenPolicy(store_special=True), special).all()


def test_an_unknown_token_stands_for_text(tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir, unk_token="a")
    assert tokenizer.unk_token_id in tokenizer.all_special_ids
    assert tokenizer.unk_token_id not in special_ids(tokenizer)
