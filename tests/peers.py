"""Other implementations that ours is compared with: they run in an interpreter of their own, from `make peers` (.venv-peers) or
named in SAEHUB_PEERS."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def peer() -> Path | None:
    """A Python that has SAELens."""
    named = os.environ.get("SAEHUB_PEERS", "")
    found = [path for path in (ROOT / ".venv-peers" / "bin" / "python", Path(named)) if named or "peers" in str(path)]
    return next((path for path in found if path.is_file()), None)


@contextmanager
def served(python: Path, folder: Path) -> Iterator[Callable[..., None]]:
    """`ask(script, *arguments)` has a process with the peers do the script's `main`; what it says goes into `folder`."""
    errors = folder / "errors.txt"
    command = [str(python), str(Path(__file__).with_name("peer_server.py"))]
    with errors.open("w") as file, subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True
    ) as child:  # fmt: skip
        assert child.stdin and child.stdout
        wanted, answers = child.stdin, child.stdout

        def ask(script: Path, *arguments: object) -> None:
            wanted.write(json.dumps([str(script), *map(str, arguments)]) + "\n")
            wanted.flush()
            assert answers.readline() == "done\n", errors.read_text()[-3000:]

        yield ask
        wanted.close()  # it has nothing more to do
