"""What the token policy does to a text, and how many characters make a token: with the model's own tokenizer.

The web process may not import transformers, but its tokenizers are plain tokenizer.json files, which the `tokenizers`
library reads by itself in milliseconds, and its chat templates are Jinja, rendered by chat_render. A model without such a file has no preview.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from saes.models import LanguageModel
from training import chat_render
from training.numerics.documents import Conversation, CorpusError, characters
from training.numerics.turns import Span, plain_spans
from training.samples import EXAMPLES, Sampled

SHOWN_TOKENS = 160
LEAD_TOKENS = 24
TOKEN_NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "pad", "sep", "cls", "mask"))
NO_CHOICE = (
    "The corpus holds conversations: put them through the model's chat template, or join their messages plainly. Both are "
    "under Advanced, Tokens."
)


Text = tuple[str, Sequence[Span] | None]


@dataclass(frozen=True)
class PreviewToken:
    """stored: its activation is kept. special: a control token, not text."""

    text: str
    stored: bool
    special: bool = False


@dataclass(frozen=True)
class Example:
    """The beginning of a context: its first tokens, how many more there are, how much padding, and how many come before."""

    tokens: list[PreviewToken]
    more: int
    padding: int
    before: int = 0


@dataclass(frozen=True)
class Preview:
    """The first contexts of a corpus. fault: why there are none, or why a capture would end at one of its rows; a
    sentence, "" where nothing is wrong. characters_per_token: None where no token is known. share: of the tokens that are
    of the chosen roles, None where none are chosen or no token is known."""

    examples: list[Example]
    characters_per_token: float | None
    fault: str = ""
    share: float | None = None

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
    plain_chats: bool = False
    context_length: int = 128
    roles: tuple[str, ...] = ()

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
            bool(get("plain_chats", False)),
            get("context_length", None) or 128,
            tuple(get("roles", None) or ()),
        )


def preview(model: LanguageModel, sample: Sampled, policy: Policy) -> Preview | None:
    """None when the model has no tokenizer.json here, or the sample no tokens."""
    file = tokenizer_file(model)
    if file is None:
        return None
    words = _words(file, file.stat().st_mtime_ns)
    texts, fault = _texts(sample, policy, words)
    made = [words.tokens(text, spans, policy.store_special) for text, spans in texts if text.strip()]
    documents = [tokens for tokens in made if tokens]
    if not documents:
        return Preview([], None, fault) if fault else None
    share = None
    if policy.roles:
        share = sum(token.stored for tokens in documents for token in tokens) / sum(map(len, documents))
    return Preview(_examples(documents, policy, words), _ratio(sample, policy, words, documents), fault, share)


def _texts(sample: Sampled, policy: Policy, words: _Words) -> tuple[list[Text], str]:
    """The texts that are tokenised, each with its characters of the chosen roles (None: all), and what is wrong with the first
    document that has none."""
    chats = (*sample.chats, *sample.shapes)
    if not policy.chat_template:
        if not chats:
            return [(text, None) for text in sample.texts], ""
        return _plain(sample.chats, policy.roles) if policy.plain_chats else ([], NO_CHOICE)
    given: list[dict[str, Any]] = [{"messages": chat.messages, "tools": chat.tools or None} for chat in chats] or [
        {"messages": [{"role": "user", "content": text}], "tools": None} for text in sample.texts
    ]
    shown = len(sample.chats or sample.texts)
    rendered = _rendered(words.template, json.dumps(given), words.names, policy.roles if chats else ())
    fault = next((_fault(chats, i, said) for i, (_, said, _) in enumerate(rendered) if said), "")
    return [(text, spans) for text, _, spans in rendered[:shown] if text], fault


def _fault(chats: tuple[Conversation, ...], number: int, said: str) -> str:
    where = chats[number].where if chats else "the first documents"
    return f"A capture that reaches {where} would end there: {said[0].lower()}{said[1:].rstrip('.')}."


def _plain(chats: tuple[Conversation, ...], roles: Sequence[str]) -> tuple[list[Text], str]:
    try:
        return [(chat.plain(), plain_spans(chat, roles) if roles else None) for chat in chats], ""
    except CorpusError as error:
        return [], str(error)


def _examples(documents: list[list[PreviewToken]], policy: Policy, words: _Words) -> list[Example]:
    between = policy.store_special and not policy.roles  # what is nobody's is of no role
    eos = [PreviewToken(words.eos, between, True)] if words.eos else []
    streams = [[token for document in documents for token in (*document, *eos)]] if policy.packed else documents
    contexts = (context for stream in streams for context in _cut(stream, policy, words))
    if policy.roles:
        contexts = (context for context in contexts if any(token.stored for token in context))
    return [_example(context, policy) for context in itertools.islice(contexts, EXAMPLES)]


def _example(context: list[PreviewToken], policy: Policy) -> Example:
    """What is shown of a context: its beginning; where roles are chosen and come late, from shortly before them."""
    first = next((i for i, token in enumerate(context) if token.stored), 0) if policy.roles else 0
    start = first - LEAD_TOKENS if first >= SHOWN_TOKENS else 0
    shown = context[start : start + SHOWN_TOKENS]
    padding = 0 if policy.packed else policy.context_length - len(context)
    return Example(shown, len(context) - start - len(shown), padding, start)


def _cut(stream: list[PreviewToken], policy: Policy, words: _Words) -> Iterator[list[PreviewToken]]:
    """As numerics.tokens cuts it: BOS before each context, unless it begins with one that a chat template wrote."""
    bos = PreviewToken(words.bos, policy.store_special and not policy.roles, True)
    start = 0
    while start < len(stream):
        own = policy.chat_template and stream[start].text == bos.text and stream[start].special
        first = [bos] if policy.prepend_bos and words.bos and not own else []
        end = start + policy.context_length - len(first)
        yield [*first, *stream[start:end]]
        start = end


def _ratio(sample: Sampled, policy: Policy, words: _Words, documents: list[list[PreviewToken]]) -> float | None:
    """Characters of the corpus for each token: of conversations with what the template adds."""
    if sample.chats:
        return sum(map(characters, sample.chats)) / sum(map(len, documents))
    plain = sum(len(words.tokenizer.encode(text, add_special_tokens=False).ids) for text in sample.texts)
    return sum(map(len, sample.texts)) / plain if plain else None


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
    """A tokenizer, the texts of its BOS and EOS ("" without one), its chat template, and the texts of its special tokens
    by the names that templates use, as JSON."""

    tokenizer: Any
    bos: str
    eos: str
    template: str
    special: frozenset[int]
    names: str

    def tokens(self, text: str, spans: Sequence[Span] | None, store_special: bool) -> list[PreviewToken]:
        """spans: the characters whose tokens are stored; None for all."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        marks = [token in self.special for token in encoding.ids]
        return [
            PreviewToken(text[start:end], _kept(start, end, spans) and (store_special or not mark), mark)
            for (start, end), mark in zip(encoding.offsets, marks, strict=True)
        ]


