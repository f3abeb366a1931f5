"""A batch of SAEs: what somebody wants, said by flags, by a YAML or CSV file, or by the basket, and the rows it means.

    saes:
      - release: gemma-scope-2b-pt-res
        layers: 0-25
        width: 16k
        l0: nearest:100
      - repo: org/name
        path: layer_3/sae
        revision: 0123abc

Nothing here asks the Hub or needs torch. `plan` finds the rows; `saes.batch_run` measures and brings them.
"""

from __future__ import annotations

import csv
import difflib
import io
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from django.db.models import Max, Q, QuerySet, TextField
from django.db.models.functions import Cast

from saes import gemma_scope
from saes.models import SAE, Release
from saes.naming import named

LARGEST_FILE = 1024 * 1024
MOST_WISHES = 5000
MOST_ROWS = 5000
SITES = {"res": ("resid_pre", "resid_mid", "resid_post"), "att": ("attn_out", "hook_z"), "mlp": ("mlp_out",)}


class BatchError(ValueError):
    """A batch that cannot be meant: one sentence, and a hint."""

    def __init__(self, sentence: str, hint: str = "") -> None:
        super().__init__(sentence)
        self.hint = hint


@dataclass(frozen=True)
class Wish:
    """Which SAEs; what is empty leaves all. At least one of release, model and repo is said.

    `layers` "0-25" or "3,5"; `width` "16k" or a number of features; `l0` "nearest:100", "50-150", "82" or "canonical"; `site`
    a site's name, or res, att, mlp. A `repo` with a `path` need not be in the catalogue.
    """

    release: str = ""
    id: str = ""
    model: str = ""
    layers: str = ""
    site: str = ""
    width: str = ""
    l0: str = ""
    repo: str = ""
    path: str = ""
    revision: str = ""

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.said().items())

    def said(self) -> dict[str, str]:
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name))}


NAMES = tuple(field.name for field in fields(Wish))


@dataclass(frozen=True)
class BatchSpec:
    """Which SAEs are meant, in the same words from flags, a YAML or CSV list, or the basket; `plan` gives their rows."""

    wishes: tuple[Wish, ...]

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any]) -> BatchSpec:
        """One wish, of a command's options; other options are passed over."""
        return cls((_wish({name: flags[name] for name in NAMES if flags.get(name)}, "The flags"),))

    @classmethod
    def from_file(cls, path: Path) -> BatchSpec:
        """A .yaml, .yml or .csv file."""
        try:
            if path.stat().st_size > LARGEST_FILE:
                raise BatchError(f"{path.name} is larger than {LARGEST_FILE // 1024} KB, which no list of SAEs is.")
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise BatchError(f"{path.name} is not a text file in UTF-8.") from None
        except OSError as error:
            raise BatchError(f"{path} cannot be read: {error.strerror}.") from None
        return cls.from_text(text, path.suffix.lower(), path.name)

    @classmethod
    def from_text(cls, text: str, suffix: str, name: str = "the list") -> BatchSpec:
        readers = {".yaml": _yaml_entries, ".yml": _yaml_entries, ".csv": _csv_entries}
        if suffix not in readers:
            raise BatchError(f"{name} is neither .yaml nor .csv.")
        entries = readers[suffix](text, name)
        if not entries:
            raise BatchError(f"{name} names no SAE.")
        if len(entries) > MOST_WISHES:
            raise BatchError(f"{name} has {len(entries):,} entries; at most {MOST_WISHES:,} are read.")
        return cls(tuple(_wish(entry, f"{name}, {place}") for place, entry in entries))

    @classmethod
    def from_rows(cls, rows: Iterable[SAE]) -> BatchSpec:
        """Exactly these rows, each by its place on the Hub. Raises BatchError for one that has none."""
        wishes = []
        for row in rows:
            if not row.repo_id:
                raise BatchError(f"{row.name} is not from the Hub, so it cannot be downloaded.")
            wishes.append(Wish(repo=row.repo_id, path=row.repo_path, revision=row.revision))
        return cls(tuple(wishes))

    def to_yaml(self) -> str:
        """The same batch as a file for `manage.py download_saes --spec`."""
        return yaml.safe_dump({"saes": [wish.said() for wish in self.wishes]}, sort_keys=False, allow_unicode=True)


