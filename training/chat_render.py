"""Chat templates in a process of their own: `python chat_render.py` reads JSON from stdin and writes a list of [text, fault].

A template is a program of the model's author. Jinja's sandbox keeps it from files and from Python, but not from running for
ever or from taking all memory; here the kernel does. What templates may use is what transformers gives them.
"""

from __future__ import annotations

import json
import resource
import sys
from datetime import datetime
from typing import Any

SECONDS = 3  # of computing
MEMORY = 2**30


def render(template: str, chats: list[dict[str, Any]], names: dict[str, str]) -> list[tuple[str, str]]:
    """Each conversation's text and "", or "" and why the template cannot be used on it. chats: {"messages", "tools"}."""
    made = []
    compiled: Any = None
    for given in chats:
        try:
            compiled = compiled or _environment().from_string(template)
            chat = compiled.render(**given, documents=None, add_generation_prompt=False, **names)
            made.append((chat, ""))
        except Exception as error:  # whatever its author made it raise
            made.append(("", " ".join(str(error).split())[:300] or type(error).__name__))
    return made


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
    json.dump(render(**json.load(sys.stdin)), sys.stdout)
