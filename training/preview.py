"""What the token policy does to a text, and how many characters make a token: with the model's own tokenizer.

The web process may not import transformers, but its tokenizers are plain tokenizer.json files, which the `tokenizers`
library reads by itself in milliseconds, and its chat templates are Jinja, rendered by chat_render. A model without such a file has no preview.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from saes.models import LanguageModel
from training import chat_render

SHOWN_TOKENS = 48
EXAMPLES = 3
BETWEEN_DOCUMENTS = "\n\n\n"  # in a corpus's sample, as between the documents of a plain text


@dataclass(frozen=True)
class PreviewToken:
    """stored: its activation is kept. special: a control token, not text."""

    text: str
    stored: bool
    special: bool = False


@dataclass(frozen=True)
class Example:
    """The beginning of a context: its first tokens, how many more there are, and how much padding."""

    tokens: list[PreviewToken]
    more: int
    padding: int


@dataclass(frozen=True)
class Preview:
    """The first contexts of a text."""

    examples: list[Example]
    characters_per_token: float

    @property
    def tokens(self) -> list[PreviewToken]:
        return self.examples[0].tokens


@dataclass(frozen=True)
class Policy:
    """The fields of a capture, or of its form, that decide what is shown."""

    prepend_bos: bool = True
    store_special: bool = False
    packed: bool = True
    chat_template: bool = False
    context_length: int = 128

    @classmethod
    def of(cls, values: Any) -> Policy:
        """From a capture or the clean fields of its form; what is missing or empty is as usual."""
        get = values.get if isinstance(values, dict) else lambda name, usual: getattr(values, name, usual)
        packed = get("packed", True)
        return cls(
            bool(get("prepend_bos", True)),
            bool(get("store_special", False)),
            packed not in (False, "0"),
            bool(get("chat_template", False)),
            get("context_length", None) or 128,
        )


def preview(model: LanguageModel, sample: str, policy: Policy) -> Preview | None:
    """None when the model has no tokenizer.json or chat template here, or the sample no tokens."""
    file = tokenizer_file(model)
    if file is None or not sample.strip():
        return None
    words = _words(file, file.stat().st_mtime_ns)
    texts = sample.split(BETWEEN_DOCUMENTS)
    plain = sum(len(words.tokenizer.encode(text, add_special_tokens=False).ids) for text in texts)
    if policy.chat_template:
        chats = _chats(words.template, tuple(texts), words.bos, words.eos)
        texts = [chat.removeprefix(words.bos) if policy.prepend_bos else chat for chat in chats if chat]
    documents = [tokens for text in texts if (tokens := words.tokens(text, policy.store_special))]
    if not plain or not documents:
        return None
    bos = [PreviewToken(words.bos, policy.store_special, True)] if policy.prepend_bos and words.bos else []
    eos = [PreviewToken(words.eos, policy.store_special, True)] if words.eos else []
    length = max(policy.context_length - len(bos), 1)
    if policy.packed:
        stream = [token for document in documents for token in (*document, *eos)]
        contexts = [stream[start : start + length] for start in range(0, len(stream), length)]
    else:
        contexts = [tokens[start : start + length] for tokens in documents for start in range(0, len(tokens), length)]
    examples = []
    for context in contexts[:EXAMPLES]:
        shown = [*bos, *context]
        padding = 0 if policy.packed else policy.context_length - len(shown)
        examples.append(Example(shown[:SHOWN_TOKENS], max(len(shown) - SHOWN_TOKENS, 0), padding))
    return Preview(examples, len(sample) / plain)


def can_chat(model: LanguageModel) -> bool:
    """Whether the model's tokenizer has a chat template; True where its files are not here to ask."""
    file = tokenizer_file(model)
    return file is None or bool(_words(file, file.stat().st_mtime_ns).template)


def tokenizer_file(model: LanguageModel) -> Path | None:
    if model.source != LanguageModel.Source.HUB:
        file = Path(model.load_from) / "tokenizer.json"
        return file if file.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model.location, "tokenizer.json", revision=model.revision or None)
    return Path(found) if isinstance(found, str) else None


@dataclass(frozen=True)
class _Words:
    """A tokenizer, the texts of its BOS and EOS ("" without one), and its chat template."""

    tokenizer: Any
    bos: str
    eos: str
    template: str
    special: frozenset[int]

    def tokens(self, text: str, store_special: bool) -> list[PreviewToken]:
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        marks = [token in self.special for token in encoding.ids]
        return [
            PreviewToken(text[start:end], store_special or not mark, mark)
            for (start, end), mark in zip(encoding.offsets, marks, strict=True)
        ]


@lru_cache(maxsize=64)
def _chats(template: str, texts: tuple[str, ...], bos: str, eos: str) -> list[str]:
    """Each text as a user's message; "" where the template cannot be used, nothing when it does not end."""
    asked = {"template": template, "texts": texts, "bos_token": bos, "eos_token": eos}
    call = [sys.executable, "-I", chat_render.__file__]
    try:
        told = subprocess.run(call, input=json.dumps(asked), capture_output=True, text=True, timeout=60, check=True)
        return [str(text) for text in json.loads(told.stdout)]
    except (subprocess.SubprocessError, ValueError):
        return []


@lru_cache(maxsize=8)
def _words(file: Path, written: int) -> _Words:
    from tokenizers import Tokenizer

    config = file.with_name("tokenizer_config.json")
    facts = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    beside = file.with_name("chat_template.jinja")
    template = beside.read_text(encoding="utf-8") if beside.is_file() else facts.get("chat_template") or ""
    if isinstance(template, list):
        template = next((one["template"] for one in template if one.get("name") == "default"), "")
    bos, eos, unknown = (_text(facts.get(f"{name}_token")) for name in ("bos", "eos", "unk"))
    tokenizer = Tokenizer.from_file(str(file))
    added = tokenizer.get_added_tokens_decoder().items()
    special = {number for number, token in added if token.special and token.content != unknown}
    special |= {number for text in (bos, eos) if text and (number := tokenizer.token_to_id(text)) is not None}
    return _Words(tokenizer, bos, eos, template, frozenset(special))


def _text(token: Any) -> str:
    return (token.get("content", "") if isinstance(token, dict) else token) or ""
