"""manage.py backup FILE: the database, the key of its secrets and, with --files, all files, while the site runs."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from tqdm import tqdm

from saehub.backups import BackupError, back_up
from saehub.figures import bytes_text


class Command(BaseCommand):
    help = "Write a backup into one file; `restore` brings it back. The site may run. Exit codes: 0 written, 2 not."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("target", help="A new file, or a folder, where it is named after the time.")
        parser.add_argument(
            "--files", action="store_true", help="Models, captures, SAEs and all other files of the data folder too."
        )
        parser.add_argument("--json", action="store_true", help="Print what was written as JSON.")

    def handle(self, *args: Any, **options: Any) -> None:
        target = Path(options["target"])
        if target.is_dir():
            target = target / f"saehub-{datetime.now():%Y-%m-%d-%H%M%S}.tar"
        try:
            with tqdm(unit="B", unit_scale=True, leave=False, disable=True if options["json"] else None) as bar:
                found = back_up(target, files=options["files"], tick=bar.update)
        except BackupError as error:
            raise CommandError(str(error), returncode=2) from None
        if options["json"]:
            self.stdout.write(json.dumps({"file": str(target), "bytes": found.size, "left_out": found.left_out}))
            return
        self.stdout.write(f"{target}: {bytes_text(found.size)}. It holds secrets; keep it where only you can read it.")
        if found.left_out:
            left = bytes_text(sum(found.left_out.values()))
            self.stdout.write(f"Left out: {len(found.left_out)} folders of files, {left}; --files takes them along.")
