"""manage.py export_run 3 --to tensorboard: curves of runs for other tools."""

from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from training.models import Run
from training.run_export import WRITERS, ExportError


class Command(BaseCommand):
    help = "Write the curves of runs for TensorBoard, or as offline runs of Weights & Biases. A run's page gives CSV."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("runs", nargs="+", type=int, metavar="RUN", help="Numbers of runs.")
        parser.add_argument("--to", choices=sorted(WRITERS), default="tensorboard", help="Which tool reads them.")
        parser.add_argument("--out", type=Path, default=Path("run-curves"), help="The folder to write to.")

    def handle(self, *args: Any, **options: Any) -> None:
        found = Run.objects.in_bulk(options["runs"])
        missing = [str(number) for number in options["runs"] if number not in found]
        if missing:
            raise CommandError(f"There is no run {', '.join(missing)}.")
        for number in options["runs"]:
            run = found[number]
            if not run.points.exists():
                raise CommandError(f"Run {number} has no points yet; export it once it has trained a little.")
            try:
                WRITERS[options["to"]](run, options["out"])
            except ExportError as error:
                raise CommandError(str(error)) from error
            self.stdout.write(f"{run.name}: {run.points.count()} points to {options['out']}")
