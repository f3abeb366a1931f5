"""Typed readers of environment variables that fail loudly.

Every knob SAEHub has is read here once, by `settings.py`; `KNOBS` collects them, and a test holds README's table against it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass


class BadKnob(SystemExit):
    """An environment variable holds something its reader cannot use; the message says which and what it wants."""


@dataclass(frozen=True)
class Knob:
    name: str
    default: str
    help: str


KNOBS: list[Knob] = []


def text(name: str, default: str, help: str) -> str:
    KNOBS.append(Knob(name, default, help))
    return os.environ.get(name, "") or default


def integer(name: str, default: int, help: str, *, least: int = 0) -> int:
    raw = text(name, str(default), help)
    try:
        value = int(raw)
    except ValueError:
        raise BadKnob(f"{name} must be a whole number, not {raw!r}.") from None
    if value < least:
        raise BadKnob(f"{name} must be at least {least}, not {value}.")
    return value


def flag(name: str, default: bool, help: str) -> bool:
    raw = text(name, "1" if default else "0", help).lower()
    if raw in {"1", "true", "yes", "on"}:
        return True
    if raw in {"0", "false", "no", "off"}:
        return False
    raise BadKnob(f"{name} must be 1 or 0, not {raw!r}.")


def words(name: str, default: str, help: str) -> list[str]:
    return [word for word in text(name, default, help).replace(",", " ").split() if word]
