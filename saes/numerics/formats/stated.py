"""What a config, a path or a person states about an SAE, checked where it is read.

A `Stated` is a config file's mapping; its methods give values of one kind or raise FormatError with the file's name.
Facts are what the person who imports knows and the files do not.
"""

import re
from collections.abc import Mapping
from math import isfinite
from typing import Any, NamedTuple

from saes.numerics.formats.files import FormatError, MissingFact, Place

NOT_AN_AUTOENCODER = "not_an_autoencoder"  # metadata: a sentence that says what cannot be done with it
_HUB_CACHE = re.compile(r"models--(.+?)--(.+)")


class Stated(NamedTuple):
    """The mapping in the config `file`. A key that is null counts as one that is not there."""

    file: str
    values: Mapping[str, Any]

    def text(self, key: str, default: str = "") -> str:
        value = self._or(key, default)
        if not isinstance(value, str):
            raise FormatError(f"{key} in {self.file} must be text, but is {value!r:.40}.")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._or(key, default)
        if not isinstance(value, bool):
            raise FormatError(f"{key} in {self.file} must be true or false, but is {value!r:.40}.")
        return value

    def whole(self, key: str, default: int | None = None) -> int | None:
        value = self._or(key, default)
        if value is not None and type(value) is not int:
            raise FormatError(f"{key} in {self.file} must be a whole number, but is {value!r:.40}.")
        return value

    def number(self, key: str, default: float | None = None) -> float | None:
        value = self._or(key, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
            raise FormatError(f"{key} in {self.file} must be a number, but is {value!r:.40}.")
        return float(value)

    def positive(self, key: str) -> float:
        """A number that must be there and above 0."""
        value = self.number(key)
        if value is None or value <= 0:
            raise FormatError(f"{key} in {self.file} must be a number above 0, but is {value!r}.")
        return value

    def texts(self, key: str) -> list[str]:
        value = self.values.get(key)
        if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
            raise FormatError(f"{key} in {self.file} must be a list of names, but is {value!r:.40}.")
        return value

    def inner(self, key: str) -> "Stated":
        """The mapping under a key; an empty one where there is none."""
        value = self._or(key, {})
        if not isinstance(value, dict):
            raise FormatError(f"{key} in {self.file} must be an object, but is {value!r:.40}.")
        return Stated(f"{key} in {self.file}", value)

    def agrees(self, key: str, number: int) -> None:
        """Raises FormatError when the config gives a size that is not the tensors'. Sizes may be left out."""
        said = self.whole(key)
        if said is not None and said != number:
            raise FormatError(f"{self.file} says {key} {said}, but the weights have {number}; one of the two is wrong.")

    def rest(self, *used: str) -> dict[str, Any]:
        """What was not used, to be kept as metadata."""
        return {key: value for key, value in self.values.items() if key not in used}

    def _or(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        return default if value is None else value


def fact_text(facts: Mapping[str, Any], name: str) -> str:
    """A fact that is a text, "" where it was not given."""
    return Stated("the facts", facts).text(name).strip()


def fact_whole(facts: Mapping[str, Any], name: str) -> int | None:
    return Stated("the facts", facts).whole(name)


def fact_positive(facts: Mapping[str, Any], name: str) -> float | None:
    """A fact that is a number above 0, None where it was not given."""
    return None if facts.get(name) is None else Stated("the facts", facts).positive(name)


def k_of(config: Stated, facts: Mapping[str, Any], key: str = "k") -> int:
    """k of a config, or else of the facts. Raises FormatError when they differ, MissingFact when neither says it."""
    said, given = config.whole(key), fact_whole(facts, "k")
    if said is not None and given is not None and said != given:
        raise FormatError(f"{config.file} says {key} {said}, but {given} was given; leave k out to use the file's.")
    k = given if said is None else said
    if k is None:
        raise MissingFact(f"{config.file} does not say k, the number of features kept per row; give it as a fact.", "k")
    return k


def repo_of(place: Place, facts: Mapping[str, Any]) -> str:
    """The repository on the Hub: the fact, or what the Hub's cache calls the folder; "" where neither says it."""
    found = next((hit for part in place.folder.parts if (hit := _HUB_CACHE.fullmatch(part))), None)
    return fact_text(facts, "repo_id") or (f"{found[1]}/{found[2]}" if found else "")


def path_of(place: Place, facts: Mapping[str, Any]) -> str:
    """The SAE's path in its repository: the fact, or the last folders it is in, and its file."""
    return fact_text(facts, "repo_path") or "/".join([*place.folder.parts[-4:], place.entry]).strip("/")


def layer_of(text: str, facts: Mapping[str, Any]) -> int | None:
    """The fact `layer`, or the last "layer_12", "layers.12" or "layer12" of a path, or else the last "-l12"."""
    given = fact_whole(facts, "layer")
    if given is not None:
        return given
    found = re.findall(r"layers?[._]?(\d+)", text, re.IGNORECASE) or re.findall(
        r"-l(\d+)(?![a-z\d])", text, re.IGNORECASE
    )
    return int(found[-1]) if found else None
