"""manage.py train: one SAE or a sweep of them, from a YAML document or flags, by the same job as the page's."""

from __future__ import annotations

import json
from typing import Any

from django.core.management.base import CommandError

from saehub.figures import count_text
from saehub.jobs.models import State
from saehub.jobs.runner import summary
from saehub.typed import row_number
from training import run_document
from training.document_command import DocumentCommand
from training.models import Run, Sweep
from training.run_document import of_run, of_sweep
from training.yaml_document import to_yaml

LISTS = (
    "hook_name",
    "k",
    "l1_coefficient",
    "l0_coefficient",
    "target_l0",
    "d_sae",
    "seed",
    "betas",
    "matryoshka_widths",
)
NAMES = ("name", "capture_name", "hook_name", "hook_name_out", "corpus_sha256")


class Command(DocumentCommand):
    help = (
        "Train an SAE, or a sweep of them. Exit codes: 0 trained, 1 failed, 2 bad request, 130 interrupted (the "
        "checkpoint stays, --resume goes on from it)."
    )
    stopping = "Stopping at the next step; the checkpoint stays."
    of = run_document
    row = "run"
    resumable = "The number of a run, or sweep-N,"
    does = "trained"
    several = dict.fromkeys(LISTS[:7], " (several with commas: a sweep)")

    def resumed(self, wanted: str, user: Any) -> Run | Sweep:
        """The run or sweep, its job queued again."""
        sweep, number = wanted.startswith("sweep-"), wanted.removeprefix("sweep-").removeprefix("run-")
        table: Any = Sweep if sweep else Run
        row = table.objects.select_related("job").filter(pk=row_number(number)).first()
        if row is None:
            raise CommandError(f"There is no {'sweep' if sweep else 'run'} {number}.", returncode=2)
        if row.ready and not (sweep and row.runs.filter(ready_at=None, error="").exists()):
            raise CommandError(f"{row.name} is finished already.", returncode=2)
        if row.state == "paused" or (sweep and row.ready):
            row.resume(user)
        elif not row.busy and not (row.job and row.job.retry()):
            row.start(user)
        row.refresh_from_db()
        return row

    def preview(self, form: Any) -> None:
        estimate = form.estimate()
        facts = {
            "dry_run": True, "runs": len(form.points), "seconds": estimate.seconds, "memory": estimate.memory,
            "memory_free": estimate.room.free, "memory_total": estimate.room.total,
            "disk": estimate.disk, "free": estimate.free, "points": form.points,
            "measured_on": estimate.speed.measured.run.pk if estimate.speed else None,
        }  # fmt: skip
        if self.quiet:
            self.stdout.write(json.dumps(facts))
            return
        for point in form.points:
            self.stdout.write("  ".join(f"{name} {value}" for name, value in point.items()))
        spent = f"about {estimate.seconds:,.0f} s" if estimate.seconds else "time not known yet"
        if estimate.speed:
            spent += f" (as measured on run {estimate.speed.measured.run.pk})"
        self.stdout.write(
            f"{len(form.points)} to train: {spent}, {count_text(estimate.memory)}B of memory "
            f"of {count_text(estimate.room.free)}B free, "
            f"{count_text(estimate.disk)}B of disk of {count_text(estimate.free)}B to spare"
        )

    # -- what came out
    def finish(self, row: Run | Sweep) -> None:
        job = self.see_through(row.job)
        row.refresh_from_db()
        if self.quiet:
            self.stdout.write(
                json.dumps(
                    summary(job) | {"yaml": to_yaml(of_sweep(row) if isinstance(row, Sweep) else of_run(row))},
                    default=str,
                )
            )
        if job.state == State.DONE and not job.result.get("paused"):
            if not self.quiet:
                runs = list(row.runs.order_by("pk")) if isinstance(row, Sweep) else [row]
                for run in runs:
                    place = run.sae.files if run.sae else run.error or run.state
                    self.stdout.write(f"{run.name}: {place}")
            return
        name = f"sweep-{row.pk}" if isinstance(row, Sweep) else str(row.pk)
        if job.state == State.FAILED:
            raise CommandError(f"{job.error} {job.hint}".strip(), returncode=1)
        self.stderr.write(f"Go on with: manage.py train --resume {name}")
        raise SystemExit(130)

    def value(self, name: str, text: str) -> str:
        """With commas a list where the document takes one, and names as they are."""
        if name in LISTS and "," in text:
            return f"[{text}]"
        return json.dumps(text) if name in NAMES else text
