"""manage.py web: the site, by daphne."""

from typing import Any

from django.core.management.base import BaseCommand, CommandParser

from saehub.jobs.processes import end_with_parent


class Command(BaseCommand):
    help = "Serve the pages until interrupted."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--host", default="127.0.0.1")
        parser.add_argument("--port", type=int, default=8000)
        parser.add_argument(
            "--with-parent", action="store_true", help="End when the process that started this one ends."
        )

    def handle(self, *args: Any, **options: Any) -> None:
        from saehub.spool import SpoolingCommand, install

        install()
        if options["with_parent"]:
            end_with_parent()
        where = ["-b", options["host"], "-p", str(options["port"])]
        SpoolingCommand().run([*where, "-v", "0", "--no-server-name", "saehub.asgi:application"])
