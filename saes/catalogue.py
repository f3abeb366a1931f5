"""The catalogue: every public SAE that sae-lens' directory knows, as rows of the registry, before anything is downloaded.

The directory is `pretrained_saes.yaml` inside the sae-lens wheel, fetched through pip when asked for. It has holes and
faults, so every entry is checked, what is missing stays null, and what is odd becomes a warning of the summary.

    wheel or yaml -> `read_directory` -> entries, one for each release/id
                  -> `merge`          -> one `Found` for each (repository, path), other names of it as aliases
                  -> `store`          -> Release and SAE rows; local work on a row (notes, curation, files) is never touched
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from django.db import connection, transaction
from django.utils import timezone

from saes.models import SAE, Release
from saes.naming import FORMAT_OF, Named, named

PACKAGE = "sae-lens"
MEMBER = "sae_lens/pretrained_saes.yaml"
LARGEST = 64 * 1024 * 1024  # bytes of the yaml: it has 2 MB
BATCH = 1000
LOCK = 0x5AE_CA7  # advisory lock: two syncs at once would both find the same rows missing
Say = Callable[[str], None]


class CatalogueError(Exception):
    """The directory cannot be had or read; the message is one sentence, `hint` what to do."""

    def __init__(self, sentence: str, hint: str = "") -> None:
        super().__init__(sentence)
        self.hint = hint


@dataclass
class Entry:
    """One release/id of the directory."""

    release: str
    sae_id: str
    repo_id: str
    path: str
    format: str
    model_name: str
    l0: float | None
    variance: float | None
    neuronpedia_id: str
    facts: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.release}/{self.sae_id}"


@dataclass
class Directory:
    """What was read: its origin ("sae-lens 6.54.12"), releases, entries, and warnings."""

    origin: str
    releases: dict[str, dict[str, Any]] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass
class Found:
    """The SAE at one place of the Hub with all that the directory's entries say about it."""

    entry: Entry
    aliases: list[str]
    said: Named


# -- getting it --------------------------------------------------------------------------------------------------------
def open_directory(source: str = "", version: str = "", say: Say = print) -> Directory:
    """The directory of a wheel or yaml already here, or of the wheel that pip brings."""
    if source:
        return _of_file(Path(source))
    with tempfile.TemporaryDirectory(prefix="sae-lens-") as folder:
        say(f"Fetching the wheel of {PACKAGE} through pip")
        return _of_file(fetch_wheel(Path(folder), version))


