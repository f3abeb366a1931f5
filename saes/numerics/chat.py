"""A model's chat template: a program of the model's author, run in Jinja's sandbox and under a limit of computing time."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

TEMPLATE_SECONDS = 10.0  # of computing, not of waiting; templates take milliseconds


class ChatError(ValueError):
    """The template cannot be used on these messages; the message is one sentence."""


class _Endless(Exception):
    """The time is over."""


def chat_text(tokenizer: Any, messages: Sequence[dict[str, Any]], **options: Any) -> str:
    """The messages as the model's template writes them.

    options: what the tokenizer's apply_chat_template takes. A template that computes for longer than TEMPLATE_SECONDS is
    ended where this is the process's main thread, as it is in workers; other threads cannot be interrupted. Raises
    ChatError.
    """
    try:
        with _limited(TEMPLATE_SECONDS):
            return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **options))
    except _Endless:
        raise ChatError(
            f"The model's chat template was not done after {TEMPLATE_SECONDS:g} s of computing; go without it."
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # whatever its author made it raise
        raise ChatError(f"The model's chat template does not take these messages: {str(error).rstrip('.')}.") from error


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """_Endless once the process has computed for so long; a starved machine does not count against the template."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(number: int, frame: Any) -> None:
        raise _Endless

    before = signal.signal(signal.SIGVTALRM, over)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
