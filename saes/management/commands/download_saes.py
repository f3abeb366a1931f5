"""manage.py download_saes: one SAE or four hundred of them, by flags or by a list, through the same jobs as the pages."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from django.contrib.auth import get_user_model
from django.core.management.base import BaseCommand, CommandError, CommandParser
from tqdm import tqdm

from saehub.accounts.hub_tokens import HubTokenError
from saehub.jobs.models import Job
from saes.batch import NAMES, BatchError, BatchSpec, plan
from saes.batch_run import Batch, Part, measure, missing, summary
from saes.hub import free_for_downloads

POLL_SECONDS = 0.2
MOST_JOBS = 32
HELP = {
    "release": "A release of the catalogue, such as gemma-scope-2b-pt-res.",
    "id": "An SAE's id in its release.",
    "model": "The language model, such as gemma-2-2b.",
    "layers": "0-25, or 3,5,9.",
    "site": "A site such as resid_post, hook_z or transcoder; or res, att, mlp.",
    "width": "16k, 1m, or a number of features.",
    "l0": "nearest:100 (of each layer, site and width), 50-150, 82, or canonical.",
    "repo": "A repository of the Hub.",
    "path": "Folder or file in that repository; it need not be in the catalogue.",
    "revision": "Branch, tag or commit; the default branch if not given.",
}


class Command(BaseCommand):
    help = "Download SAEs from the Hub. Run again, it goes on where it ended. Exit codes: 0 all are here, 1 some are not, 2 bad request."

    def add_arguments(self, parser: CommandParser) -> None:
        for name in NAMES:
            parser.add_argument(f"--{name}", default="", help=HELP[name])
        parser.add_argument("--spec", metavar="FILE", help="A .yaml or .csv list, as the basket makes it.")
        parser.add_argument("--dry-run", action="store_true", help="Say what would be downloaded, and stop.")
        parser.add_argument("--jobs", type=int, default=2, metavar="N", help="SAEs at once.")
        parser.add_argument("--json", action="store_true", help="Print the outcome as JSON.")
        parser.add_argument(
            "--user", default="", help="Whose rows and Hub token; the first administrator if not given."
        )

    def handle(self, *args: Any, **options: Any) -> None:
        began = time.monotonic()
        self.quiet = options["json"]
        if not 1 <= options["jobs"] <= MOST_JOBS:
            raise CommandError(f"--jobs is 1 to {MOST_JOBS}.", returncode=2)
        user = self.user(options["user"])
        try:
            rows = plan(self.spec(options))
            with self.bar(len(rows), "asking the Hub", "SAE") as bar:
                parts = measure(rows, user, lambda n: bar.update(n - bar.n))
        except (BatchError, HubTokenError) as error:
            raise CommandError(f"{error} {error.hint}".strip(), returncode=2) from None
        if options["dry_run"]:
            self.preview(parts)
        else:
            self.require_space(parts)
            self.bring(Batch(parts, user, options["jobs"]))
        self.report(parts, time.monotonic() - began, dry=options["dry_run"])

    # -- what is asked for
    def user(self, name: str) -> Any:
        users = get_user_model().objects.filter(is_active=True)
        if not name:
            return users.filter(is_superuser=True).order_by("pk").first()
        found = users.filter(username=name).first()
        if found is None:
            raise CommandError(f"There is no user {name}.", returncode=2)
        return found

    def spec(self, options: dict[str, Any]) -> BatchSpec:
        flags = [f"--{name}" for name in NAMES if options[name]]
        if options["spec"] and flags:
            raise BatchError(f"Give either --spec or {', '.join(flags)}.")
        if options["spec"]:
            return BatchSpec.from_file(Path(options["spec"]))
        if not flags:
            raise BatchError("Say which SAEs: --release, --model or --repo, or --spec with a list.", "See --help.")
        return BatchSpec.from_flags(options)

    def require_space(self, parts: list[Part]) -> None:
        need, free = missing(parts), free_for_downloads()
        if need > free:
            raise CommandError(
                f"This needs {size(need)} and the disk has {size(free)} to spare. Free some, set HF_HOME to a larger disk, "
                "or choose fewer SAEs.",
                returncode=2,
            )

    # -- while it runs
    def bring(self, batch: Batch) -> None:
        """Until all are over, or Ctrl-C."""
        handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            with Bars(batch.parts, self.quiet, self.stderr.write) as bars:
                batch.start()
                while batch.running():
                    bars.show()
                    time.sleep(POLL_SECONDS)
                bars.show()
        except KeyboardInterrupt:
            self.stderr.write("\nStopping. What was brought stays; the same command goes on from there.")
            batch.stop()
        finally:
            signal.signal(signal.SIGTERM, handler)

    def bar(self, total: int, what: str, unit: str) -> Any:
        return tqdm(total=total, desc=what, unit=f" {unit}", leave=False, disable=True if self.quiet else None)

    # -- what came out
    def preview(self, parts: list[Part]) -> None:
        if self.quiet:
            return
        rows = [
            (
                part.row.name,
                place(part),
                size(part.size),
                size(part.cached),
                preview_of(part),
            )
            for part in parts
        ]
        self.table(("SAE", "place", "size", "cached", ""), rows)
        need, free = missing(parts), free_for_downloads()
        fits = "" if need <= free else ": not enough"
        self.stdout.write(
            f"\n{len(parts)} SAE{'s' if len(parts) != 1 else ''}, {size(need)} to download, {size(free)} of disk to spare{fits}"
        )

    def report(self, parts: list[Part], seconds: float, dry: bool) -> None:
        found = summary(parts, seconds)
        if dry:
            found |= {"dry_run": True, "bytes": missing(parts), "free": free_for_downloads()}
            found["failed"] = sum(bool(part.error) for part in parts)
            found["done"] = sum(part.here for part in parts)
        if self.quiet:
            self.stdout.write(json.dumps(found))
        elif not dry:
            rows = [(part.row.name, size(part.size), span(part.seconds), said(part)) for part in parts]
            self.table(("SAE", "size", "time", ""), rows)
            rate = f", {size(found['bytes'] / seconds)}/s" if found["bytes"] else ""
            self.stdout.write(
                f"\n{found['done']} of {len(parts)} are here; {size(found['bytes'])} in {span(seconds)}{rate}"
            )
        if found["failed"]:
            raise SystemExit(1)

    def table(self, head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
        """Columns of one width; figures to the right, the last one as long as it is."""
        widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head) - 1)]
        for row in (head, *rows):
            cells = zip(head, row, widths, strict=False)
            line = [cell.rjust(width) if name in NUMBERS else cell.ljust(width) for name, cell, width in cells]
            self.stdout.write("  ".join([*line, row[-1]]).rstrip())


class Bars:
    """A bar for each SAE and each of its files that is on its way, and one for all, in bytes."""

    def __init__(self, parts: list[Part], hidden: bool, say: Callable[[str], Any]) -> None:
        self.parts, self.say = parts, say
        off = True if hidden else None  # None: where there is no terminal
        total = sum(part.size or 0 for part in parts)
        self.all = tqdm(total=total, desc="all", unit="B", unit_scale=True, dynamic_ncols=True, disable=off)
        self.plain = not hidden and self.all.disable
        self.bars: dict[int, Any] = {}  # by job
        self.files: dict[tuple[int, str], Any] = {}  # by job and file
        self.told: set[int] = set()
        self.off = off

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *_: Any) -> None:
        for bar in [*self.files.values(), *self.bars.values(), self.all]:
            bar.close()

    def show(self) -> None:
        """Read the rows of all jobs that are on, in one query, and draw."""
        on = {part.job.pk: part for part in self.parts if part.job is not None and part.job.pk not in self.told}
        jobs = Job.objects.in_bulk([*on])
        for pk, job in jobs.items():
            if job.is_live:
                self._draw(on[pk], job)
            else:
                self._end(on[pk], job)
        loose = sum(bar.n for bar in self.bars.values())
        whole = sum(part.size or 0 for part in self.parts if part.here or (part.job and part.job.pk in self.told))
        self.all.n = min(whole + loose, self.all.total or 0)
        self.all.refresh()

    def _draw(self, part: Part, job: Job) -> None:
        if job.unit != "bytes" and job.pk not in self.bars:
            return
        if job.pk not in self.bars:
            self.bars[job.pk] = self._bar(part.row.name[-40:], job.done if job.unit == "bytes" else 0)
        bar = self.bars[job.pk]
        bar.set_postfix_str(job.step.partition(": ")[0][:30], refresh=False)
        if job.unit == "bytes":
            bar.total, bar.n = job.total, job.done
        bar.refresh()
        self._draw_files(part, job)

    def _draw_files(self, part: Part, job: Job) -> None:
        coming = {} if self.all.disable else part.on_the_way()
        for path, (have, total) in coming.items():
            key = (job.pk, path)
            if key not in self.files:
                self.files[key] = self._bar(f"  {path.rpartition('/')[2][-38:]}", have)
            bar = self.files[key]
            bar.total, bar.n = total, have
            bar.refresh()
        self._close_files(job, keep=coming)

    def _close_files(self, job: Job, keep: Collection[str] = ()) -> None:
        for key in [key for key in self.files if key[0] == job.pk and key[1] not in keep]:
            self.files.pop(key).close()

    def _bar(self, what: str, have: int) -> Any:
        """`have` bytes came before the bar did, and count for no rate."""
        return tqdm(
            desc=what, initial=have, unit="B", unit_scale=True, leave=False, dynamic_ncols=True, disable=self.off
        )

    def _end(self, part: Part, job: Job) -> None:
        self.told.add(job.pk)
        self._close_files(job)
        if bar := self.bars.pop(job.pk, None):
            bar.close()
        if self.plain:
            self.say(f"{job.state:9}  {part.row.name}")


NUMBERS = {"size", "cached", "time"}


def place(part: Part) -> str:
    return f"{part.row.repo_id}:{part.row.repo_path}".rstrip(":")


def said(part: Part) -> str:
    """How it stands, and why."""
    if part.state == "waiting":
        return "not begun"
    return f"{part.state}: {part.error}" if part.error else part.state


def preview_of(part: Part) -> str:
    """What a dry run says of it beside its size."""
    if part.error or part.here:
        return said(part)
    if part.twin is None:
        return ""
    return f"same weights as {part.twin.name}" + (f" (SAE {part.twin.pk}), which is here" if part.twin.ready else "")


def size(n: float | None) -> str:
    """12,345,678 -> "12.3 MB"; "–" where it is not known."""
    if n is None:
        return "–"
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}" if unit != "B" else f"{n:.0f} B"
        n /= 1000
    return f"{n:,.2f} TB"


def span(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(seconds, 60)
    return f"{minutes:.0f} min {rest:.0f} s" if minutes else f"{rest:.1f} s"