def _kept(start: int, end: int, spans: Sequence[Span] | None) -> bool:
    return spans is None or any(start < to and end > begin for begin, to in spans)


@lru_cache(maxsize=64)
def _rendered(template: str, chats: str, names: str, roles: tuple[str, ...]) -> list[chat_render.Rendered]:
    """Of each conversation its text, "" where the template cannot be used on it; why; and its characters of the roles. One
    fault when it does not end."""
    asked = {"template": template, "chats": json.loads(chats), "names": json.loads(names), "roles": roles}
    call = [sys.executable, "-I", chat_render.__file__]
    try:
        told = subprocess.run(call, input=json.dumps(asked), capture_output=True, text=True, timeout=60, check=True)
        return [(text, said, spans) for text, said, spans in json.loads(told.stdout)]
    except (subprocess.SubprocessError, ValueError):
        return [("", f"{chat_render.REFUSED}: it takes too long or too much memory", None)]


@lru_cache(maxsize=8)
def _words(file: Path, written: int) -> _Words:
    from tokenizers import Tokenizer

    config = file.with_name("tokenizer_config.json")
    facts = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    beside = file.with_name("chat_template.jinja")
    template = beside.read_text(encoding="utf-8") if beside.is_file() else facts.get("chat_template") or ""
    if isinstance(template, list):
        template = next((one["template"] for one in template if one.get("name") == "default"), "")
    names = {name: _text(facts.get(name)) for name in TOKEN_NAMES if facts.get(name)}
    bos, eos, unknown = (names.get(f"{name}_token", "") for name in ("bos", "eos", "unk"))
    tokenizer = Tokenizer.from_file(str(file))
    added = tokenizer.get_added_tokens_decoder().items()
    special = {number for number, token in added if token.special and token.content != unknown}
    special |= {number for text in (bos, eos) if text and (number := tokenizer.token_to_id(text)) is not None}
    usual = {"bos_token": bos, "eos_token": eos}
    return _Words(tokenizer, bos, eos, template, frozenset(special), json.dumps(usual | names))


def _text(token: Any) -> str:
    return (token.get("content", "") if isinstance(token, dict) else token) or ""