# -- reading -----------------------------------------------------------------------------------------------------------
def _yaml_entries(text: str, name: str) -> list[tuple[str, Any]]:
    try:
        whole = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise BatchError(f"{name} is not YAML: line {line} cannot be read.") from None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise BatchError(f"{name} is not YAML.") from None
    rows = whole.get("saes") if isinstance(whole, dict) else whole
    if isinstance(whole, dict) and set(whole) - {"saes"}:
        odd = ", ".join(str(key) for key in list(set(whole) - {"saes"})[:3])
        raise BatchError(f"{name} holds {odd} beside its list saes.", "Put each SAE below `saes:`, with a dash.")
    if not isinstance(rows, list):
        raise BatchError(f"{name} has no list of SAEs.", "Write `saes:` and below it one entry a line, with a dash.")
    return [(f"entry {number}", row) for number, row in enumerate(rows, 1)]


def _csv_entries(text: str, name: str) -> list[tuple[str, Any]]:
    try:
        reader = csv.DictReader(io.StringIO(text), strict=True)
        rows = [(f"line {reader.line_num}", row) for row in reader]
    except csv.Error:
        raise BatchError(f"{name} is not CSV.") from None
    return [(place, {key: value for key, value in row.items() if value}) for place, row in rows if any(row.values())]


def _wish(entry: Any, place: str) -> Wish:
    """Raises BatchError, naming the place, for what is not a wish."""
    if not isinstance(entry, dict) or not entry:
        raise BatchError(f"{place}: this does not say which SAEs.", f"It may say {', '.join(NAMES)}.")
    said = {}
    for key, value in entry.items():
        if key not in NAMES:
            near = difflib.get_close_matches(str(key), NAMES, 1)
            hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(NAMES)}."
            raise BatchError(f'{place}: "{str(key)[:40]}" is not known.', hint)
        said[key] = _text(key, value, place)
    wish = Wish(**said)
    if not (wish.release or wish.model or wish.repo):
        raise BatchError(f"{place}: say a release, a model or a repository.")
    if wish.path and not wish.repo:
        raise BatchError(f"{place}: a path needs its repository.")
    try:
        _layers(wish.layers), _width(wish.width), _l0(wish.l0)
    except BatchError as error:
        raise BatchError(f"{place}: {error}", error.hint) from None
    return wish


def _text(key: str, value: Any, place: str) -> str:
    if key == "layers" and isinstance(value, list) and all(type(one) is int for one in value):
        value = ",".join(map(str, value))
    if not isinstance(value, str | int | float) or isinstance(value, bool) or len(str(value)) > 400:
        raise BatchError(f"{place}: {key} must be a word or a number.")
    text = str(value).strip()
    return text.strip("/") if key in ("repo", "path") else text


def _layers(text: str) -> set[int]:
    """ "0-3,7" -> {0, 1, 2, 3, 7}."""
    found: set[int] = set()
    for part in filter(None, text.replace(" ", "").split(",")):
        ends = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part)
        if not ends or int(ends[2] or ends[1]) < int(ends[1]):
            raise BatchError(f'layers "{text}" cannot be read.', "Write them as 0-25 or 3,5,9.")
        found |= set(range(int(ends[1]), int(ends[2] or ends[1]) + 1))
    return found


def _width(text: str) -> set[int]:
    """Numbers of features that a width means: "16k" is 16,000 or 16,384; "65k" is 65,536; "16384" is itself."""
    if not text:
        return set()
    found = re.fullmatch(r"(\d{1,9})([kKmM]?)", text)
    if not found:
        raise BatchError(f'width "{text}" cannot be read.', "Write it as 16k, 1m or a number of features.")
    number, unit = int(found[1]), found[2].lower()
    if not unit:
        return {number}
    thousand = 1000 if unit == "k" else 1000**2
    kilo = 1024 if unit == "k" else 1024**2
    return {number * thousand, number * kilo, gemma_scope.width_of(f"{number}{unit}") if number else 0}


