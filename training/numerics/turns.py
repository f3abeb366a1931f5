"""Whose the characters of a conversation's text are. Without torch.

A chat template is a program that writes a text of a conversation; it does not say which message wrote what. Two ways of
asking tell it, for templates with and without {% generation %} marks:

- A turn of the assistant begins where the text of the messages before it ends, written with `add_generation_prompt`, and ends
  where the text of the messages up to it ends: what the model itself would have written, its end mark included.
- The content of any message stands where a mark stands that the template was given in its place.

Either counts only where the text of the whole conversation agrees with it, character by character before and behind. A
template that does not write a message the same way whatever comes after it (one that leaves out earlier reasoning, say) fails
the first and may pass the second. One that fails both is refused: nothing is guessed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from training.numerics.documents import Conversation

Span = tuple[int, int]  # from one character to before another
Message = Mapping[str, Any]
Write = Callable[..., str]  # (messages, add_generation_prompt=False) -> text; raises ValueError
ASSISTANT = "assistant"
MARK = "zqTheTurnStandsHereqz"


class TurnsError(ValueError):
    """The template does not let turns be told apart; the message is one sentence."""


def spans_of(messages: Sequence[Message], roles: Sequence[str], write: Write) -> tuple[str, tuple[Span, ...]]:
    """The conversation's text, and which of its characters are of messages of these roles, in order.

    Raises TurnsError, and what `write` raises of the whole conversation.
    """
    whole = write(messages)
    if MARK in whole:
        raise TurnsError(f"A message holds {MARK}, by which turns are told apart; take it out.")
    spans = []
    for number, message in enumerate(messages):
        if message["role"] not in roles:
            continue
        found = message["role"] == ASSISTANT and _turn(messages, number, whole, write)
        found = found or _content(messages, number, whole, write)
        if not found:
            raise TurnsError(
                f"The model's chat template does not let the tokens of message {number + 1} ({message['role']}) be told from "
                "the rest; keep the tokens of all roles, or join messages plainly."
            )
        spans.append(found)
    return whole, tuple(spans)


def plain_spans(chat: Conversation, roles: Sequence[str]) -> tuple[Span, ...]:
    """The same of `Conversation.plain`: the contents of these roles' messages."""
    return tuple(span for role, span in _plain(chat) if role in roles)


def _plain(chat: Conversation) -> Iterator[tuple[str, Span]]:
    at = 0
    for message in chat.messages:
        start = at + len(f"{message['role']}: ")
        at = start + len(message["content"])
        yield message["role"], (start, at)
        at += len("\n\n")


def _turn(messages: Sequence[Message], number: int, whole: str, write: Write) -> Span | None:
    """From behind the generation prompt to the end of the turn, without the line's end that the template writes after it."""
    try:
        before = write(messages[:number])
        opened, closed = write(messages[:number], add_generation_prompt=True), write(messages[: number + 1])
    except ValueError:  # templates refuse conversations that end, or begin, as these do
        return None
    if len(opened) <= len(before) or not (closed.startswith(opened) and whole.startswith(closed)):
        return None
    return len(opened), max(len(opened), len(closed.rstrip()))


def _content(messages: Sequence[Message], number: int, whole: str, write: Write) -> Span | None:
    """Where the template writes the content."""
    marked = {**messages[number], "content": MARK}
    try:
        text = write([*messages[:number], marked, *messages[number + 1 :]])
    except ValueError:
        return None
    before, mark, behind = text.partition(MARK)
    fits = len(before) + len(behind) <= len(whole) and whole.startswith(before) and whole.endswith(behind)
    if not mark or MARK in behind or not fits:
        return None
    return len(before), len(whole) - len(behind)
