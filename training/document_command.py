"""Commands whose row is what a YAML document says, with flags over it."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from django.core.management.base import CommandError, CommandParser

from saehub.jobs.foreground import ForegroundCommand
from training.yaml_document import DocumentError


class DocumentCommand(ForegroundCommand):
    """of: the module of the document, which has KEYS, from_yaml, form_of and said. row, resumable, does: in words, what is
    made of it, what --resume takes and what is done. several: said of flags that take several values, by name."""

    of: ModuleType
    row: str
    resumable: str
    does: str
    several: dict[str, str] = {}

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "spec", nargs="?", help=f"A YAML document, as a {self.row}'s page makes it. Flags go before it."
        )
        for name in self.of.KEYS:
            about = f"As in the document{self.several.get(name, '')}."
            parser.add_argument(f"--{name.replace('_', '-')}", dest=name, help=about)
        parser.add_argument("--resume", metavar=self.row.upper(), help=f"{self.resumable} to go on with.")
        parser.add_argument("--dry-run", action="store_true", help=f"Say what would be {self.does} and at which cost.")
        parser.add_argument("--json", action="store_true", help="Print the outcome as JSON.")
        parser.add_argument("--user", default="", help="Whose it is; the first administrator if not given.")

    def handle(self, *args: Any, **options: Any) -> None:
        self.quiet = options["json"]
        user = self.user(options["user"])
        if options["resume"]:
            self.finish(self.resumed(options["resume"], user))
            return
        try:
            form = self.of.form_of(self.document(options), user)
        except DocumentError as error:
            raise CommandError(str(error), returncode=2) from None
        if not form.is_valid():
            raise CommandError("\n".join(self.of.said(form)), returncode=2)
        if options["dry_run"]:
            self.preview(form)
        else:
            self.finish(form.make())

    def document(self, options: dict[str, Any]) -> dict[str, Any]:
        """The file's settings, with those of the flags over them."""
        document: dict[str, Any] = {}
        if options["spec"]:
            try:
                document = self.of.from_yaml(Path(options["spec"]).read_text(encoding="utf-8"))
            except OSError as error:
                raise CommandError(f"{options['spec']} cannot be read ({error.strerror}).", returncode=2) from None
            except UnicodeDecodeError:
                raise CommandError(f"{options['spec']} is not UTF-8 text.", returncode=2) from None
        flags = {name: options[name] for name in self.of.KEYS if options[name] is not None}
        typed = "\n".join(f"{name}: {self.value(name, text)}" for name, text in flags.items())
        return document | self.of.from_yaml(typed or "{}")

    def value(self, name: str, text: str) -> str:
        """A flag's text as YAML."""
        raise NotImplementedError

    def resumed(self, wanted: str, user: Any) -> Any:
        """The row of that number, its work queued again."""
        raise NotImplementedError

    def preview(self, form: Any) -> None:
        """Say what it would cost."""
        raise NotImplementedError

    def finish(self, row: Any) -> None:
        """See its work through, and say what came out."""
        raise NotImplementedError
