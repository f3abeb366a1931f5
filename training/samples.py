"""The beginning of a corpus, kept with its row: what its page shows, and what captures are previewed on. Without torch.

Of texts it is the beginnings of the first, BETWEEN_DOCUMENTS them. Of conversations it is a line of JSON each: {"where",
"messages", "tools"}; after the first ones, {"shape": true} beside it, come the first of every other succession of roles (a system
message, a tool's, two of a user in a row), because that is what chat templates refuse, and better before a capture than in it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from training.numerics.documents import Conversation, Document

SAMPLE_CHARACTERS = 6000
EXAMPLES = 3
SHAPES = 24  # successions of roles that are looked for
SHAPE_CHARACTERS = 120  # of a message of a conversation that is kept for its roles
MOST_MESSAGES = 200  # of a conversation in a sample
BETWEEN_DOCUMENTS = "\n\n\n"  # in a corpus's sample, as between the documents of a plain text


@dataclass(frozen=True)
class Sampled:
    """texts, or conversations; `shapes` are those kept for their roles, to be tried and not shown."""

    texts: tuple[str, ...] = ()
    chats: tuple[Conversation, ...] = ()
    shapes: tuple[Conversation, ...] = ()

    @property
    def roles(self) -> list[str]:
        """Those of its conversations, in the order in which they come."""
        chats = (*self.chats, *self.shapes)
        return list(dict.fromkeys(message["role"] for chat in chats for message in chat.messages))

    @property
    def all_shapes(self) -> bool:
        """Whether no succession of roles was left out for want of room."""
        return len(self.shapes) < SHAPES


class Sample:
    """Collects it, document by document."""

    def __init__(self) -> None:
        self.text = ""
        self.chats = False
        self._known: set[Any] = set()
        self._shapes = ""

    def add(self, document: Document) -> None:
        room = min(SAMPLE_CHARACTERS - len(self.text), SAMPLE_CHARACTERS // EXAMPLES)
        if isinstance(document, str):
            self.text += (
                (BETWEEN_DOCUMENTS if self.text else "") + document[:room].replace("\0", "") if room > 0 else ""
            )
            return
        self.chats = True
        shape = _shape(document)
        if room > 0:
            self.text += _line(_cut(document, room))
        elif shape not in self._known and len(self._known) < SHAPES:
            self._shapes += _line(_cut(document, None), shape=True)
        self._known.add(shape)

    def finish(self) -> dict[str, Any]:
        """The columns of the corpus."""
        return {"sample": self.text + self._shapes, "chats": self.chats}


def sampled(sample: str, chats: bool) -> Sampled:
    """What a corpus's `sample` holds."""
    if not chats:
        return Sampled(texts=tuple(sample.split(BETWEEN_DOCUMENTS)))
    # not splitlines(): JSON leaves U+2028 and its like as they are, which that takes for ends of lines too
    rows = [json.loads(line) for line in sample.split("\n") if line]
    made = [
        (Conversation(tuple(row["messages"]), row["where"], tuple(row.get("tools", ()))), bool(row.get("shape")))
        for row in rows
    ]
    return Sampled(
        chats=tuple(chat for chat, shape in made if not shape), shapes=tuple(chat for chat, shape in made if shape)
    )


def _shape(chat: Conversation) -> frozenset[tuple[str, str]]:
    """Which role follows which, and whether there are tools."""
    roles = [message["role"] for message in chat.messages]
    return frozenset(zip(["", *roles], roles, strict=False)) | ({("tools", "")} if chat.tools else frozenset())


def _cut(chat: Conversation, room: int | None) -> Conversation:
    """Its first messages within so many characters; without a number all of them, each cut."""
    kept: list[dict[str, Any]] = []
    for message in chat.messages[:MOST_MESSAGES]:
        if room is not None and room <= 0:
            break
        content = message["content"][: SHAPE_CHARACTERS if room is None else room]
        whole = len(json.dumps(message, default=str)) <= SAMPLE_CHARACTERS
        kept.append({**(message if whole else {"role": message["role"]}), "content": content})
        room = None if room is None else room - len(content)
    whole = len(json.dumps(chat.tools, default=str)) <= SAMPLE_CHARACTERS
    return Conversation(tuple(kept), chat.where, chat.tools if whole else ())


def _line(chat: Conversation, **more: Any) -> str:
    made = {"where": chat.where, "messages": chat.messages} | ({"tools": chat.tools} if chat.tools else {}) | more
    return json.dumps(made, ensure_ascii=False, default=str).replace("\\u0000", "") + "\n"