def fetch_wheel(folder: Path, version: str = "") -> Path:
    """The sae-lens wheel, without what it depends on. pip's own settings (index, proxy, certificates) hold."""
    wanted = f"{PACKAGE}=={version}" if version else PACKAGE
    call = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    done = subprocess.run([*call, "-d", str(folder), wanted], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise CatalogueError(*_why_not(done.stderr, wanted))
    return wheels[0]


def _why_not(answer: str, wanted: str) -> tuple[str, str]:
    """Sentence and hint for what pip said. Its own words may hold the address and password of a private index."""
    here = f"If the wheel or its {Path(MEMBER).name} is already here, name it: manage.py catalogue_sync --from FILE."
    if "No module named pip" in answer:
        return "This Python has no pip to fetch the wheel with.", here
    if re.search(
        r"NewConnectionError|ConnectTimeout|NameResolution|Connection (refused|broken)|ProxyError|timed out", answer
    ):
        return f"pip cannot reach its package index, so {wanted} was not fetched.", here
    if "No matching distribution" in answer:
        return f"pip's package index has no {wanted} for this Python.", here
    return f"pip did not bring {wanted}.", f"Try `python -m pip download --no-deps {wanted}` to see why. {here}"


def _of_file(path: Path) -> Directory:
    if not path.is_file():
        raise CatalogueError(f"There is no file {path}.")
    if path.suffix in (".yaml", ".yml"):
        if path.stat().st_size > LARGEST:
            raise CatalogueError(f"{path.name} is larger than any directory of SAEs.")
        return read_directory(path.read_bytes(), path.name)
    try:
        with zipfile.ZipFile(path) as wheel:
            info = wheel.getinfo(MEMBER)
            if info.file_size > LARGEST:
                raise CatalogueError(f"{MEMBER} in {path.name} is larger than any directory of SAEs.")
            text = wheel.read(info)
    except (zipfile.BadZipFile, KeyError, OSError):
        raise CatalogueError(f"{path.name} is not a sae-lens wheel: there is no {MEMBER} in it.") from None
    version = path.name.split("-")[1] if path.name.count("-") > 1 else ""
    return read_directory(text, f"{PACKAGE} {version}".strip())


# -- reading it --------------------------------------------------------------------------------------------------------
def read_directory(text: bytes, origin: str) -> Directory:
    """Parse and check the yaml. Raises CatalogueError where nothing of it can be used."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        whole = yaml.load(text, Loader=loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError):
        raise CatalogueError(f"{origin} is not readable YAML.") from None
    if not isinstance(whole, dict) or not whole:
        raise CatalogueError(f"{origin} is not a directory of SAEs: it should map release names to releases.")
    read = Directory(origin)
    for name, release in whole.items():
        _read_release(read, str(name), release)
    if not read.entries:
        raise CatalogueError(f"{origin} names no SAE.", "; ".join(read.warnings[:3]))
    return read


def _read_release(read: Directory, name: str, release: Any) -> None:
    if not isinstance(release, dict) or not isinstance(release.get("saes"), list) or not _text(release.get("repo_id")):
        read.warnings.append(f"{name}: left out, it has no repo_id or no list of saes.")
        return
    kind = release.get("conversion_func")
    if kind not in FORMAT_OF:
        read.warnings.append(
            f"{name}: its files are of a kind not known here ({kind}); its SAEs can be found, not loaded."
        )
    overrides = release.get("config_overrides")
    if overrides is not None and not isinstance(overrides, dict):
        read.warnings.append(f"{name}: config_overrides is not a mapping and was left out.")
        overrides = None
    links = release.get("links") if isinstance(release.get("links"), dict) else {}
    read.releases[name] = {
        "repo_id": _text(release["repo_id"]),
        "model_name": _text(release.get("model")),
        "format": FORMAT_OF.get(kind, ""),
        "links": {key: value for key, value in (links or {}).items() if isinstance(value, str)},
        "facts": overrides or {},
    }
    for row in _flat(read, name, release["saes"]):
        entry = _read_entry(read, name, row)
        if entry is not None:
            read.entries.append(entry)


def _flat(read: Directory, name: str, rows: list[Any]) -> Iterator[Any]:
    """The release's entries, with those of a release that wrong indentation put inside one of them."""
    seen = {row.get("id") for row in rows if isinstance(row, dict)}
    for row in rows:
        yield row
        inner = row.get("saes") if isinstance(row, dict) else None
        if not isinstance(inner, list):
            continue
        new = [one for one in inner if isinstance(one, dict) and one.get("id") not in seen]
        same = "its own entries again" if not new else f"{len(new)} more entries, taken up"
        read.warnings.append(f"{name}/{row.get('id')}: wrong indentation put a release inside this SAE ({same}).")
        yield from new


def _read_entry(read: Directory, release: str, row: Any) -> Entry | None:
    said = row.get("id") if isinstance(row, dict) else None
    path = row.get("path") if isinstance(row, dict) else None
    if not _text(said) or not isinstance(path, str | int) or isinstance(path, bool) or path == "":
        read.warnings.append(f"{release}/{said or '?'}: left out, it has no id or no path.")
        return None
    facts = read.releases[release]
    l0 = _number(row.get("l0"))
    if row.get("l0") is not None and (l0 is None or l0 <= 0):
        read.warnings.append(f"{release}/{said}: an L0 of {row['l0']} says nothing and was left out.")
        l0 = None
    own = {"norm_scaling_factor": _number(row.get("norm_scaling_factor"))} if "norm_scaling_factor" in row else {}
    return Entry(
        release=release,
        sae_id=_text(said),
        repo_id=facts["repo_id"],
        path=_place(facts["format"], path),
        format=facts["format"],
        model_name=facts["model_name"],
        l0=l0,
        variance=_number(row.get("variance_explained")),
        neuronpedia_id=_text(row.get("neuronpedia")),
        facts=facts["facts"] | {key: value for key, value in own.items() if value is not None},
    )


def _place(format: str, path: str | int) -> str:
    """Folder or file in the repository. For cross-layer transcoders the directory gives only the layer's number, and for
    the hook_z SAEs a stem."""
    if format == "mntss_clt":
        return f"W_enc_{path}.safetensors"
    if format == "connor_rob_hook_z" and not str(path).endswith(".pt"):
        return f"{path}.pt"
    return str(path).strip("/")


def _text(value: Any) -> str:
    return value.strip()[:300] if isinstance(value, str) else ""


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


# -- one row for each place on the Hub ---------------------------------------------------------------------------------
def merge(read: Directory) -> list[Found]:
    """Entries of the same repository and path become one; its other names become aliases."""
    places: dict[tuple[str, str], list[Entry]] = {}
    for entry in read.entries:
        places.setdefault((entry.repo_id, entry.path), []).append(entry)
    found = [_merged(read, entries) for entries in places.values()]
    return sorted(
        found, key=lambda one: (one.entry.release, one.said.layer or 0, one.said.d_sae or 0, one.entry.l0 or 0)
    )


def _merged(read: Directory, entries: list[Entry]) -> Found:
    """The first entry whose release is no list of chosen ones ("-canonical") gives the name."""
    entries = sorted(entries, key=lambda entry: entry.release.endswith("-canonical"))
    first = entries[0]
    said = named(first.format, first.repo_id, first.path, first.sae_id, _first(entries, "neuronpedia_id") or "")
    l0s = {entry.l0 for entry in entries if entry.l0 is not None}
    if len(l0s) > 1:
        listed = " and ".join(f"{value:g}" for value in sorted(l0s))
        read.warnings.append(f"{first.repo_id}:{first.path}: its L0 is given as {listed}.")
    first.l0 = said.l0 if said.l0 in l0s else _first(entries, "l0")
    first.variance = _first(entries, "variance")
    first.model_name = said.model_name or str(first.facts.get("model_name", "")) or first.model_name
    aliases = [entry.name for entry in entries[1:] if entry.name != first.name]
    others = {entry.neuronpedia_id for entry in entries} - {"", first.neuronpedia_id}
    if not first.neuronpedia_id and others:
        first.neuronpedia_id = min(others, key=lambda text: (len(text), text))
    first.facts = {key: value for entry in reversed(entries) for key, value in entry.facts.items()}
    aliases += [f"neuronpedia:{text}" for text in sorted(others - {first.neuronpedia_id})]
    return Found(first, sorted(set(aliases)), said)


def _first(entries: Iterable[Entry], name: str) -> Any:
    return next((value for entry in entries if (value := getattr(entry, name)) not in (None, "")), None)


# -- storing it --------------------------------------------------------------------------------------------------------
PUBLISHED = ("release", "sae_id", "aliases", "neuronpedia_id", "published_l0", "published_variance", "gone_at")
GUESSED = (
    "name", "model_name", "hook_name", "hook_name_out", "site", "layer", "architecture", "d_sae", "k", "format", "facts",
)  # fmt: skip


def store(read: Directory, found: list[Found], say: Say = print) -> dict[str, Any]:
    """Write the rows in one transaction and say what changed. A second time nothing does.

    What was published is always taken over. What was only guessed from names is taken over as long as nobody has read
    the files: from then on the files' own word stands.
    """
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_xact_lock(%s)", [LOCK])
        releases = _store_releases(read)
        # Locked, so that a download that ends meanwhile is not overwritten with what its name made us guess.
        known = SAE.objects.select_for_update(of=("self",)).select_related("release").exclude(repo_id="")
        rows = {(row.repo_id, row.repo_path): row for row in known}
        new, changed = [], []
        for one in found:
            row = rows.get((one.entry.repo_id, one.entry.path))
            values = _values(one, releases)
            if row is None:
                new.append(SAE(repo_id=one.entry.repo_id, repo_path=one.entry.path, source=SAE.Source.HUB, **values))
            elif _update(row, values):
                changed.append(row)
        say(f"Writing {len(new):,} new and {len(changed):,} changed rows")
        SAE.objects.bulk_create(new, batch_size=BATCH)
        SAE.objects.bulk_create(  # an upsert on the primary key: bulk_update writes one CASE a row and field
            changed, batch_size=BATCH, update_conflicts=True, unique_fields=["pk"], update_fields=[*PUBLISHED, *GUESSED]
        )
        gone = _mark_gone(read, found)
    return {
        "origin": read.origin,
        "releases": len(read.releases),
        "entries": len(read.entries),
        "rows": len(found),
        "aliases": len(read.entries) - len(found),
        "new": len(new),
        "changed": len(changed),
        "gone": gone,
        "formats": dict(Counter(one.entry.format for one in found).most_common()),
        "warnings": read.warnings,
    }


def _store_releases(read: Directory) -> dict[str, Release]:
    now = timezone.now()
    rows = [
        Release(name=name, directory=read.origin, synced_at=now, **fields) for name, fields in read.releases.items()
    ]
    Release.objects.bulk_create(
        rows,
        batch_size=BATCH,
        update_conflicts=True,
        unique_fields=["name"],
        update_fields=["repo_id", "model_name", "format", "links", "facts", "directory", "synced_at"],
    )
    return Release.objects.in_bulk(field_name="name")


def _values(one: Found, releases: dict[str, Release]) -> dict[str, Any]:
    entry, said = one.entry, one.said
    return {
        "name": entry.name[:200],
        "release": releases[entry.release],
        "sae_id": entry.sae_id[:200],
        "aliases": one.aliases,
        "neuronpedia_id": entry.neuronpedia_id[:120],
        "published_l0": entry.l0,
        "published_variance": entry.variance,
        "gone_at": None,
        "model_name": entry.model_name[:120],
        "hook_name": str(entry.facts.get("hook_name") or said.hook_name)[:200],
        "hook_name_out": said.hook_name_out,
        "site": said.site,
        "layer": said.layer,
        "architecture": said.architecture,
        "d_sae": said.d_sae,
        "k": said.k,
        "format": entry.format,
        "facts": entry.facts,
    }


def _update(row: SAE, values: dict[str, Any]) -> bool:
    """Set what differs on the row; whether anything did."""
    names = list(PUBLISHED)
    if row.ready_at is None and row.read_at is None:
        names += GUESSED
        values = values | {"facts": row.facts | values["facts"]}
        if row.owner_id is not None or (row.sae_id and not row.name.endswith(f"/{row.sae_id}")):
            names.remove("name")  # somebody chose it
    differ = [name for name in names if getattr(row, name) != values[name]]
    for name in differ:
        setattr(row, name, values[name])
    return bool(differ)


def _mark_gone(read: Directory, found: list[Found]) -> int:
    """Rows that this directory named once and does not name any more: marked, and kept with all that hangs on them."""
    here = {(one.entry.repo_id, one.entry.path) for one in found}
    source = read.origin.split(" ")[0]
    theirs = SAE.objects.filter(release__directory__startswith=source, gone_at=None).values_list(
        "pk", "repo_id", "repo_path"
    )
    gone = [pk for pk, repo_id, path in theirs if (repo_id, path) not in here]
    return SAE.objects.filter(pk__in=gone).update(gone_at=timezone.now())


def sync(source: str = "", version: str = "", say: Say = print) -> dict[str, Any]:
    """Fetch, read, merge and store; returns the summary."""
    read = open_directory(source, version, say)
    say(f"Read {len(read.entries):,} entries of {len(read.releases):,} releases from {read.origin}")
    return store(read, merge(read), say)
