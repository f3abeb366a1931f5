"""Conversations, and a chat template that writes control tokens, refuses systems and wants turns."""

import json
import shutil
from pathlib import Path
from typing import Any

CHATS: list[list[dict[str, str]]] = [
    [
        {"role": "user", "content": f"What is the capital of number {i}?"},
        {
            "role": "assistant",
            "content": f"Paris is the capital of {i}, and an exception is raised when the key is missing.",
        },
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "The cat sat on the mat."},
    ]
    for i in range(40)
]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "<|{{ message['role'] }}|>{% generation %}{{ message['content'] | trim }}{{ eos_token }}{% endgeneration %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def jsonl(rows: list[Any]) -> str:
    return "\n".join(json.dumps(row) for row in rows) + "\n"


def sharegpt(chat: list[dict[str, str]]) -> list[dict[str, str]]:
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names[message["role"]], "value": message["content"]} for message in chat]


def chatting(model_dir: Path, folder: Path, template: str = TEMPLATE) -> Path:
    """A copy of a model's folder with a chat template."""
    copy = Path(shutil.copytree(model_dir, folder / "chatting"))
    (copy / "chat_template.jinja").write_text(template)
    return copy
