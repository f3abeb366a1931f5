"""One training run in several processes: started, followed and stopped from one that only watches.

`Several` writes what is to be done into a folder and starts torchrun there, which starts the ranks (the second half of
this module). They answer through files of that folder: `said.jsonl`, a line for every report and every half second;
`stop`, made by the watcher to end the run at its next step; `error.txt`, the sentence of the rank that failed first.
Nothing is lost with a rank: the checkpoints are those of `train`, and a run of as many ranks goes on from them exactly.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from saehub.causes import memory_ran_out
from saes.numerics.architectures import build_sae
from saes.numerics.sae import SAEConfig
from training.numerics.checkpoint import TrainingError
from training.numerics.ranks import joined
from training.numerics.shards import Hooks, open_capture
from training.numerics.train import StepReport, TrainConfig, capture_batches, train

TASK, SAID, STOP, ERROR = "task.json", "said.jsonl", "stop", "error.txt"
SAY_SECONDS = 0.5
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Task:
    """What every rank needs to know. Paths are absolute; held_out_rows are behind the live curve."""

    sae: dict[str, Any]
    config: dict[str, Any]
    capture: str
    hooks: Hooks
    checkpoints: str
    held_out_rows: int = 0


class RankKilled(TrainingError):
    """A process of the run ended without a word."""


class Several:
    """A run in `processes` ranks, from its first process to its last. `folder` is emptied of an earlier attempt's words."""

    def __init__(self, task: Task, processes: int, folder: Path) -> None:
        self.folder, self.processes = folder, processes
        folder.mkdir(parents=True, exist_ok=True)
        for name in (SAID, STOP, ERROR):
            (folder / name).unlink(missing_ok=True)
        (folder / TASK).write_text(json.dumps(asdict(task)), encoding="utf-8")
        threads = max(1, (os.cpu_count() or 1) // processes)
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.torchrun = subprocess.Popen(
            [sys.executable, "-m", "training.numerics.several", str(folder), str(processes)],
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(paths)},
        )
        self._read = 0

    def said(self) -> Iterator[StepReport | int]:
        """What is new: reports, and how many tokens are done."""
        file = self.folder / SAID
        if not file.exists():
            return
        with file.open("rb") as handle:
            handle.seek(self._read)
            for line in handle:
                if not line.endswith(b"\n"):
                    break  # still being written
                self._read += len(line)
                word = json.loads(line)
                yield StepReport(**word) if isinstance(word, dict) else int(word)

    def running(self) -> bool:
        return self.torchrun.poll() is None

    def stop(self) -> None:
        """Ask the ranks to end at their next step, with a checkpoint."""
        (self.folder / STOP).touch()

    def check(self) -> None:
        """Once it is not running any more: raises TrainingError with the sentence of the rank that failed, RankKilled
        where none had the time to say one."""
        if self.torchrun.returncode == 0:
            return
        error = self.folder / ERROR
        if error.exists():
            raise TrainingError(error.read_text(encoding="utf-8").strip())
        raise RankKilled(
            f"One of the run's {self.processes} processes was killed, by a person or because memory ran out, and the "
            "others ended with it."
        )

    def kill(self) -> None:
        """End torchrun, and with it the ranks."""
        if self.running():
            self.torchrun.terminate()
            self.torchrun.wait()


# ---------------------------------------------------------------------------------------------------- the ranks


def work(folder: Path) -> None:
    """One rank's part of the run."""
    task = Task(**json.loads((folder / TASK).read_text(encoding="utf-8")))
    config = TrainConfig(**task.config)
    source, hooks = open_capture(task.capture), task.hooks
    with joined() as ranks:
        held_out = None
        if task.held_out_rows and ranks.first:
            held_out = next(
                source.batches(hooks, task.held_out_rows, split="held_out", shuffle=False, n_rows=task.held_out_rows)
            )
        voice = _Voice(folder, config.batch_size) if ranks.first else None
        train(
            build_sae(SAEConfig(**task.sae), seed=config.seed, device=ranks.device),
            capture_batches(source, hooks, config),
            config,
            on_step=voice.report if voice else None,
            checkpoint_dir=task.checkpoints,
            held_out=held_out,
            should_stop=voice.should_stop if voice else None,
            ranks=ranks,
        )


class _Voice:
    """The first rank's side of the folder."""

    def __init__(self, folder: Path, batch_size: int) -> None:
        self.stop, self.batch_size = folder / STOP, batch_size
        self.tokens, self.last = 0, time.monotonic()
        self.out = (folder / SAID).open("a", encoding="utf-8", buffering=1)

    def report(self, report: StepReport) -> None:
        self.tokens = report.tokens
        self.out.write(json.dumps(asdict(report)) + "\n")

    def should_stop(self) -> bool:
        if time.monotonic() - self.last >= SAY_SECONDS:
            self.last = time.monotonic()
            self.out.write(f"{self.tokens}\n")
        self.tokens += self.batch_size
        return self.stop.exists()


def _end_with_parent() -> None:
    """End this process as soon as the one that started it is gone, in whatever way."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(SAY_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()


def main(folder: Path, processes: int | None = None) -> None:
    """torchrun, when it is said how many processes; one of them otherwise."""
    _end_with_parent()
    if processes:
        from torch.distributed import run

        run.main(["--standalone", f"--nproc-per-node={processes}", "-m", __spec__.name, str(folder)])
        return
    try:
        work(folder)
    except Exception as error:
        if isinstance(error, ValueError):  # a sentence for a person
            _write_first(folder / ERROR, str(error))
        elif memory_ran_out(error):
            _write_first(folder / ERROR, "Memory ran out in one of the run's processes; choose a smaller batch.")
        raise
    # All is written. Threads of gloo's connections that still live abort an interpreter that takes itself down, now and then
    # ("terminate called without an active exception"), and a finished run would count as killed.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _write_first(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        pass


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
