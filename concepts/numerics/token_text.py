"""What a token looks like to a person: real text where its bytes are text, `<0xE2>` where they are not.

Byte-level tokenizers (GPT-2, Llama 3, SmolLM, ...) spell every byte as one printable character, sentencepiece ones
(Llama 2, Gemma, ...) write a space as U+2581 and fall back to `<0xE2>` for single bytes. Both are undone here, token by
token; leading spaces are kept. A character split over several tokens stays visible as its bytes.
"""

import json
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPLIT = re.compile(r"(?:<0x[89A-F][0-9A-F]>)+")  # bytes of a character that lies over several tokens


def token_texts(tokenizer: Any, ids: Iterable[int]) -> list[str]:
    """The text of every id. Ids the tokenizer does not know (padded embedding rows) come out as `<token 50300>`."""
    whole = list(ids)
    added = tokenizer.added_tokens_decoder
    read = _bytes_of_byte_level if _is_byte_level(tokenizer) else _bytes_of_piece
    pieces = tokenizer.convert_ids_to_tokens(whole)
    return [_text(number, piece, number in added, read) for number, piece in zip(whole, pieces, strict=True)]


def vocabulary_texts(tokenizer: Any) -> list[str]:
    """The text of every token of the tokenizer, added ones included, by id."""
    return token_texts(tokenizer, range(len(tokenizer)))


def _text(number: int, piece: str | None, added: bool, read: Any) -> str:
    if piece is None:
        return f"<token {number}>"
    return piece if added and not _BYTE_TOKEN.fullmatch(piece) else show_bytes(read(piece))


def show_nul(text: str) -> str:
    """The text with `<0x00>` for every NUL, which neither a database's text nor a page can hold."""
    return text.replace("\0", "<0x00>")


def show_bytes(raw: bytes) -> str:
    """UTF-8 text; every byte that is not part of a whole character is shown as `<0xE2>`, and NUL as `<0x00>`."""
    shown = ""
    while raw:
        try:
            return show_nul(shown + raw.decode())
        except UnicodeDecodeError as error:
            shown += raw[: error.start].decode() + "".join(f"<0x{byte:02X}>" for byte in raw[error.start : error.end])
            raw = raw[error.end :]
    return show_nul(shown)


def joined(texts: Iterable[str]) -> str:
    """Texts of tokens as one text, in which the bytes of characters that lie over several tokens are characters again."""
    return _SPLIT.sub(lambda match: show_bytes(bytes.fromhex(re.sub("<0x|>", "", match[0]))), "".join(texts))


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return False
    decoder = json.loads(backend.decoder.__getstate__())
    return any(part["type"] == "ByteLevel" for part in [decoder, *decoder.get("decoders", [])])


def _bytes_of_piece(piece: str) -> bytes:
    if match := _BYTE_TOKEN.fullmatch(piece):
        return bytes([int(match[1], 16)])
    return piece.replace("▁", " ").encode("utf-8", "surrogatepass")


def _bytes_of_byte_level(piece: str) -> bytes:
    try:
        return piece.translate(_byte_of_character()).encode("latin-1")
    except UnicodeEncodeError:  # a piece from outside the alphabet, put there by hand
        return piece.encode()


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[int, int]:
    """GPT-2's byte-level alphabet: printable Latin-1 bytes stand for themselves, the other 68 are U+0100 onwards."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {0x100 + i: byte for i, byte in enumerate(others)}
