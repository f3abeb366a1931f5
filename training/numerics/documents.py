"""What a row of a corpus is: a text, or a conversation of messages. Without torch.

A conversation is a list of messages in one of two forms: {"role", "content"}, as most datasets and all chat templates have
it, or ShareGPT's {"from", "value"}, whose names of speakers are read as in SPEAKERS. All else that a message of the first
form holds (tool_calls, name, ...) is kept for the template. A dataset may keep a conversation's system message and the
tools that it may call in columns of their own ("system", "tools") beside the messages. A corpus is of one kind: all texts, or all conversations.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

MAX_CONVERSATION_CHARS = 1_000_000  # a conversation is rendered whole, so that it cannot be cut as a text can
SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "assistant": "assistant", "model": "assistant", "system": "system", "tool": "tool", "observation": "tool",
    "function_response": "tool",
}  # fmt: skip
FIELDS = (
    "text",
    "messages",
    "conversations",
    "conversation",
)  # columns that are read where none is named, in this order


class CorpusError(ValueError):
    """The texts cannot be used as they are; the message is one sentence for the person who chose them."""


@dataclass(frozen=True)
class Conversation:
    """messages: dicts with "role" and "content", both text. where: its file and row, for sentences about it. tools: what
    the assistant may call, each as its dataset describes it, for the chat template."""

    messages: tuple[dict[str, Any], ...]
    where: str = "the conversation"
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def n_characters(self) -> int:
        return sum(len(message["content"]) for message in self.messages)

    def plain(self) -> str:
        """Its messages one after the other, each as `role: content`, an empty line between two.

        Raises CorpusError for tools and for messages that call them, which would be lost."""
        if self.tools:
            raise CorpusError(
                f"{self.where} has tools beside its messages, which joining them plainly would leave out; put the "
                "conversations through the chat template."
            )
        for number, message in enumerate(self.messages, start=1):
            if message.get("tool_calls"):
                raise CorpusError(
                    f"{self.where}: message {number} calls tools, which joining messages plainly would leave out; put the "
                    "conversations through the chat template."
                )
        return "\n\n".join(f"{message['role']}: {message['content']}" for message in self.messages)


Document = str | Conversation
BESIDE = ("system", "tools")  # columns that belong to the messages of their row


@dataclass(frozen=True)
class Beside:
    """The messages of a row, and what its columns of BESIDE hold for them."""

    messages: list[Any]
    system: Any = None
    tools: Any = None


def characters(document: Document) -> int:
    """Of a text, or of all messages."""
    return len(document) if isinstance(document, str) else document.n_characters


def field_of(file: str, columns: Iterable[str], field: str | None, where: str) -> str:
    """The column that is read: the one that is named, else the first of FIELDS that is there, else the only one.

    Raises CorpusError, listing what there is."""
    names = list(columns)
    usual = next((name for name in FIELDS if name in names), names[0] if len(names) == 1 else FIELDS[0])
    wanted = field or usual
    if wanted in names:
        return wanted
    listed = ", ".join(names[:12]) + (" …" if len(names) > 12 else "") if names else "none"
    raise CorpusError(
        f'{file}: no field "{wanted}" in {where} (there are: {listed}); name the field with the text or the messages.'
    )


class Kinds:
    """Makes documents of a corpus's rows and sees that all are of one kind; empty rows are of none."""

    def __init__(self) -> None:
        self._first: tuple[bool, str] | None = None

    def document(self, value: Any, where: str) -> Document:
        """Raises CorpusError, naming the row."""
        made = document_of(value, where)
        if isinstance(made, str) and not made.strip():
            return made
        chat = isinstance(made, Conversation)
        self._first = self._first or (chat, where)
        if chat != self._first[0]:
            now, before = ("a conversation", "text") if chat else ("text", "a conversation")
            raise CorpusError(
                f"{where} holds {now} and {self._first[1]} {before}; keep texts and conversations in a corpus each."
            )
        return made


