"""YAML documents of what can be made here: a line `key: value` for each setting. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

import yaml

from saehub.plain import REFUSED, storable

MOST_CHARACTERS = 100_000


class DocumentError(ValueError):
    """A document that says nothing that can be made; the message is one sentence."""


def to_yaml(document: Mapping[str, Any]) -> str:
    """A line `key: value` for each key, lists in brackets: a document to read and to edit."""
    return "".join(
        yaml.safe_dump(
            {key: value},
            allow_unicode=True,
            width=10_000,
            default_flow_style=None if isinstance(value, list) else False,
        )
        for key, value in document.items()
    )


def from_yaml(text: str, keys: Collection[str]) -> dict[str, Any]:
    """Its settings, all of `keys`. Raises DocumentError, naming the line or the key."""
    if len(text) > MOST_CHARACTERS:
        raise DocumentError(f"The document is longer than {MOST_CHARACTERS:,} characters.")
    try:
        # a few nested aliases can stand for more text than there is memory
        aliases = any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader))
        found = None if aliases else yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        raise DocumentError(f"This is not YAML{f' (line {mark.line + 1})' if mark else ''}.") from error
    if aliases:
        raise DocumentError("A document has no aliases (*name): write each value where it belongs.")
    if not isinstance(found, dict):
        raise DocumentError("A document is a list of `key: value` lines, such as `seed: 3`.")
    if not storable(found):
        raise DocumentError(REFUSED)
    unknown = [str(key) for key in found if key not in keys]
    if unknown:
        raise DocumentError(f"There is no setting {unknown[0]}; the settings are {', '.join(keys)}.")
    for key, value in found.items():
        try:
            json.dumps(value, allow_nan=False)  # rows keep their settings as JSON
        except (TypeError, ValueError):
            raise DocumentError(f"{key} is neither a text, a number, true or false nor a list of them.") from None
    return found


def errors_of(form: Any, names: Mapping[str, str]) -> list[str]:
    """A form's errors, a line each, by the document's names. names: the form's, where they differ."""
    return [
        f"{names.get(name, name)}: {text}" if name != "__all__" else str(text)
        for name, errors in form.errors.items()
        for text in errors
    ]