def _l0(text: str) -> tuple[str, float, float]:
    """(how, from, to): nearest, between or canonical."""
    if text in ("", "canonical"):
        return text, 0.0, 0.0
    number = r"(\d+(?:\.\d+)?)"
    if found := re.fullmatch(rf"nearest:\s*{number}", text):
        return "nearest", float(found[1]), float(found[1])
    if (found := re.fullmatch(rf"{number}(?:\s*-\s*{number})?", text)) and float(found[2] or found[1]) >= float(
        found[1]
    ):
        return "between", float(found[1]), float(found[2] or found[1])
    raise BatchError(f'l0 "{text}" cannot be read.', "Write it as nearest:100, 50-150, 82 or canonical.")


# -- the rows ----------------------------------------------------------------------------------------------------------
def plan(spec: BatchSpec) -> list[SAE]:
    """The rows that a batch means, each once, in its order. A place outside of the catalogue is a row not saved yet.

    Raises BatchError when a wish means no SAE, saying what comes near, or when they are too many.
    """
    found: dict[tuple[str, str], SAE] = {}
    exact = _exact(spec)
    for wish in spec.wishes:
        for row in exact.get((wish.repo, wish.path)) or _rows_of(wish):
            if wish.revision and row.ready:
                _require_commit(row, wish.revision)
            elif wish.revision:
                row.revision = wish.revision
            found.setdefault((row.repo_id, row.repo_path), row)
        if len(found) > MOST_ROWS:
            raise BatchError(f"This means more than {MOST_ROWS:,} SAEs.", "Narrow it by layers, width or l0.")
    return list(found.values())


def _require_commit(row: SAE, revision: str) -> None:
    """A row that is here stays as it is; that it is another commit than the one wanted is said."""
    if re.fullmatch(r"[0-9a-f]{40}", revision) and revision != row.revision:
        raise BatchError(
            f"{row.name} is here at commit {row.revision[:12] or 'unknown'}, not at {revision[:12]}.",
            "Remove it first, or leave the revision out.",
        )


def _exact(spec: BatchSpec) -> dict[tuple[str, str], list[SAE]]:
    """Rows of the wishes that say a place and nothing else, in one query: a basket is many of them."""
    places = {
        (w.repo, w.path) for w in spec.wishes if w.repo and set(w.said()) <= {"repo", "path", "revision"} and w.path
    }
    rows = _related().filter(repo_id__in={repo for repo, _ in places}, repo_path__in={path for _, path in places})
    return {place: [row] for row in rows if (place := (row.repo_id, row.repo_path)) in places}


def _related() -> QuerySet[SAE]:
    return SAE.objects.select_related("release", "model", "job")  # type: ignore[no-any-return]


def _rows_of(wish: Wish) -> list[SAE]:
    rows = _related().exclude(repo_id="")
    how, low, high = _l0(wish.l0)
    if wish.release:
        rows = rows.annotate(others=Cast("aliases", TextField())).filter(
            Q(release__name=wish.release) | Q(others__contains=f'"{wish.release}/')
        )
    if wish.id:
        rows = rows.annotate(names=Cast("aliases", TextField())).filter(
            Q(sae_id=wish.id) | Q(names__contains=f'/{wish.id}"')
        )
    if wish.model:
        rows = rows.filter(_of_model(wish.model))
    if wish.repo:
        rows = rows.filter(repo_id=wish.repo)
    if wish.path:
        rows = rows.filter(repo_path=wish.path)
    if wish.layers:
        rows = rows.filter(layer__in=_layers(wish.layers))
    if wish.site:
        rows = rows.filter(site__in=SITES.get(wish.site, (wish.site,)))
    if wish.width:
        rows = rows.filter(d_sae__in=_width(wish.width))
    if how == "between":
        rows = rows.filter(published_l0__range=(low, high))
    rows = rows.order_by("release__name", "layer", "d_sae", "published_l0", "pk")[: MOST_ROWS + 1]
    chosen = _nearest(list(rows), low) if how == "nearest" else list(rows)
    if how == "canonical":
        chosen = [row for row in chosen if _is_canonical(row, wish)]
    if not chosen and wish.repo and set(wish.said()) <= {"repo", "path", "revision"}:
        return [_outside(wish)]
    if not chosen:
        raise _nothing(wish, without_l0=how == "nearest" and bool(rows))
    return chosen