def document_of(value: Any, where: str) -> Document:
    """A value of a row as a text or a conversation; "" for nothing. Raises CorpusError, naming the row."""
    beside = value if isinstance(value, Beside) else Beside([])
    value = value.messages if isinstance(value, Beside) else value
    if value is None:
        return ""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, dict):
        names = ", ".join(map(str, list(value)[:6]))
        raise CorpusError(
            f"{where} holds several fields ({names}), not text or messages; name one, as in column.field."
        )
    if not isinstance(value, list):
        raise CorpusError(f"{where} holds a value of type {type(value).__name__}, not text or messages.")
    messages = tuple(_message(message, f"{where}: message {number}") for number, message in enumerate(value, start=1))
    if not any(message["content"].strip() or message.get("tool_calls") for message in messages):
        return ""
    made = Conversation(_with_system(messages, beside.system, where), where, _tools(beside.tools, where))
    if made.n_characters > MAX_CONVERSATION_CHARS:
        raise CorpusError(f"{where}: the conversation is longer than {MAX_CONVERSATION_CHARS:,} characters; split it.")
    return made


def _with_system(messages: tuple[dict[str, Any], ...], system: Any, where: str) -> tuple[dict[str, Any], ...]:
    """The column's system message before the others; where they begin with one of their own, that one holds."""
    if not system or messages[0]["role"] == "system":
        return messages
    if not isinstance(system, str):
        raise CorpusError(f'{where}: "system" holds a value of type {type(system).__name__}, not text.')
    return ({"role": "system", "content": clean(system)}, *messages) if system.strip() else messages


def _tools(value: Any, where: str) -> tuple[dict[str, Any], ...]:
    """A list of objects, or the JSON of one."""
    found = value
    if isinstance(value, str):
        try:
            found = json.loads(value) if value.strip() else None
        except json.JSONDecodeError as error:
            raise CorpusError(f'{where}: "tools" is text that is not valid JSON ({error.msg}).') from error
    if not found:
        return ()
    if not isinstance(found, list) or not all(isinstance(tool, Mapping) for tool in found):
        raise CorpusError(f'{where}: "tools" is not a list of objects, each of which describes a tool.')
    if len(json.dumps(found, default=str)) > MAX_CONVERSATION_CHARS:
        raise CorpusError(f'{where}: "tools" is longer than {MAX_CONVERSATION_CHARS:,} characters.')
    return tuple(_given(found))


def _given(value: Any) -> Any:
    """Without what is null: Parquet fills in what other rows have."""
    if isinstance(value, Mapping):
        return {name: _given(part) for name, part in value.items() if part is not None}
    return [_given(part) for part in value] if isinstance(value, list) else value


def clean(text: str) -> str:
    """Half of a surrogate pair, as JSON can hold one where a text was cut within an emoji, becomes U+FFFD: no tokenizer
    takes it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _message(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise CorpusError(f'{where} is a {type(value).__name__}, not an object with "role" and "content".')
    given = {key: part for key, part in value.items() if part is not None}  # Parquet fills in what other rows have
    if "role" not in given and "from" in given:
        if given["from"] not in SPEAKERS:
            raise CorpusError(f'{where} is from "{given["from"]}"; known are {", ".join(SPEAKERS)}.')
        return {"role": SPEAKERS[given["from"]], "content": _content(given.get("value"), where)}
    role = given.get("role")
    if not isinstance(role, str) or not role:
        names = ", ".join(map(str, list(given)[:6])) or "nothing"
        raise CorpusError(f'{where} has no "role" (it has: {names}); messages have "role" and "content".')
    return {**given, "role": clean(role), "content": _content(given.get("content"), where)}


def _content(value: Any, where: str) -> str:
    """A text, or a list of parts that are all text; "" for none, as beside tool calls."""
    if value is None:
        return ""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, list) and all(isinstance(part, Mapping) for part in value):
        other = next((part.get("type") for part in value if not isinstance(part.get("text"), str)), None)
        if other is None and all(isinstance(part.get("text"), str) for part in value):
            return clean("".join(part["text"] for part in value))
        raise CorpusError(f"{where} holds a part of type {other}; only text can be read.")
    raise CorpusError(f"{where} holds a content of type {type(value).__name__}, not text.")
