"""manage.py capture: activations of a model on a corpus, from a YAML document or flags, by the same job as the page's."""

from __future__ import annotations

import json
from typing import Any

from django.core.management.base import CommandError

from saehub.figures import count_text
from saehub.jobs.models import State
from saehub.jobs.runner import summary
from saehub.typed import row_number
from training import capture_document
from training.capture_document import of_capture
from training.document_command import DocumentCommand
from training.models import Capture
from training.yaml_document import to_yaml

NAMES = ("name", "model_name", "corpus_name", "corpus_sha256", "location")
LISTS = ("hook_names", "roles")


class Command(DocumentCommand):
    help = (
        "Capture activations. Exit codes: 0 captured, 1 failed, 2 bad request, 130 interrupted (whole shards stay, --resume "
        "goes on after them)."
    )
    stopping = "Stopping after this batch; whole shards stay."
    of = capture_document
    row = "capture"
    resumable = "The number of a capture"
    does = "captured"
    several = dict.fromkeys(LISTS, " (several with commas)")

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

    def finish(self, row: Capture) -> None:
        jobs = [self.see_through(job) for job in row.making()]
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

    def value(self, name: str, text: str) -> str:
        """A list where the document takes one, and names as they are."""
        if name in LISTS:
            return json.dumps(text.replace(",", " ").split())
        return json.dumps(text) if name in NAMES else text
