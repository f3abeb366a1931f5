"""What makes a run's form a sweep's: fields with several values, and the runs that they mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import product
from typing import Any

from django import forms
from django.core.exceptions import ValidationError

from saehub.figures import exact_text

AXES = ("hook_name", "k", "l1_coefficient", "l0_coefficient", "target_l0", "d_sae", "seed")
MOST_RUNS = 64


class NumbersField(forms.CharField):
    """A number, or several with commas between them. The clean value is a list; empty when the field is."""

    def __init__(self, kind: type[int] | type[float], least: float, most: float, **kwargs: Any) -> None:
        super().__init__(max_length=400, **kwargs)
        self.kind, self.least, self.most = kind, least, most
        self.widget.attrs |= {"inputmode": "decimal", "autocomplete": "off"}

    def prepare_value(self, value: Any) -> Any:
        """What the input shows: numbers with commas between."""
        numbers = value if isinstance(value, list | tuple) else [value]
        if not all(isinstance(number, int | float) for number in numbers):
            return value
        return ", ".join(f"{number:g}" if isinstance(number, float) else str(number) for number in numbers)

    def to_python(self, value: Any) -> list[Any]:  # type: ignore[override]
        if isinstance(value, list | tuple):
            value = ", ".join(map(str, value))
        words = str(value if value is not None else "").replace(";", ",").replace(",", " ").split()
        numbers = [self._number(word) for word in words]
        return list(dict.fromkeys(numbers))

    def _number(self, word: str) -> float | int:
        try:
            number = self.kind(word)
        except ValueError:
            raise ValidationError(
                f"{word} is not a {'whole ' if self.kind is int else ''}number; give one, or several with commas."
            ) from None
        if not self.least <= number <= self.most:
            raise ValidationError(f"{word} is not between {exact_text(self.least)} and {exact_text(self.most)}.")
        return number


def points(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One dict of single values for each run: the product of the axes that have several.

    values: axis -> a value or a list of them; an empty list means that the axis has none.
    """
    axes = {name: _listed(values.get(name)) for name in AXES}
    given = {name: found for name, found in axes.items() if found}
    return [dict(zip(given, combination, strict=True)) for combination in product(*given.values())]


def grid(values: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The axes that have more than one value."""
    return {name: found for name in AXES if len(found := _listed(values.get(name))) > 1}


def _listed(value: Any) -> list[Any]:
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def in_words(axes: Mapping[str, Iterable[Any]]) -> str:
    """ "k 16, 32 × d_sae 4096, 8192" """
    return " × ".join(f"{name} {', '.join(map(str, values))}" for name, values in axes.items())
