"""Processes that do not outlive their parent, whatever way it ended, and process trees that end together."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

_callback: Callable[[], None] | None = None


def end_with_parent(callback: Callable[[], None] = lambda: os._exit(1)) -> None:
    """From now on, call `callback` once the parent process is gone; every process forked from here on ends with its own.

    Polls the parent's id, which works after `kill -9` and on every Unix.
    """
    global _callback
    if _callback is None:
        os.register_at_fork(after_in_child=_watch_in_child)
    _callback = callback
    _watch(callback)


def _watch_in_child() -> None:
    _watch(lambda: os._exit(1))


def _watch(callback: Callable[[], None]) -> None:
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        callback()

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()


def name_process(name: str) -> None:
    """What ps and top show, 15 letters at most: a fork has the command line of the process it was forked from."""
    with suppress(OSError):
        Path("/proc/self/comm").write_text(name)


def kill_tree(pid: int | None = None) -> None:
    """Kill every descendant of `pid` (default: of this process), and `pid` itself when given."""
    try:
        root = psutil.Process(pid)
        doomed = root.children(recursive=True) + ([root] if pid else [])
    except psutil.NoSuchProcess:
        return
    for process in doomed:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(doomed, timeout=5)
