"""The embedded PostgreSQL: started by its first user, gone after its last, whatever way that one ended."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from saehub.postgres import parse_url
from tests.conftest import ROOT, wait_for

USER = """
import sys, time
from pathlib import Path
from saehub.postgres import database
print(database("", Path(sys.argv[1]))["HOST"], flush=True)
time.sleep(900)
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


def use(data: Path) -> subprocess.Popen[str]:
    """A process that uses the server of `data`; returns once it has its address."""
    child = subprocess.Popen([sys.executable, "-c", USER, str(data)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout and child.stdout.readline().strip()
    return child


def servers(data: Path) -> list[psutil.Process]:
    """Processes of the server of `data` and of its guardian."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if (
            any(word.startswith(str(data)) for word in process.info["cmdline"] or [])
            and "-c" not in process.info["cmdline"]
        ):
            found.append(process)
    return found


def test_the_server_ends_with_its_last_user_even_after_kill_9(data: Path) -> None:
    first, second = use(data), use(data)
    assert servers(data)
    first.kill()
    first.wait()
    third = use(data)  # joins while the first one's death is noticed
    second.terminate()
    second.wait()
    assert servers(data), "somebody still uses it"
    third.kill()
    third.wait()
    wait_for(lambda: not servers(data), 240, "the server and its guardian to be gone")
    again = use(data)
    assert servers(data), "and it starts again without a hand"
    again.kill()
    again.wait()
    wait_for(lambda: not servers(data), 240, "it to be gone again")


def test_a_crash_of_server_and_guardian_needs_no_person(data: Path) -> None:
    user = use(data)
    for process in servers(data):
        process.kill()
    user.kill()
    user.wait()
    pidfile = data / "postgres" / "postmaster.pid"
    assert pidfile.exists(), "a stale lock is what this test is about"
    again = use(data)
    assert servers(data)
    again.kill()
    again.wait()
    wait_for(lambda: not servers(data), 240, "it to be gone")


def test_a_server_of_the_labs_own_is_named_by_its_url() -> None:
    row = parse_url("postgresql://ada:s%40cret@db.lab:5433/sae?sslmode=require")
    assert (row["HOST"], row["PORT"], row["NAME"], row["USER"], row["PASSWORD"]) == (
        "db.lab",
        "5433",
        "sae",
        "ada",
        "s@cret",
    )
    assert row["OPTIONS"] == {"sslmode": "require"}


@pytest.mark.parametrize("url", ["mysql://x/y", "postgresql://host", "nonsense"])
def test_another_kind_of_url_is_refused_in_one_sentence(url: str) -> None:
    with pytest.raises(SystemExit, match="DATABASE_URL must look like"):
        parse_url(url)


@pytest.mark.parametrize("url", ["postgresql://host:port/name", "postgresql://[::1/name"])
def test_a_url_that_cannot_be_read_is_refused_in_one_sentence(url: str) -> None:
    with pytest.raises(SystemExit, match=r"DATABASE_URL cannot be read: .*[.]$"):
        parse_url(url)
