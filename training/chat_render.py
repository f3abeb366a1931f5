"""Chat templates in a process of their own: `python chat_render.py` reads JSON from stdin and writes a list of [text, fault,
spans].

A template is a program of the model's author. Jinja's sandbox keeps it from files and from Python, but not from running for
ever or from taking all memory; here the kernel does. What templates may use is what transformers gives them.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

SECONDS = 3  # of computing
MEMORY = 2**30
REFUSED = "the model's chat template does not take it"


Rendered = tuple[str, str, list[tuple[int, int]] | None]


def render(
    template: str, chats: list[dict[str, Any]], names: dict[str, str], roles: Sequence[str] = ()
) -> list[Rendered]:
    """Of each conversation its text, "", and which characters are of the roles (None without roles); or "", why the template
    cannot be used on it, None. chats: {"messages", "tools"}."""
    from training.numerics.turns import TurnsError, spans_of

    made: list[Rendered] = []
    compiled: Any = None
    for given in chats:
        try:
            compiled = compiled or _environment().from_string(template)
            write = _writer(compiled, given["tools"], names)
            if roles:
                text, spans = spans_of(given["messages"], roles, write)
                made.append((text, "", list(spans)))
            else:
                made.append((write(given["messages"]), "", None))
        except TurnsError as error:
            made.append(("", str(error), None))
        except Exception as error:  # whatever its author made it raise
            made.append(("", f"{REFUSED}: {' '.join(str(error).split())[:300] or type(error).__name__}", None))
    return made


def _writer(compiled: Any, tools: Any, names: dict[str, str]) -> Any:
    def write(messages: Sequence[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        told = {"messages": messages, "tools": tools, "documents": None, **names}
        try:
            return str(compiled.render(add_generation_prompt=add_generation_prompt, **told))
        except MemoryError:
            raise
        except Exception as error:
            raise ValueError(str(error) or type(error).__name__) from error

    return write


def _environment() -> Any:
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what the assistant says; the text is what stands in it."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["raise_exception"] = _refuse
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _refuse(message: str) -> None:
    raise ValueError(message)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    sys.path.append(str(Path(__file__).parents[1]))  # an isolated interpreter knows no project
    json.dump(render(**json.load(sys.stdin)), sys.stdout)
