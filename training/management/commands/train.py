"""manage.py train: one SAE or a sweep of them, from a YAML document or flags, by the same job as the page's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from django.core.management.base import CommandError, CommandParser

from saehub.figures import count_text
from saehub.jobs.foreground import ForegroundCommand
from saehub.jobs.models import Job, State
from saehub.jobs.runner import summary
from saehub.typed import row_number
from training.models import Run, Sweep
from training.run_document import KEYS, DocumentError, form_of, from_yaml, of_run, of_sweep, said, to_yaml

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


class Command(ForegroundCommand):
    help = (
        "Train an SAE, or a sweep of them. Exit codes: 0 trained, 1 failed, 2 bad request, 130 interrupted (the "
        "checkpoint stays, --resume goes on from it)."
    )

    stopping = "Stopping at the next step; the checkpoint stays."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("spec", nargs="?", help="A YAML document, as a run's page makes it. Flags go before it.")
        for name in KEYS:
            several = " (several with commas: a sweep)" if name in LISTS[:7] else ""
            parser.add_argument(f"--{name.replace('_', '-')}", dest=name, help=f"As in the document{several}.")
        parser.add_argument("--resume", metavar="RUN", help="The number of a run, or sweep-N, to go on with.")
        parser.add_argument("--dry-run", action="store_true", help="Say what would be trained and at which cost.")
        parser.add_argument("--json", action="store_true", help="Print the outcome as JSON.")
        parser.add_argument("--user", default="", help="Whose it is; the first administrator if not given.")

    def handle(self, *args: Any, **options: Any) -> None:
        self.quiet = options["json"]
        user = self.user(options["user"])
        if options["resume"]:
            row = self.resumed(options["resume"], user)
        else:
            try:
                form = form_of(self.document(options), user)
            except DocumentError as error:
                raise CommandError(str(error), returncode=2) from None
            if not form.is_valid():
                raise CommandError("\n".join(said(form)), returncode=2)
            if options["dry_run"]:
                self.preview(form)
                return
            row = form.make()
        self.finish(row, self.see_through(row.job))

    def document(self, options: dict[str, Any]) -> dict[str, Any]:
        """The file's settings, with those of the flags over them."""
        document: dict[str, Any] = {}
        if options["spec"]:
            try:
                document = from_yaml(Path(options["spec"]).read_text(encoding="utf-8"))
            except OSError as error:
                raise CommandError(f"{options['spec']} cannot be read ({error.strerror}).", returncode=2) from None
            except UnicodeDecodeError:
                raise CommandError(f"{options['spec']} is not UTF-8 text.", returncode=2) from None
        flags = {name: options[name] for name in KEYS if options[name] is not None}
        return document | from_yaml("\n".join(f"{name}: {_value(name, text)}" for name, text in flags.items()) or "{}")

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
    def finish(self, row: Run | Sweep, job: Job) -> None:
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


def _value(name: str, text: str) -> str:
    """A flag's text as YAML: with commas a list where the document takes one, and names as they are."""
    if name in LISTS and "," in text:
        return f"[{text}]"
    return json.dumps(text) if name in ("name", "capture_name", "hook_name", "hook_name_out", "corpus_sha256") else text
