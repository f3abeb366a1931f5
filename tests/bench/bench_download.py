"""How fast eight parallel downloads are: ours, each checked against its SHA-256, and `hf download` of the same files.

    python tests/bench/bench_download.py [--megabytes 128] [--rounds 5]

A server on this machine speaks the Hub's protocol; each contender is a process of its own with an empty cache, and what is
timed is from the call to its return, without the start of Python. The contenders take turns, so that what else the machine
does hits them alike; only the ratio of one run means something. Ours hashes every byte and hf does not: on a machine with
few cores that is part of what the ratio shows, and `hf, then hashed` is hf with the same certainty.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
REPO, FILES = "lab/bench", 8


class Quiet:
    """Progress that is written nowhere."""

    def start(self, *_: Any, **__: Any) -> None: ...
    def log(self, text: str) -> None: ...
    def __call__(self, *_: Any) -> None: ...


def serve(megabytes: int) -> None:
    """Until the standard input ends; prints the address."""
    from tests.mini_hub import MiniHub

    hub = MiniHub()
    hub.repos[f"models/{REPO}"] = {f"{n}.safetensors": os.urandom(megabytes << 20) for n in range(FILES)}
    sys.stdout.write(hub.url + "\n")
    sys.stdout.flush()
    sys.stdin.read()


def ours() -> float:
    import django

    os.environ |= {"DJANGO_SETTINGS_MODULE": "saehub.settings", "DATABASE_URL": "postgresql://nobody@127.0.0.1/none"}
    django.setup()
    from saes import hub

    began = time.perf_counter()
    files = hub.list_repository(REPO).files
    threads = [
        threading.Thread(target=hub.download, args=(Quiet(), hub.list_repository(REPO), [file])) for file in files
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began


def hf(then_hash: bool = False) -> float:
    """What `hf download` calls, with the eight workers it has."""
    import hashlib
    from concurrent.futures import ThreadPoolExecutor

    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    began = time.perf_counter()
    folder = Path(snapshot_download(REPO, max_workers=8))
    if then_hash:

        def right(path: Path) -> bool:
            with path.open("rb") as handle:
                return hashlib.file_digest(handle, "sha256").hexdigest() == path.resolve().name

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(right, folder.iterdir()))
    return time.perf_counter() - began


CLIENTS = {"ours": ours, "hf": hf, "hf, then hashed": lambda: hf(then_hash=True)}


def timed(client: str, url: str, expected: int) -> float:
    """Seconds of one client in a process of its own; its files are counted."""
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"HF_ENDPOINT": url, "HF_HUB_CACHE": folder, "HF_HUB_OFFLINE": "0", "SAEHUB_DATA": folder}
        env |= {"HF_HOME": folder, "SAEHUB_DISK_RESERVE_MB": "0"}
        call = [sys.executable, __file__, "--client", client]
        done = subprocess.run(call, env=env, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            raise SystemExit(done.stderr)
        blobs = Path(folder) / "models--lab--bench" / "blobs"
        assert sum(path.stat().st_size for path in blobs.iterdir()) == expected
        return float(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=128, help="Of each of the eight files.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--client", choices=[*CLIENTS], help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.megabytes)
    if args.client:
        print(json.dumps(CLIENTS[args.client]()))
        return None
    call = [sys.executable, __file__, "--serve", "--megabytes", str(args.megabytes)]
    server = subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert server.stdout and server.stdin
    try:
        url, total = server.stdout.readline().strip(), FILES * args.megabytes << 20
        rounds = [{name: timed(name, url, total) for name in CLIENTS} for _ in range(args.rounds)]
    finally:
        server.stdin.close()
        server.wait(10)
    for name in CLIENTS:
        seconds = statistics.median(one[name] for one in rounds)
        print(f"{name:16} {seconds:6.2f} s  {total / seconds / 1e6:8,.0f} MB/s")
    for peer in ("hf", "hf, then hashed"):
        ratio = statistics.median(one[peer] / one["ours"] for one in rounds)
        print(f"ours reaches {ratio:.2f} x of {peer} (median of {args.rounds} rounds)")


if __name__ == "__main__":
    main()