def _of_model(name: str) -> Q:
    """By its own name, or by the last part of it: gemma-2-2b is google/gemma-2-2b."""
    short = name.rpartition("/")[2]
    said = Q(model_name__iexact=name) | Q(model_name__iexact=short) | Q(model_name__iendswith=f"/{short}")
    return said | Q(model__name__iexact=name)


def _nearest(rows: list[SAE], l0: float) -> list[SAE]:
    """Of each repository, site, layer and width the one whose published L0 is nearest; one without an L0 cannot be it."""
    best: dict[tuple[Any, ...], SAE] = {}
    for row in rows:
        key = (row.repo_id, row.site, row.layer, row.d_sae)
        if row.published_l0 is None:
            continue
        apart = abs(row.published_l0 - l0)
        other = best.get(key)
        if other is None or apart < abs((other.published_l0 or math.inf) - l0):
            best[key] = row
    return list(best.values())


def _is_canonical(row: SAE, wish: Wish) -> bool:
    """Whether its authors, or those of the release that was named, call it canonical."""
    names = [row.name, *row.aliases]
    return row.sae_id.endswith("canonical") or any(str(name).endswith("/canonical") for name in names)


def _outside(wish: Wish) -> SAE:
    """A row for a place that the catalogue does not know; what its path says of it is filled in."""
    name = (f"{wish.repo}:{wish.path}" if wish.path else wish.repo)[:200]
    row = SAE(name=name, source=SAE.Source.HUB, repo_id=wish.repo, repo_path=wish.path, revision=wish.revision)
    variant = gemma_scope.parse(wish.repo, wish.path)
    if variant is not None:
        said = named(variant.format, wish.repo, wish.path)
        row.repo_path, row.format, row.site, row.layer, row.d_sae = (
            variant.path, variant.format, said.site, said.layer, said.d_sae,
        )  # fmt: skip
        row.model_name, row.architecture, row.published_l0 = said.model_name, said.architecture, said.l0
        row.hook_name, row.hook_name_out = said.hook_name, said.hook_name_out
    else:
        row.format = ""
    return row


def _nothing(wish: Wish, without_l0: bool) -> BatchError:
    if without_l0:
        return BatchError(f"None of the SAEs with {wish} has a published L0 to choose by.", "Leave l0 out.")
    sentence = f"No SAE of the catalogue has {wish}."
    if not SAE.objects.exclude(release=None).exists():
        return BatchError(sentence, "The catalogue is empty: run `manage.py catalogue_sync` first.")
    if wish.release and not Release.objects.filter(name=wish.release).exists():
        return BatchError(sentence, _near(wish.release, Release.objects.values_list("name", flat=True), "release"))
    if wish.model and not SAE.objects.filter(_of_model(wish.model)).exists():
        models = SAE.objects.exclude(model_name="").order_by().values_list("model_name", flat=True).distinct()
        return BatchError(sentence, _near(wish.model, models, "model"))
    return BatchError(sentence, _alternatives(wish))


def _near(word: str, there: Iterable[str], what: str) -> str:
    near = difflib.get_close_matches(word, list(there), n=3, cutoff=0.4)
    return f"The nearest of its {what}s: {', '.join(near)}." if near else f"There is no {what} of a similar name."


def _alternatives(wish: Wish) -> str:
    """What layers, widths and sites there are of the release, model or repository."""
    rows = SAE.objects.exclude(repo_id="")
    rows = rows.filter(release__name=wish.release) if wish.release else rows
    rows = rows.filter(_of_model(wish.model)) if wish.model else rows
    rows = rows.filter(repo_id=wish.repo) if wish.repo else rows
    sites = sorted(set(rows.order_by().exclude(site="").values_list("site", flat=True).distinct()))
    widths = sorted({width for width in rows.order_by().values_list("d_sae", flat=True).distinct() if width})[:12]
    last = rows.aggregate(last=Max("layer"))["last"]
    parts = [f"layers up to {last}"] if last is not None else []
    parts += [f"sites {', '.join(sites)}"] if sites else []
    parts += [f"widths {', '.join(f'{width:,}' for width in widths)}"] if widths else []
    return f"There are {'; '.join(parts)}." if parts else ""
