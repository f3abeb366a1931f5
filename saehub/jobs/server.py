"""The job server: one process beside a queue's workers that has imported what its jobs need. Every job is a fork of it.

A job gets a process of its own, and importing torch and what is built on it takes that process 3 to 5 s of computing. Here it
is done once. What a fork must not share is not there yet: the server has one thread of Python's, opens no connection to
the database, touches no GPU and computes nothing, so that no pool of threads has been started (OpenBLAS and jemalloc have
threads from their import on, and bring their own handlers for a fork).

    worker -> server   the job and its token, with the server's end of a channel made for this job
    server -> worker   along that channel: the process id, later the exit code
    job                reads the channel: its end means that the worker is gone, and ends the job

Requests wait in their socket, which `manage.py work` holds open, while a server starts or is started again.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import NamedTuple

from django.conf import settings

from saehub.jobs.kinds import KINDS
from saehub.jobs.processes import end_with_parent, kill_tree, name_process

REQUEST = struct.Struct("q16s")  # job, token
NUMBER = struct.Struct("q")  # process id or exit code
LOST = 255  # exit code of a job whose server ended before it
LOOK_SECONDS = 0.5
# What the functions of these queues' modules import when they are called ...
MORE = {"gpu": ("transformers.modeling_utils", "numba"), "live": ("transformers.modeling_utils",)}
# ... and what compiles kernels when it is imported, for 10 s the first time on a machine.
COMPILED = {
    "gpu": (
        *(f"training.numerics.{name}kernels" for name in ("", "topk_", "update_")),
        *(f"concepts.numerics.{name}kernels" for name in ("", "column_")),
        "training.numerics.dense_kernels",
    )
}


class Order(NamedTuple):
    """What a forked process is to do."""

    job: int
    token: bytes
    channel: socket.socket


# -- the workers' side ----------------------------------------------------------------------------------------------------
def start_server(queue: str) -> subprocess.Popen[bytes] | None:
    """The server of this process's workers, which are forked later; None for a queue without jobs in a process of their own."""
    if not modules_of(queue, in_child=True):
        return None
    _, end = _requests()
    command = [sys.executable, str(settings.BASE_DIR / "manage.py"), "serve_jobs", queue, str(end.fileno())]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[end.fileno()])


@cache
def _requests() -> tuple[socket.socket, socket.socket]:
    """The workers' end and the server's, the same for all that this process forks."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)


def modules_of(queue: str, *, in_child: bool) -> list[str]:
    """What a queue's jobs import: those in a process of their own, or those that its workers do themselves."""
    named = dict.fromkeys(kind.module for kind in KINDS.values() if kind.queue == queue and kind.in_child == in_child)
    return [*named, *MORE.get(queue, ())] if named else []


def import_all(modules: Iterable[str]) -> None:
    for module in modules:
        with suppress(Exception):  # the job that needs it says so, on its card
            import_module(module)


class JobProcess:
    """A job's process as its worker sees it."""

    def __init__(self, job: int, token: bytes) -> None:
        self.pid: int | None = None
        self.returncode: int | None = None
        self._channel, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(_requests()[0], [REQUEST.pack(job, token)], [theirs.fileno()])

    def wait(self, seconds: float) -> bool:
        """Wait so long at most for its end. Says whether it has come; `returncode` is as that of subprocess."""
        if self.returncode is None and select.select([self._channel], [], [], seconds)[0]:
            said = self._channel.recv(NUMBER.size)
            number = NUMBER.unpack(said)[0] if said else LOST
            if said and self.pid is None:
                self.pid = number
            else:
                self._end(number)
        return self.returncode is not None

    def kill(self) -> None:
        """End it and all that it started; before it has begun, it never will."""
        if self.pid is None:
            self._end(-signal.SIGKILL)
        else:
            kill_tree(self.pid)

    def _end(self, code: int) -> None:
        self.returncode = code
        self._channel.close()


# -- the server -----------------------------------------------------------------------------------------------------------
def serve(queue: str, requests: socket.socket) -> Order | None:
    """Fork a process for each request, until the parent is gone: then None. In a forked process, returns its order.

    Between two imports it looks for requests: a job that comes early imports the rest itself.
    """
    parent = os.getppid()
    imports = deque(modules_of(queue, in_child=True))
    children: dict[int, socket.socket] = {}
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for `manage.py work`, which ends its processes in order
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    watched: list[socket.socket | int] = [requests, woken]
    while os.getppid() == parent:
        ready = select.select(watched, [], [], 0 if imports else LOOK_SECONDS)[0]
        if woken in ready:
            os.read(woken, 4096)
            _tell_ends(children)
        if requests in ready:
            message, (end,), *_ = socket.recv_fds(requests, REQUEST.size, 1, socket.MSG_CMSG_CLOEXEC)
            channel = socket.socket(fileno=end)
            pid = os.fork()
            if not pid:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for mine in (requests, *children.values()):
                    mine.close()
                os.close(woken)
                os.close(wake)
                job, token = REQUEST.unpack(message)
                return Order(job, token, channel)
            children[pid] = channel
            _say(channel, pid)
        elif imports:
            import_all([imports.popleft()])
            if not imports:
                _compile(COMPILED.get(queue, ()))
    return None


def _compile(modules: Sequence[str]) -> None:
    """Fill the folder of compiled kernels, so that no job waits for it: in a fork, since a server has to answer.

    Not at a low priority: a job that needs a kernel waits for whoever compiles it.
    """
    if modules and not os.fork():
        name_process("compiles")
        end_with_parent()
        import_all(modules)
        os._exit(0)


def _tell_ends(children: dict[int, socket.socket]) -> None:
    with suppress(ChildProcessError):  # none is left
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            pid, status = ended
            if pid in children:
                with children.pop(pid) as channel:
                    _say(channel, os.waitstatus_to_exitcode(status))


def _say(channel: socket.socket, number: int) -> None:
    with suppress(OSError):  # the worker is gone; its job ends for the same reason
        channel.send(NUMBER.pack(number))


# -- the job's process ----------------------------------------------------------------------------------------------------
def end_with_worker(channel: socket.socket) -> None:
    """From now on this process ends when its worker does, or takes no more interest in it."""

    def watch() -> None:
        channel.recv(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end-with-worker").start()
