"""Configs in YAML: read by the safe loader, within limits, into what JSON has."""

from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import Any

import yaml

from saes.numerics.formats.files import MAX_JSON_DEPTH, FormatError

MAX_BYTES = 256_000
MAX_ALIASES = 64
MAX_NODES = 20_000  # counted where aliases stand for the same values again


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises FormatError: too large, too deep, not YAML, tags that ask for objects."""
    if not path.is_file():
        raise FormatError(f"{path.name} is missing.")
    if path.stat().st_size > MAX_BYTES:
        raise FormatError(f"{path.name} is larger than {MAX_BYTES:,} bytes, which no SAE's config is.")
    value = parse_yaml(path.name, path.read_bytes())
    if not isinstance(value, dict):
        raise FormatError(f"{path.name} must hold a mapping, but holds a {type(value).__name__}.")
    return value


def parse_yaml(name: str, data: bytes) -> Any:
    """What the bytes of a YAML file say; `name` is for sentences. Raises FormatError."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _check_events(name, yaml.parse(data, Loader=loader))
        return _as_json(name, yaml.load(data, Loader=loader))  # the safe loader: plain values only
    except yaml.constructor.ConstructorError as error:
        raise FormatError(f"{name} asks for a Python object, which is never made ({error.problem}).") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(
            f"{name} is not readable YAML ({next(iter(str(error).splitlines()), type(error).__name__):.160})."
        ) from error


def _as_json(name: str, value: Any) -> Any:
    """The same with what JSON does not have (dates, bytes, numbers that are not finite) as text, so that it can be kept."""
    nodes = 0

    def plain(value: Any) -> Any:
        nonlocal nodes
        nodes += 1
        if nodes > MAX_NODES:
            raise FormatError(f"{name} stands for more than {MAX_NODES:,} values, which no SAE's config does.")
        if isinstance(value, dict):
            return {str(key): plain(child) for key, child in value.items()}
        if isinstance(value, list):
            return [plain(child) for child in value]
        return value if value is None or isinstance(value, str | int) or _is_finite(value) else str(value)

    return plain(value)


def _is_finite(value: Any) -> bool:
    return isinstance(value, float) and isfinite(value)


def _check_events(name: str, events: Iterator[Any]) -> None:
    """Depth, aliases and tags, before anything is made of them: nested aliases can stand for any amount of data."""
    depth = aliases = 0
    for event in events:
        tag = getattr(event, "tag", None)
        if tag and ("python" in tag or not tag.startswith("tag:yaml.org,2002:")):
            raise FormatError(f"{name} carries the tag {tag!r:.80}, which asks for more than plain values.")
        aliases += isinstance(event, yaml.AliasEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.ScalarEvent) and event.value == "<<":
            raise FormatError(f"{name} merges mappings (<<), which no SAE's config does.")
        if aliases > MAX_ALIASES:
            raise FormatError(f"{name} has more than {MAX_ALIASES} aliases, which no SAE's config has.")
        if depth > MAX_JSON_DEPTH:
            raise FormatError(f"{name} is nested too deeply.")
