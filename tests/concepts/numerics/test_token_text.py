"""Every token as text where it is text, and as bytes where it is not."""

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from concepts.numerics.token_text import show_bytes, token_texts, vocabulary_texts


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (b"", ""),
        ("a é 本".encode(), "a é 本"),
        (b" \xe2\x80", " <0xE2><0x80>"),
        (b"\xa9", "<0xA9>"),
        (b"a\xffb\xc3\xa9", "a<0xFF>bé"),
        (b"a\x00b\xff", "a<0x00>b<0xFF>"),
    ],
)
def test_show_bytes(raw: bytes, shown: str) -> None:
    assert show_bytes(raw) == shown


def test_byte_level(llama: Any) -> None:
    text = "Paris is é\n\t😀"
    texts = token_texts(llama.tokenizer, llama.tokenizer(text).input_ids)
    assert "Paris" in "".join(texts)
    assert texts[-6:] == ["\n", "\t", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]


def test_every_byte_comes_back(llama: Any) -> None:
    """Read `<0x..>` back as bytes: the whole text is there, byte by byte."""
    text = "The cat: naïve, 日本, 😀!\n"
    raw = b""
    for piece in token_texts(llama.tokenizer, llama.tokenizer(text).input_ids):
        raw += bytes.fromhex(piece[3:5]) if piece.startswith("<0x") else piece.encode()
    assert raw.decode() == text


def test_special_and_unknown_ids(llama: Any) -> None:
    n = len(llama.tokenizer)
    assert token_texts(llama.tokenizer, [0, 1, n + 5]) == ["<bos>", "<eos>", f"<token {n + 5}>"]
    assert len(vocabulary_texts(llama.tokenizer)) == n


def test_sentencepiece_style() -> None:
    vocabulary = {"<unk>": 0, "<s>": 1, "▁the": 2, "cat": 3, "<0x0A>": 4, "<0xE2>": 5, "▁▁": 6}
    raw = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", unk_token="<unk>")
    assert vocabulary_texts(tokenizer) == ["<unk>", "<s>", " the", "cat", "\n", "<0xE2>", "  "]
