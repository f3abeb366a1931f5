"""What somebody typed or pasted, and the SAE it means.

    release/id            gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82, the way sae-lens is called
    repository:path       google/gemma-scope-2b-pt-res:layer_12/width_16k/average_l0_82, with @revision before the colon
    address on the Hub    https://huggingface.co/google/gemma-scope-2b-pt-res/tree/main/layer_12/...
    Neuronpedia           gemma-2-2b/12-gemmascope-res-16k or its address, with a feature's number behind
    repository            google/gemma-scope-2b-pt-res

Only the registry is asked, never the network. What is not in it is offered for download, or the nearest names are given.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from urllib.parse import SplitResult, unquote, urlsplit

from django.db.models import Q, QuerySet
from rapidfuzz import fuzz, process

from saes.models import SAE

REPO = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
SHORT = re.compile(r"(?P<repo>[\w][\w.-]*/[\w][\w.-]*)(?:@(?P<revision>[\w./-]+))?:(?P<path>.*)")
NEURONPEDIA = re.compile(r"(?P<id>[\w.-]+/\d+-[\w.-]+)(?:/(?P<feature>\d{1,9}))?")
HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
SHOWN = 8
ALIKE = 85  # of 100; a name typed in part counts for less than a whole one


@dataclass(frozen=True)
class Place:
    """A place on the Hub that was named; the path may be empty."""

    repo_id: str
    path: str = ""
    revision: str = ""

    def __str__(self) -> str:
        at = f" at {self.revision}" if self.revision else ""
        return f"{self.repo_id}{at}{', ' + self.path if self.path else ''}"


@dataclass(frozen=True)
class Resolution:
    """`said`: how the text was read, as a sentence. One `sae`, or several `saes`; a `place` that may be downloaded; the
    `nearest` where nothing was found; the `feature` that stood behind a Neuronpedia id."""

    said: str = ""
    sae: SAE | None = None
    saes: list[SAE] = field(default_factory=list)
    place: Place | None = None
    nearest: list[SAE] = field(default_factory=list)
    feature: int | None = None


def resolve(text: str) -> Resolution:
    """The first reading of `text` that the registry knows; else what it may be downloaded as; else the nearest names."""
    text = text.replace("\0", "").strip()[:500]
    if not text:
        return Resolution()
    readings = [
        reading
        for read in (_neuronpedia_url, _hub_url, _short, _named, _neuronpedia, _repository)
        if (reading := read(text))
    ]
    for reading in readings:
        if reading.sae or reading.saes:
            return reading
    offered = next((reading for reading in readings if reading.place), Resolution())
    return replace(offered, nearest=nearest(offered.place.path or offered.place.repo_id if offered.place else text))


def place_of(text: str) -> Place | None:
    """The place on the Hub that an address, a `repository:path` or a repository's id names."""
    text = text.strip()
    found = _of_url(text) or _of_short(text)
    return found or (Place(text) if REPO.fullmatch(text) else None)


# -- readings ----------------------------------------------------------------------------------------------------------
def _neuronpedia_url(text: str) -> Resolution | None:
    parts = _split(text)
    if parts is None or parts.hostname not in ("neuronpedia.org", "www.neuronpedia.org"):
        return None
    found = NEURONPEDIA.match(unquote(parts.path).strip("/"))
    return _on_neuronpedia(found) if found else None


def _neuronpedia(text: str) -> Resolution | None:
    found = NEURONPEDIA.fullmatch(text)
    return _on_neuronpedia(found) if found else None


def _on_neuronpedia(found: re.Match[str]) -> Resolution:
    name, feature = found["id"], found["feature"]
    rows = _rows(Q(neuronpedia_id=name) | Q(aliases__contains=[f"neuronpedia:{name}"]))
    behind = f", feature {feature}" if feature else ""
    reading = _one_or_several(rows, f"{name} on Neuronpedia{behind}")
    return replace(reading, feature=int(feature) if feature else None)


def _split(text: str) -> SplitResult | None:
    """The parts of an address, with or without https:// in front; None for what is none."""
    try:
        return urlsplit(text if "://" in text else f"https://{text}")
    except ValueError:
        return None


