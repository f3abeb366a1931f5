"""manage.py catalogue_sync: fill the registry with every public SAE that sae-lens' directory knows."""

from __future__ import annotations

import json
import time
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from saes.catalogue import CatalogueError, sync

SHOWN = 20


class Command(BaseCommand):
    help = "Read sae-lens' directory of public SAEs (from its wheel, through pip) into the registry; nothing is downloaded."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--from", dest="source", default="", help="A sae-lens wheel or its yaml that is already here."
        )
        parser.add_argument(
            "--version", dest="wanted", default="", help="Version of sae-lens; the newest if not given."
        )
        parser.add_argument("--json", action="store_true", help="Print the summary as JSON.")

    def create_parser(self, *args: Any, **options: Any) -> CommandParser:
        """Django's own --version gives way: here it names sae-lens'."""
        return super().create_parser(*args, conflict_handler="resolve", **options)

    def handle(self, *args: Any, **options: Any) -> None:
        began = time.monotonic()
        try:
            summary = sync(
                options["source"], options["wanted"], self.stderr.write if options["json"] else self.stdout.write
            )
        except CatalogueError as error:
            raise CommandError(f"{error} {error.hint}".strip()) from None
        if options["json"]:
            self.stdout.write(json.dumps(summary))
            return
        for word in ("releases", "entries", "rows", "aliases", "new", "changed", "gone"):
            self.stdout.write(f"{word:>9}  {summary[word]:>7,}")
        for warning in summary["warnings"][:SHOWN]:
            self.stdout.write(f"  warning: {warning}")
        left = len(summary["warnings"]) - SHOWN
        if left > 0:
            self.stdout.write(f"  and {left} more warnings")
        self.stdout.write(f"{summary['origin']} in {time.monotonic() - began:.1f} s")
