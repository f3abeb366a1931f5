"""Chat templates in a process of their own: `python chat_render.py` reads JSON from stdin and writes a list of texts.

A template is a program of the model's author. Jinja's sandbox keeps it from files and from Python, but not from running for
ever or from taking all memory; here the kernel does.
"""

from __future__ import annotations

import json
import resource
import sys
from datetime import datetime
from typing import Any

SECONDS = 3  # of computing
MEMORY = 2**30


def chats(template: str, texts: list[str], **names: Any) -> list[str]:
    """Each text as a user's message; "" where the template cannot be used on it."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["raise_exception"] = _refuse
    made = []
    for text in texts:
        messages = [{"role": "user", "content": text}]
        try:
            chat = environment.from_string(template).render(messages=messages, add_generation_prompt=False, **names)
        except Exception:  # whatever its author made it raise
            chat = ""
        made.append(chat)
    return made


def _refuse(message: str) -> None:
    raise ValueError(message)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    json.dump(chats(**json.load(sys.stdin)), sys.stdout)
