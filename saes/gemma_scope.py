"""Gemma Scope 1 and 2: what the paths of their repositories say about each SAE, and the one nearest to a wanted L0.

    google/gemma-scope-2b-pt-res         layer_12/width_16k/average_l0_82/params.npz
    google/gemma-scope-2b-pt-res         embedding/width_4k/average_l0_21/params.npz
    google/gemma-scope-2-1b-pt           resid_post_all/layer_13_width_16k_l0_small/params.safetensors
    google/gemma-scope-2-1b-pt           transcoder/layer_13_width_65k_l0_big_affine/params.safetensors
    google/gemma-scope-2-1b-pt           clt/width_262k_l0_big/params_layer_3.safetensors
    google/gemma-scope-2-1b-pt           crosscoder/layer_5_9_12_15_width_1m_l0_big/

Nothing here asks the Hub by itself: `of_tree` takes a list of paths, `of_rows` the registry's rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

CANONICAL_L0 = 100  # of the SAEs of one layer and width, the authors call the one nearest to it canonical

REPO_1 = re.compile(r"gemma-scope-(2b|9b|27b)-(pt|it)-(res|mlp|att|transcoders)$")
REPO_2 = re.compile(r"gemma-scope-2-(270m|1b|4b|12b|27b)-(pt|it)$")
PATH_1 = re.compile(r"(?:layer_(\d+)|embedding)/width_(\d+[km])/average_l0_(\d+)(?:/params\.npz)?$")
PATH_2 = re.compile(
    r"(?P<set>resid_post|attn_out|mlp_out|transcoder)(?P<all>_all)?/layer_(?P<layer>\d+)_width_(?P<width>\d+[km])"
    r"_l0_(?P<size>small|medium|big)(?P<affine>_affine)?(?:_seed_(?P<seed>\d+))?(?:/params\.safetensors)?$"
)
PATH_CLT = re.compile(
    r"clt/width_(?P<width>\d+[km])_l0_(?P<size>small|medium|big)(?P<affine>_affine)?(?:_seed_(?P<seed>\d+))?"
    r"(?:/params_layer_(?P<layer>\d+)(?:\.safetensors)?)?$"
)
PATH_CROSSCODER = re.compile(
    r"crosscoder/layer(?P<layers>(?:_\d+)+)_width_(?P<width>\d+[km])_l0_(?P<size>small|medium|big)(?P<affine>_affine)?"
    r"(?:_seed_(?P<seed>\d+))?$"
)
WEIGHTS = re.compile(r"/params(?:_layer_\d+)?\.(?:npz|safetensors)$")
# Site -> hook point read, hook point written (of a transcoder). `attn_out` of Gemma Scope 2 reads the input of o_proj, as
# `att` of Gemma Scope 1 does. The transcoders of the two differ: 1 reads the norm before its gain, 2 after it.
HOOKS_1 = {
    "res": ("resid_post", "blocks.{}.hook_resid_post", ""),
    "mlp": ("mlp_out", "blocks.{}.hook_mlp_out", ""),
    "att": ("hook_z", "blocks.{}.attn.hook_z", ""),
    "transcoders": ("transcoder", "blocks.{}.ln2.hook_normalized", "blocks.{}.hook_mlp_out"),
}
HOOKS_2 = {
    "resid_post": ("resid_post", "blocks.{}.hook_resid_post", ""),
    "mlp_out": ("mlp_out", "blocks.{}.hook_mlp_out", ""),
    "attn_out": ("hook_z", "blocks.{}.attn.hook_z", ""),
    "transcoder": ("transcoder", "blocks.{}.mlp.hook_in", "blocks.{}.hook_mlp_out"),
}
FACETS = ("layer", "site", "width", "size")


@dataclass(frozen=True)
class Variant:
    """One SAE of a Gemma Scope repository, as its path names it. Null means that the path does not say it."""

    repo_id: str
    path: str
    format: str
    model_name: str
    site: str
    layer: int | None
    width: str  # "16k"
    d_sae: int
    hook_name: str
    hook_name_out: str = ""
    architecture: str = "jumprelu"
    l0: float | None = None
    size: str = ""  # small | medium | big, of Gemma Scope 2
    affine: bool = False
    every_layer: bool = False  # of a set that covers all layers with fewer sizes ("_all")
    seed: int | None = None
    layers: tuple[int, ...] = ()  # of a crosscoder
    canonical: bool = False
    size_bytes: int | None = None


def is_gemma_scope(repo_id: str) -> bool:
    """Whether the repository is one whose paths are read here."""
    return bool(REPO_1.search(repo_id) or REPO_2.search(repo_id))


def width_of(text: str) -> int:
    """ "16k" -> 16384, "65k" -> 65536, "80k" -> 81920, "1m" -> 1048576: powers of two where one is near."""
    number, unit = float(text[:-1]), text[-1].lower()
    thousand, kilo = (1000, 1024) if unit == "k" else (1000**2, 1024**2)
    power = 2 ** round(math.log2(number * thousand))
    return power if abs(power / (number * thousand) - 1) < 0.055 else round(number * kilo)


def parse(repo_id: str, path: str) -> Variant | None:
    """The SAE at `path` (its folder or its weights' file), or None where the path is not one of Gemma Scope's."""
    path = path.strip("/")
    if found := REPO_1.search(repo_id):
        return _scope_1(repo_id, path, *found.groups())
    if found := REPO_2.search(repo_id):
        return _scope_2(repo_id, path, *found.groups())
    return None


def _scope_1(repo_id: str, path: str, size: str, tuning: str, kind: str) -> Variant | None:
    found = PATH_1.fullmatch(path)
    if not found or (found[1] is None and kind != "res"):
        return None
    site, hook, out = HOOKS_1[kind] if found[1] is not None else ("embed", "hook_embed", "")
    transcoder = kind == "transcoders"
    return Variant(
        repo_id=repo_id,
        path=path.removesuffix("/params.npz"),
        format="gemma_scope_1_transcoder" if transcoder else "gemma_scope_1",
        model_name=f"gemma-2-{size}" + ("-it" if tuning == "it" else ""),
        site=site,
        layer=int(found[1]) if found[1] is not None else None,
        width=found[2],
        d_sae=width_of(found[2]),
        hook_name=hook.format(found[1]),
        hook_name_out=out.format(found[1]),
        architecture="jumprelu_transcoder" if transcoder else "jumprelu",
        l0=float(found[3]),
    )


def _scope_2(repo_id: str, path: str, size: str, tuning: str) -> Variant | None:
    model = f"google/gemma-3-{size}" + ("-it" if tuning == "it" else "" if size == "270m" else "-pt")
    if found := PATH_2.fullmatch(path):
        site, hook, out = HOOKS_2[found["set"]]
        layer: int | None = int(found["layer"])
        layers: tuple[int, ...] = ()
        path = path.removesuffix("/params.safetensors")
    elif found := PATH_CLT.fullmatch(path):
        site, hook, out = "clt", HOOKS_2["transcoder"][1], HOOKS_2["transcoder"][2]
        layer = int(found["layer"]) if found["layer"] else None
        layers = ()
        path = path if layer is None or path.endswith(".safetensors") else f"{path}.safetensors"
    elif found := PATH_CROSSCODER.fullmatch(path):
        site, hook, out, layer = "crosscoder", "", "", None
        layers = tuple(int(number) for number in found["layers"].split("_")[1:])
    else:
        return None
    groups = found.groupdict()
    affine = bool(groups["affine"])
    return Variant(
        repo_id=repo_id,
        path=path,
        format="gemma_scope_2",
        model_name=model,
        site=site,
        layer=layer,
        width=groups["width"],
        d_sae=width_of(groups["width"]),
        hook_name=hook.format(layer) if layer is not None else "",
        hook_name_out=out.format(layer) if layer is not None else "",
        architecture=_architecture_2(site, affine),
        size=groups["size"],
        affine=affine,
        every_layer=bool(groups.get("all")),
        seed=int(groups["seed"]) if groups.get("seed") else None,
        layers=layers,
    )


def _architecture_2(site: str, affine: bool) -> str:
    if site in ("transcoder", "clt"):
        return "jumprelu_skip_transcoder" if affine else "jumprelu_transcoder"
    return "causal_crosscoder" if site == "crosscoder" else "jumprelu"


def of_tree(repo_id: str, files: Mapping[str, int]) -> list[Variant]:
    """Variants of a repository's tree (path -> bytes); what is no SAE's file is passed over.

    A crosscoder is one variant with all its files; a cross-layer transcoder one for each layer.
    """
    found: dict[str, Variant] = {}
    for path, size in files.items():
        if not WEIGHTS.search(path):
            continue
        variant = parse(repo_id, path) or parse(repo_id, path.rpartition("/")[0])
        if variant is not None:
            before = found.get(variant.path)
            found[variant.path] = replace(variant, size_bytes=size + (before.size_bytes or 0 if before else 0))
    return _ordered(_with_canonical(found.values()))


def of_rows(rows: Iterable[Any]) -> list[Variant]:
    """Variants of the registry's rows, with the L0, the canonical mark and the size that are known there."""
    found = []
    for row in rows:
        variant = parse(row.repo_id, row.repo_path)
        if variant is not None:
            found.append(_with_row(variant, row))
    return _ordered(found if any(variant.canonical for variant in found) else _with_canonical(found))


def with_rows(variants: Sequence[Variant], rows: Iterable[Any]) -> list[Variant]:
    """The variants of a tree, each with what the registry knows of it besides."""
    known = {row.repo_path: row for row in rows}
    merged = [_with_row(one, known[one.path]) if one.path in known else one for one in variants]
    marked = any("canonical" in alias for row in known.values() for alias in row.aliases)
    return [replace(one, canonical=_is_canonical(known.get(one.path))) for one in merged] if marked else merged


def _with_row(variant: Variant, row: Any) -> Variant:
    l0 = row.published_l0 if row.published_l0 is not None else variant.l0
    size = row.size_bytes or variant.size_bytes
    return replace(variant, l0=l0, size_bytes=size, canonical=_is_canonical(row))


def _is_canonical(row: Any) -> bool:
    return row is not None and any(alias.endswith("/canonical") for alias in row.aliases)


def _with_canonical(variants: Iterable[Variant]) -> list[Variant]:
    """Marks what the authors' rule makes canonical: of each site, layer and width of Gemma Scope 1, L0 nearest to 100."""
    groups: dict[tuple[Any, ...], list[Variant]] = {}
    for variant in variants:
        groups.setdefault((variant.site, variant.layer, variant.d_sae), []).append(variant)
    best = {id(nearest(group, CANONICAL_L0)) for group in groups.values() if group[0].format == "gemma_scope_1"}
    return [replace(one, canonical=id(one) in best) for group in groups.values() for one in group]


def _ordered(variants: Iterable[Variant]) -> list[Variant]:
    sizes = {"": 0, "small": 1, "medium": 2, "big": 3}
    return sorted(
        variants,
        key=lambda one: (
            one.site, -1 if one.layer is None else one.layer, one.d_sae, one.l0 or 0, sizes[one.size], one.affine, one.path,
        ),
    )  # fmt: skip


def narrowed(variants: Iterable[Variant], chosen: Mapping[str, str]) -> list[Variant]:
    """Those whose facets (layer, site, width, size) are the chosen ones; an empty choice leaves all."""
    return [one for one in variants if all(facet(one, key) == value for key, value in chosen.items() if value)]


def facet(variant: Variant, key: str) -> str:
    """A facet's value as it stands in the URL: "12", "resid_post", "16k", "small"; "embedding" for no layer."""
    if key == "layer":
        return "–" if variant.layer is None else str(variant.layer)
    return str(getattr(variant, key))


def counts(variants: Sequence[Variant], chosen: Mapping[str, str]) -> dict[str, list[tuple[str, int]]]:
    """For each facet its values with how many variants the other facets leave, in the order of numbers."""
    found = {}
    for key in FACETS:
        others = {name: value for name, value in chosen.items() if name != key}
        tally: dict[str, int] = {}
        for one in narrowed(variants, others):
            tally[facet(one, key)] = tally.get(facet(one, key), 0) + 1
        found[key] = sorted(((value, n) for value, n in tally.items() if value), key=lambda pair: _rank(pair[0]))
    return found


def _rank(value: str) -> tuple[int, str]:
    if value.isdecimal():
        return int(value), ""
    if re.fullmatch(r"\d+[km]", value):
        return width_of(value), ""
    return {"small": 1, "medium": 2, "big": 3}.get(value, 0), value


def nearest(variants: Iterable[Variant], l0: float) -> Variant | None:
    """The variant whose L0 is nearest to the wanted one; those whose L0 is not known cannot be it."""
    known = [one for one in variants if one.l0 is not None]
    return min(known, key=lambda one: (abs((one.l0 or 0) - l0), one.path), default=None)


def nearest_each(variants: Iterable[Variant], l0: float) -> list[Variant]:
    """Of every site, layer and width (and affine or not) the one nearest to the wanted L0."""
    groups: dict[tuple[Any, ...], list[Variant]] = {}
    for one in variants:
        groups.setdefault((one.site, one.layer, one.layers, one.d_sae, one.affine), []).append(one)
    best = (nearest(group, l0) for group in groups.values())
    return _ordered(one for one in best if one is not None)