def _of_url(text: str) -> Place | None:
    parts = _split(text)
    if parts is None or parts.hostname not in _hub_hosts():
        return None
    pieces = [unquote(piece) for piece in parts.path.split("/") if piece]
    if len(pieces) < 2 or pieces[0] in ("datasets", "spaces", "docs", "api"):
        return None
    if len(pieces) < 4 or pieces[2] not in ("tree", "blob", "resolve", "raw"):
        return Place("/".join(pieces[:2]))
    if pieces[3] == "refs" and len(pieces) > 5:  # refs/pr/1
        return Place("/".join(pieces[:2]), "/".join(pieces[6:]), "/".join(pieces[3:6]))
    return Place("/".join(pieces[:2]), "/".join(pieces[4:]), pieces[3])


def _hub_hosts() -> tuple[str, ...]:
    """The Hub's names, and that of the mirror this instance uses."""
    mirror = urlsplit(os.environ.get("HF_ENDPOINT", "")).hostname
    return (*HUB_HOSTS, mirror) if mirror else HUB_HOSTS


def _hub_url(text: str) -> Resolution | None:
    place = _of_url(text)
    return _at(place) if place else None


def _of_short(text: str) -> Place | None:
    found = SHORT.fullmatch(text)
    return Place(found["repo"], found["path"].strip("/ "), found["revision"] or "") if found else None


def _short(text: str) -> Resolution | None:
    place = _of_short(text)
    return _at(place) if place else None


def _repository(text: str) -> Resolution | None:
    return _at(Place(text)) if REPO.fullmatch(text) else None


def _at(place: Place) -> Resolution:
    """The SAE at a place: of its folder or file, of the folder a file lies in, or those below it."""
    known = SAE.objects.filter(repo_id=place.repo_id)
    said = f"{place} on the Hub"
    path = place.path.strip("/")
    above = [path] + ["/".join(path.split("/")[:n]) for n in range(path.count("/"), 0, -1)]
    exact = {row.repo_path: row for row in _rows(Q(repo_path__in=above), known)} if path else {}
    row = next((exact[one] for one in above if one in exact), None)
    if row is not None:
        return replace(_one_or_several([row], said), place=place)
    below = _rows(Q(repo_path__startswith=f"{path}/") if path else Q(), known)
    return replace(_one_or_several(below, said), place=place)


def _named(text: str) -> Resolution | None:
    """`release/id`, another name of it, or an SAE's own name."""
    release, _, sae_id = text.partition("/")
    match = Q(name__iexact=text) | Q(aliases__contains=[text])
    if sae_id:
        match |= Q(release__name=release, sae_id=sae_id)
    rows = _rows(match)
    if not rows:
        return None
    other = rows[0].name.casefold() != text.casefold()
    return _one_or_several(rows, f"{text}, another name of {rows[0].name}" if other and len(rows) == 1 else text)


def _rows(match: Q, rows: QuerySet[SAE] | None = None) -> list[SAE]:
    found = (SAE.objects.all() if rows is None else rows).filter(match).select_related("job")
    return list(found.order_by("pk")[: SHOWN + 1])


def _one_or_several(rows: list[SAE], said: str) -> Resolution:
    if len(rows) == 1:
        return Resolution(f"This is {said}.", sae=rows[0])
    return Resolution(f"Read as {said}.", saes=rows[:SHOWN])


# -- what is like it ---------------------------------------------------------------------------------------------------
def nearest(text: str, names: Iterable[tuple[int, str]] | None = None) -> list[SAE]:
    """SAEs whose names are most like the text, best first."""
    if names is None:
        names = SAE.objects.order_by().values_list("pk", "name")
    choices = dict(names)
    found = process.extract(text, choices, scorer=fuzz.WRatio, processor=str.casefold, limit=SHOWN, score_cutoff=ALIKE)
    rows = SAE.objects.select_related("job").in_bulk([pk for _, _, pk in found])
    return [rows[pk] for _, _, pk in found if pk in rows]
