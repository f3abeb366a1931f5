"""manage.py capture: activations of a model on a corpus, from a YAML document or flags, by the same job as the page's."""

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
from training.capture_document import KEYS, DocumentError, form_of, from_yaml, of_capture, said
from training.models import Capture
from training.yaml_document import to_yaml

NAMES = ("name", "model_name", "corpus_name", "corpus_sha256", "location")
LISTS = ("hook_names", "roles")


class Command(ForegroundCommand):
    help = (
        "Capture activations. Exit codes: 0 captured, 1 failed, 2 bad request, 130 interrupted (whole shards stay, --resume "
        "goes on after them)."
    )
    stopping = "Stopping after this batch; whole shards stay."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "spec", nargs="?", help="A YAML document, as a capture's page makes it. Flags go before it."
        )
        for name in KEYS:
            several = " (several with commas)" if name in LISTS else ""
            parser.add_argument(f"--{name.replace('_', '-')}", dest=name, help=f"As in the document{several}.")
        parser.add_argument("--resume", metavar="CAPTURE", help="The number of a capture to go on with.")
        parser.add_argument("--dry-run", action="store_true", help="Say what would be captured and at which cost.")
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
        self.finish(row, [self.see_through(job) for job in row.making()])

    def document(self, options: dict[str, Any]) -> dict[str, Any]:
        """The file's settings, with those of the flags over them."""
        document: dict[str, Any] = {}
        if options["spec"]:
            try:
                document = from_yaml(Path(options["spec"]).read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError) as error:
                raise CommandError(f"{options['spec']} cannot be read ({error}).", returncode=2) from None
        flags = {name: options[name] for name in KEYS if options[name] is not None}
        return document | from_yaml("\n".join(f"{name}: {_value(name, text)}" for name, text in flags.items()) or "{}")

    def resumed(self, wanted: str, user: Any) -> Capture:
        """The capture, its jobs queued again where they rest."""
        row = Capture.objects.filter(pk=row_number(wanted)).first()
        if row is None:
            raise CommandError(f"There is no capture {wanted}.", returncode=2)
        if row.ready:
            raise CommandError(f"{row.name} is finished already.", returncode=2)
        jobs = row.making()
        if not jobs:
            row.start(user)
        for job in jobs:
            if not job.is_live:
                job.retry()
        row.refresh_from_db()
        return row

    def preview(self, form: Any) -> None:
        estimate = form.estimate()
        if self.quiet:
            facts = {
                "tokens": estimate.tokens,
                "bytes": estimate.bytes,
                "seconds": estimate.seconds,
                "free": estimate.free,
            }
            self.stdout.write(json.dumps({"dry_run": True, **facts, "kept": list(estimate.kept)}))
            return
        for sentence in estimate.kept:
            self.stdout.write(sentence)
        spent = f"about {estimate.seconds:,.0f} s" if estimate.seconds else "time not known yet"
        size = "" if estimate.bytes is None else f", {count_text(estimate.bytes)}B of disk"
        self.stdout.write(
            f"{count_text(estimate.tokens or 0)} tokens: {spent}{size} of {count_text(estimate.free)}B to spare"
        )

    def finish(self, row: Capture, jobs: list[Job]) -> None:
        row.refresh_from_db()
        bad = next((job for job in jobs if job.state != State.DONE), None)
        last = bad or jobs[-1]
        if self.quiet:
            self.stdout.write(json.dumps(summary(last) | {"yaml": to_yaml(of_capture(row))}, default=str))
        if bad is None:
            if not self.quiet:
                self.stdout.write(f"{row.name}: {row.n_tokens:,} tokens in {row.folder}")
            return
        if bad.state == State.FAILED:
            raise CommandError(f"{bad.error} {bad.hint}".strip(), returncode=1)
        self.stderr.write(f"Go on with: manage.py capture --resume {row.pk}")
        raise SystemExit(130)


def _value(name: str, text: str) -> str:
    """A flag's text as YAML: a list where the document takes one, and names as they are."""
    if name in LISTS:
        return json.dumps(text.replace(",", " ").split())
    return json.dumps(text) if name in NAMES else text
