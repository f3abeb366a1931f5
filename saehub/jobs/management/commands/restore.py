"""manage.py restore FILE: what `backup` wrote, into this data folder and database, in place of what is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from django.core.management import call_command
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import connection, connections
from django.db.migrations.loader import MigrationLoader
from tqdm import tqdm

from saehub.backups import BackupError, absent, check, holds_something, opened, others_connected, restore
from saehub.figures import bytes_text

SHOWN = 10


class Command(BaseCommand):
    help = "Bring a backup back, in place of the database that is there. Exit codes: 0 restored, 2 not, and nothing changed."
    requires_system_checks: list[str] = []  # the database may be empty

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("source", help="A file that `backup` wrote.")
        parser.add_argument("--replace", action="store_true", help="Even if the database holds something.")
        parser.add_argument("--dry-run", action="store_true", help="Check the file and say what it holds.")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            with opened(Path(options["source"])) as (archive, found):
                with self.bar(found.size, "checking") as bar:
                    check(archive, found, self.migrations(), bar.update)
                holds = f"of {found.made_at}, SAEHub {found.version}, {bytes_text(found.size)}"
                files = f"{found.n_files:,} files beside the database" if found.files else "without files"
                self.stdout.write(f"The backup is whole: {holds}, {files}.")
                if options["dry_run"]:
                    return
                self.require_quiet(options["replace"])
                with self.bar(found.size, "restoring") as bar:
                    restore(archive, found, bar.update)
        except BackupError as error:
            raise CommandError(str(error), returncode=2) from None
        except OSError as error:
            raise CommandError(f"Nothing was restored: {error}", returncode=2) from error
        connections.close_all()
        call_command("migrate", verbosity=0)
        with connection.cursor() as cursor:
            cursor.execute("VACUUM (ANALYZE)")  # a dump holds no statistics, and lists read indexes alone once it ran
        self.stdout.write("Restored. Start the site and its workers as always.")
        self.tell(absent(found))

    def migrations(self) -> set[str]:
        """Those of the installed code."""
        loader = MigrationLoader(None)
        return {f"{app}.{name}" for app, name in loader.disk_migrations} | {
            f"{app}.{name}" for migration in loader.disk_migrations.values() for app, name in migration.replaces
        }

    def require_quiet(self, replace: bool) -> None:
        if holds_something() and not replace:
            raise BackupError("The database here holds something; --replace puts the backup in its place.")
        if others := others_connected():
            raise BackupError(
                f"The database is in use ({others} connection{'s' if others > 1 else ''}); stop the site and its workers first."
            )

    def tell(self, missing: dict[str, int]) -> None:
        if missing:
            shown = ", ".join(list(missing)[:SHOWN]) + (
                f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
            )
            self.stdout.write(
                f"Not in the backup and not here: {shown} ({bytes_text(sum(missing.values()))}). Copy them into the data folder."
            )

    def bar(self, total: int, what: str) -> Any:
        return tqdm(total=total, desc=what, unit="B", unit_scale=True, leave=False, disable=None)
