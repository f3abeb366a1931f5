"""What a job server has imported leaves nothing behind that a fork must not share."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

from saehub.jobs.kinds import KINDS
from saehub.jobs.server import COMPILED, MORE, modules_of
from tests.conftest import ROOT, child_environment

PRELOADED = """
import json, os, sys, threading
import django
django.setup()
from importlib import import_module
for name in sys.argv[1:]:
    import_module(name)
import numpy, torch
from django.db import connections

assert threading.active_count() == 1, threading.enumerate()
assert not torch.cuda.is_initialized()
assert all(connection.connection is None for connection in connections.all())

def products():
    # Large enough for OpenMP's, OpenBLAS' and torch's own threads: each would hang on threads that it had before the fork.
    x = torch.arange(600 * 600, dtype=torch.float32).reshape(600, 600) / 360_000
    total = (x @ x).sum() + torch.sort(x.flatten().cos()).values.cumsum(0)[-1]
    return json.dumps((total.item(), float((x.numpy() @ x.numpy().T).sum()), torch.get_num_threads()))

def in_a_fork():
    said, say = os.pipe()
    pid = os.fork()
    if not pid:
        os.write(say, products().encode())
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    return os.read(said, 1000).decode()

print(f"[{in_a_fork()}, {in_a_fork()}, {products()}]")
"""


@pytest.mark.parametrize("queue", ["io", "gpu"])
def test_jobs_one_after_another_compute_with_threads_of_their_own(queue: str) -> None:
    modules = modules_of(queue, in_child=True)
    environment = child_environment() | {"OMP_NUM_THREADS": "2", "DJANGO_SETTINGS_MODULE": "saehub.settings"}
    told = subprocess.run(
        [sys.executable, "-c", PRELOADED, *modules], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    one, other, here = json.loads(told.stdout)
    # The first cosine that two threads compute at once now and then has one thread's half in fewer digits (1e-4; about once in
    # a hundred processes, measured). NumPy's product has the same bits every time.
    assert one[0] == pytest.approx(here[0], rel=1e-5) and other[0] == pytest.approx(here[0], rel=1e-5)
    assert one[1] == other[1] == here[1] and one[2] == other[2] == here[2] == 2


def test_every_queue_with_processes_for_its_jobs_has_a_server() -> None:
    assert "training.jobs" in modules_of("gpu", in_child=True) and modules_of("live", in_child=True) == []
    assert "inference.jobs" in modules_of("live", in_child=False) and modules_of("gpu", in_child=False) == []
    assert {*MORE, *COMPILED} <= {kind.queue for kind in KINDS.values()}


def test_the_server_of_a_new_machine_compiles_every_kernel() -> None:
    with_kernels = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in ROOT.glob("*/numerics/*.py")
        if "\n@kernel(" in path.read_text()
    }
    assert with_kernels == set(COMPILED["gpu"])
    assert all(find_spec(module) for modules in MORE.values() for module in modules)
