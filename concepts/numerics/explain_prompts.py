"""What a language model is asked when it is to name a feature, and to tell by the name where the feature fires.

The two questions are those of automated interpretability (Bills et al. 2023; detection as Paulo et al. 2024): the texts on
which a feature fires most, with the tokens marked on which it does, are followed by a description in a few words; then the
description and one text at a time, without marks, are followed by Yes or No. Both come after a few solved cases and as one
text to be continued, which small models and models without training in following instructions do best, and the others
too. No torch, no Django.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

MARKS = "«", "»"
QUOTES = {('"', '"'), ("'", "'"), ("“", "”"), ("`", "`")}
MARKED_SHARE = 0.4  # of a window's largest activation: from there on a token is marked
LONGEST = 120  # characters of a description
DEFINITIONS = {
    "detection_auroc_1": "chance that the language model, given the description, finds Yes likelier (log p(Yes) − log p(No)) "
    "for a text on which the feature fires than for one on which it does not; ties count half; 0.5 is chance",
}

Turn = tuple[str, str]  # a question and its answer

_NAME = (
    "One part of a language model is active on the words between « and » in these texts. "
    "Say in a few words what the marked words have in common."
)
_TELL = "A description of what texts are about, and a text. Does the description fit the text? Answer Yes or No."
_RAIN, _YEAR, _MORE = "rain and bad weather", "the word “in” before a year", "operators that increase a number"
_SOLVED_NAMES = (
    (
        _RAIN,
        "the match was «rained» off and moved to Sunday",
        "a week of «drizzle» and low cloud over the coast",
        "a «storm» warning for the islands",
    ),
    (_MORE, "for (int i = 0; i < n; i«++»)", "count «+=» 1", "total «+=» price * amount"),
    (_YEAR, "she was born «in» 1987 near Lyon", "the bridge opened «in» 1932", "elections were held «in» 2004"),
)
_SOLVED_TELLS = (
    (_RAIN, "the farmers waited for the clouds to bring showers", True),
    (_RAIN, "the bridge opened to traffic in 1932 and is closed", False),
    (_MORE, "return self.name", False),
    (_YEAR, "he joined the company in 1999 and left it", True),
)


def marked(tokens: Sequence[str], activations: Sequence[float]) -> str:
    """The text with « » around each run of tokens on which the feature fires with MARKED_SHARE of the largest value."""
    limit = MARKED_SHARE * max(activations, default=0)
    text, inside = "", False
    for token, value in zip(tokens, activations, strict=True):
        wanted = value > 0 and value >= limit
        if wanted and not inside:
            spaces = token[: len(token) - len(token.lstrip())]
            text, token = text + spaces + MARKS[0], token[len(spaces) :]
        elif inside and not wanted:
            text += MARKS[1]
        text, inside = text + token, wanted
    return text + MARKS[1] * inside


def name_turns(texts: Sequence[str]) -> list[Turn]:
    """Question and answer of the solved cases, and the question about these marked texts with an empty answer."""
    cases = [*((found, cases) for found, *cases in _SOLVED_NAMES), ("", texts)]
    return [(f"{_NAME}\n\n" + "\n".join(f"- {_line(text)}" for text in case), found) for found, case in cases]


def tell_turns(description: str, text: str) -> list[Turn]:
    """The same for: does the description fit the text?"""
    solved = [(_tell(known, case), "Yes" if fits else "No") for known, case, fits in _SOLVED_TELLS]
    return [*solved, (_tell(description, text), "")]


def plain(turns: Sequence[Turn], word: str) -> str:
    """The turns as one text to be continued; `word` goes before each answer."""
    return "\n\n".join(f"{question}\n{word}:{f' {answer}' if answer else ''}" for question, answer in turns)


def _tell(description: str, text: str) -> str:
    return f"{_TELL}\n\nDescription: {_line(description)}\nText: {_line(text)}"


def _line(text: str) -> str:
    return " ".join(text.split())


def cleaned(written: str) -> str:
    """The description in what a model wrote, "" where there is none.

    Its first line, without quotation marks around it and list signs before it. None is a text without a letter, one that
    goes on and on, and one that repeats the question, which are what failed attempts look like.
    """
    lines = written.strip().splitlines()
    text = unicodedata.normalize("NFC", _line(lines[0]) if lines else "")
    text = re.sub(r"^(?:[-*•\s]|\d+[.)]\s)+", "", text).rstrip(".").strip()
    if len(text) > 1 and (text[0], text[-1]) in QUOTES and text[0] not in text[1:-1]:
        text = text[1:-1].strip()
    asks = any(mark in text for mark in MARKS) or "language model is active" in text.casefold()
    odd = asks or len(text) > LONGEST or not text.isprintable()
    return "" if odd or not any(letter.isalpha() for letter in text) else text
