"""Loaded before Django's settings: the tests have a data folder and an embedded PostgreSQL of their own.

The folder is kept between runs (the database cluster need not be made again). A second run beside the first gets its own,
and so does every process of a run that pytest-xdist spreads over several.
"""

import fcntl
import os
import signal
import tempfile
from pathlib import Path

# A shell's background job is born deaf to Ctrl-C, and so is all that it starts; the tests press it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

worker = os.environ.get("PYTEST_XDIST_WORKER")
if worker:  # one of several processes of one run: beside the folder the run took
    data = Path(os.environ["SAEHUB_DATA"]) / worker
else:
    data = Path(__file__).resolve().parent.parent / ".test-data"
    data.mkdir(exist_ok=True)
    lock = (data / "tests.lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        data = Path(tempfile.mkdtemp(prefix="saehub-tests-"))
data.mkdir(exist_ok=True)
os.environ["SAEHUB_DATA"] = str(data)
os.environ.setdefault("NUMBA_CACHE_DIR", str(data / "kernels"))  # one for all processes: compiling takes seconds
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("SAEHUB_JOB_LEASE", "6")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny matrices: a second thread only waits
