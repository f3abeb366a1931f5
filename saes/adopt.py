"""From files to an SAE of the registry: find out what they are, check all of it, convert, prove the conversion, register."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import fields
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from django.conf import settings
from django.db import transaction
from django.utils import timezone

from saehub.disk import free_bytes
from saehub.figures import bytes_text
from saehub.jobs.progress import JobError, Progress
from saehub.plain import plain
from saes.checksums import checksums, weights_digest
from saes.fields import size_of
from saes.hook_places import place_of
from saes.layouts import wanted_files
from saes.model_names import matching_model
from saes.models import SAE
from saes.numerics.folders import whole_folder
from saes.numerics.formats import FormatError, MissingFact, NotRepresentable, detect_format, load_sae, save_sae
from saes.numerics.formats.saelens import for_inference
from saes.numerics.sae import SAE as Weights

CANONICAL = "saelens"
PROOF = "conversion_v1"  # id of the definition below; a new way of proving gets a new one
PROBE_ROWS = 64
PROBE_SEED = 0
PROBE_SCALES = (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 0.25, 0.0625)
TOLERANCE = 1e-5  # of the largest value either of them gives
KEPT_BESIDE = ("cfg.json", "sae_weights.safetensors", "sparsity.safetensors")
FACTS = (
    "repo_id", "repo_path", "model_name", "hook_name", "hook_name_out", "k", "norm_scaling_factor",
    "normalize_activations", "apply_b_dec_to_input", "architecture", "layer", "tensors",
)  # fmt: skip


class MissingFacts(JobError):
    """The files are sound, but do not say something that is needed; the row waits until somebody does."""


class Refused(JobError):
    """The files are not wanted, whatever is said of them: what was sent may go."""


class Outputs(NamedTuple):
    """What an SAE makes of the probe batch."""

    acts: torch.Tensor
    x_hat: torch.Tensor


def adopt_files(progress: Progress, row: SAE, entry: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Make `row` the SAE whose files are at `entry` (a folder or a file, its neighbours beside it), and ready.

    Files in another form than ours are converted where ours can hold the SAE, and the conversion is proved; others stay
    as they are. What a person sent is moved under the data folder; what lies elsewhere is never changed.

    Raises MissingFacts (the row then waits in `asked`), JobError or a ValueError with one sentence; the row is then as
    it was and nothing is left on disk.
    """
    name = "What was sent" if entry == row.upload / "files" else entry.name  # the folder that we put it in
    progress.start(f"Reading: {name}", unit="steps")
    form = detect_format(entry)
    progress.log(f"{name} is in the format {form}")
    sae, used = _load(row, entry, facts)
    _require_lengths(sae.config)
    root, names = _source_files(row, form, entry)
    source = _hashed(progress, root, names)
    sha256 = weights_digest(source)
    _refuse_second_copy(progress, row, sha256)
    made: Path | None = None
    try:
        made, found = _keep(progress, row, form, entry, root, names, source, sae, used)
        with transaction.atomic():
            row.finish(**found | _described(row, sae, used) | {"sha256": sha256, "facts": used, "asked": []})
    except BaseException:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
        raise
    shutil.rmtree(row.upload, ignore_errors=True)
    progress.log(f"{row.architecture}, {row.d_in} -> {row.d_sae}, at {row.hook_name or 'an unnamed hook point'}")
    return {"sae": row.pk, "format": row.format, "source_format": form, "sha256": sha256, "proof": row.proof}


# ------------------------------------------------------------------------------------------------------- reading


def _load(row: SAE, entry: Path, facts: Mapping[str, Any]) -> tuple[Weights, dict[str, Any]]:
    """The SAE with its weights checked, and the facts it took. What the files lack, the row may know."""
    used = _given(row, facts)
    known = {
        "repo_id": row.repo_id, "repo_path": row.repo_path, "model_name": row.model_name, "hook_name": row.hook_name,
        "hook_name_out": row.hook_name_out, "layer": row.layer, "k": row.k, "architecture": row.architecture,
    }  # fmt: skip
    while True:
        try:
            return for_inference(load_sae(entry, facts=used)), used
        except MissingFact as error:
            fresh = {name: known[name] for name in error.names if name not in used and known.get(name)}
            if not fresh:
                wait_for(row, error.names, str(error), used)
            used |= fresh


def _given(row: SAE, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts of the release, of the row and of the caller, the later before the earlier."""
    release = row.release.facts if row.release else {}
    where = {"repo_id": row.repo_id, "repo_path": row.repo_path}
    found = {**where, **release, **row.facts, **facts}
    return {name: found[name] for name in FACTS if found.get(name) not in ("", None)}


def wait_for(row: SAE, names: Iterable[str], sentence: str, used: Mapping[str, Any]) -> NoReturn:
    """Leave the row waiting for these facts, with those that are known kept. Raises MissingFacts."""
    row.asked, row.facts = list(names), {**row.facts, **used}
    row.save(update_fields=["asked", "facts"])
    raise MissingFacts(sentence, "Say it on the SAE's page; the import then goes on from the files that are here.")


def _source_files(row: SAE, form: str, entry: Path) -> tuple[Path, list[str]]:
    """The folder that the SAE's file names count from, and those names: not the rest of a repository."""
    root = _root(row, entry)
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    place = "" if entry == root else str(entry.relative_to(root))
    wanted = [name for name in wanted_files(form, place, names) if name in names]
    if wanted:
        return root, sorted(wanted)
    inside = entry if entry.is_dir() else entry.parent
    return root, [name for name in names if (root / name).is_relative_to(inside)]


def _root(row: SAE, entry: Path) -> Path:
    """The top of the tree `entry` is in: of the upload, or of the repository."""
    if row.pk and entry.is_relative_to(row.upload):
        return row.upload / "files"
    place = Path(row.repo_path)
    if row.repo_path and entry.parts[-len(place.parts) :] == place.parts:
        return Path(*entry.parts[: -len(place.parts)])
    return entry if entry.is_dir() else entry.parent


def _hashed(progress: Progress, root: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    names = list(names)
    total = sum((root / name).stat().st_size for name in names)
    progress.start("Hashing its files", unit="bytes", total=total)
    done = 0

    def tick(n: int) -> None:
        nonlocal done
        done += n
        progress(done, total)

    return checksums(root, names, tick)


def _refuse_second_copy(progress: Progress, row: SAE, sha256: str) -> None:
    """Say that the weights are here already. A file somebody sends again is refused, unless they asked for it twice."""
    twin = SAE.objects.ready().filter(sha256=sha256).exclude(pk=row.pk).first() if sha256 else None
    if twin is None:
        return
    if row.source == SAE.Source.FILE and not row.facts.get("second_copy"):
        raise Refused(
            f"These are the same weights as {twin.name} (SAE {twin.pk}), which is here already.",
            f"Use {twin.get_absolute_url()}, or import the files again and tick “Keep a second copy”.",
        )
    progress.log(f"The same weights are here as {twin.name} (SAE {twin.pk}).")


# ------------------------------------------------------------------------------------------------------- keeping


def _keep(
    progress: Progress,
    row: SAE,
    form: str,
    entry: Path,
    root: Path,
    names: list[str],
    source: dict[str, dict[str, Any]],
    sae: Weights,
    facts: Mapping[str, Any],
) -> tuple[Path | None, dict[str, Any]]:
    """Convert, move or leave the files. Returns the folder that was made, if any, and what the row keeps of it."""
    target = Path(settings.DATA_DIR) / "sae" / row.source / str(row.pk)
    if form != CANONICAL:
        try:
            proof = _convert(progress, form, sae, target, facts)
        except NotRepresentable as error:
            progress.log(f"Kept as {form}: {error}")
        else:
            beside = [path.name for path in target.iterdir()]
            made = _kept(row, CANONICAL, target, target, checksums(target, beside))
            return target, made | {"proof": proof | {"source": source}}
    if not entry.is_relative_to(row.upload):
        return None, _kept(row, form, entry, root, source) | {"proof": {}}
    place = entry.relative_to(root)
    _move(root, names, target)
    return target, _kept(row, form, target / place, target, source) | {"proof": {}}


def _kept(row: SAE, form: str, path: Path, root: Path, files: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the row says of its files; their names count from the folder that its path is, or is in.

    A path under the data folder is stored relative to it, so that the folder can be moved. Raises JobError when
    another row has the same files.
    """
    data = Path(settings.DATA_DIR).absolute()
    path = path.absolute()
    stored = str(path.relative_to(data) if path.is_relative_to(data / "sae") else path)
    twin = SAE.objects.filter(path=stored).exclude(pk=row.pk).first()
    if twin is not None:
        raise JobError(f"{path} is in the registry already, as {twin.name} (SAE {twin.pk}).", "Use that one.")
    anchor = path if path.is_dir() else path.parent
    named = {os.path.relpath(root / name, anchor): entry for name, entry in files.items()}
    size = sum(entry["bytes"] for entry in files.values()) or size_of(path)
    return {"format": form, "path": stored, "checksums": named, "size_bytes": size}


def _move(root: Path, names: Iterable[str], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)  # of an import that was killed: the row is not ready, nothing points here
    with whole_folder(target) as partial:
        for name in names:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            second_name(root / name, partial / name)  # the upload goes only when the row is ready


def second_name(path: Path, other: Path) -> None:
    """Another name for the same file, or a copy of it."""
    try:
        os.link(path, other)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, other)


def _convert(progress: Progress, form: str, sae: Weights, target: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write the SAE in our form and prove that it is the same one. Raises JobError, leaving nothing, when it is not."""
    x = probe_batch(sae)
    before = outputs(sae, x)
    size = sum(tensor.numel() * tensor.element_size() for tensor in sae.state_dict().values())
    _require_space(size)
    progress.start("Converting to the SAELens form", unit="steps")
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(target, replaces=KEPT_BESIDE) as partial:
        save_sae(compacted(sae), partial)
        progress.start("Proving the conversion", unit="steps")
        proof = proof_of(form, before, outputs(load_sae(partial, facts=facts), x))
        if not proof["holds"]:
            raise Refused(
                f"The converted SAE does not give what its source gives: codes differ by {proof['max_abs_acts']:.3g} and "
                f"reconstructions by {proof['max_abs_x_hat']:.3g}, so it was not imported.",
                "Nothing was kept. Please report the file: this is a fault of the conversion, not of yours.",
            )
    progress.log(f"Proved on {proof['n']} rows: largest difference {proof['max_abs_x_hat']:.3g}")
    return proof


def compacted(sae: Weights) -> Weights:
    """The SAE in the smallest dtype that holds every weight exactly: what was stored as bfloat16 stays that small."""
    for dtype in (torch.bfloat16, torch.float16):
        if all(bool((tensor.to(dtype).to(tensor.dtype) == tensor).all()) for tensor in sae.state_dict().values()):
            return sae.to(dtype)
    return sae


def _require_space(size: int) -> None:
    free = free_bytes()
    if size > free:
        raise JobError(
            f"The converted SAE needs {bytes_text(size)} and the disk has {bytes_text(free)} to spare.",
            "Free some space under the data folder, then press Retry.",
        )


# ------------------------------------------------------------------------------------------------------- proving


@torch.no_grad()
def probe_batch(sae: Weights, n: int = PROBE_ROWS, seed: int = PROBE_SEED) -> torch.Tensor:
    """Inputs (n, d_in) on which the SAE fires: random directions, each row leaning on a few of the encoder's own.

    The scale is the first of PROBE_SCALES at which at least half of the rows have an active feature and not all
    features are active: SAEs are trained on activations of very different norms.
    """
    generator = torch.Generator().manual_seed(seed)
    d_in, d_sae = sae.config.d_in, sae.config.d_sae
    noise = torch.randn(n, d_in, generator=generator) / d_in**0.5
    chosen = torch.randint(d_sae, (n, 4), generator=generator)
    encoder = sae.state_dict().get("W_enc")
    if encoder is not None and encoder.shape == (d_in, d_sae):
        lean = encoder.T[chosen].float().sum(1)
        noise = noise + lean / lean.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    best = noise
    for scale in PROBE_SCALES:
        active = sae.encode(noise * scale) != 0
        best = noise * scale
        if active.any(-1).float().mean() >= 0.5 and not active.all():
            break
    return best


@torch.no_grad()
def outputs(sae: Weights, x: torch.Tensor) -> Outputs:
    """Codes and reconstruction of x, in float32."""
    return Outputs(sae.encode(x).float(), sae(x).float())


def proof_of(form: str, before: Outputs, after: Outputs) -> dict[str, Any]:
    """How far two SAEs are apart on the same batch.

    conversion_v1: x of `probe_batch`, both SAEs in float32; max_abs_acts = max |acts - acts'|, max_abs_x_hat =
    max |x_hat - x_hat'|, same_active_set = (acts != 0) equals (acts' != 0) everywhere. It holds when the active sets
    agree and each difference is at most TOLERANCE times the largest absolute value of its kind (at least 1).
    """
    acts, x_hat = (_difference(a, b) for a, b in zip(before, after, strict=True))
    same = bool(((before.acts != 0) == (after.acts != 0)).all())
    return {
        "definition": PROOF,
        "source_format": form,
        "n": before.acts.shape[0],
        "seed": PROBE_SEED,
        "max_abs_acts": acts[0],
        "max_abs_x_hat": x_hat[0],
        "same_active_set": same,
        "mean_l0": float((before.acts != 0).sum(-1).float().mean()),
        "tolerance": TOLERANCE,
        "holds": same and acts[1] and x_hat[1],
        "at": timezone.now().isoformat(),
    }


def _difference(a: torch.Tensor, b: torch.Tensor) -> tuple[float, bool]:
    """(largest absolute difference, whether it is within the tolerance)."""
    if a.shape != b.shape:
        return -1.0, False
    apart = float((a - b).abs().max()) if a.numel() else 0.0
    return apart, isfinite(apart) and apart <= TOLERANCE * max(1.0, float(a.abs().max()))


# ------------------------------------------------------------------------------------------------------- describing


def _require_lengths(config: Any) -> None:
    """Refuse names that no row can hold, before anything is written."""
    for name in ("architecture", "model_name", "hook_name", "hook_name_out"):
        field: Any = SAE._meta.get_field(name)
        limit = field.max_length
        if len(str(getattr(config, name, "") or "")) > limit:
            raise FormatError(f"The SAE's {name} is longer than {limit} characters, so it is not a name.")


def _described(row: SAE, sae: Weights, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the row says of the SAE. What the catalogue already says in its own words is kept where both agree in kind."""
    config = sae.config
    hook = plain(config.hook_name or row.hook_name)
    hook_out = plain(getattr(config, "hook_name_out", "") or row.hook_name_out)
    model_name = row.model_name or plain(config.model_name)
    model = row.model or matching_model(model_name, plain(config.model_name), plain(_hub_name(config)))
    site, layer = place_of(hook, config.architecture, hook_out if config.d_out else "")
    layer = layer if layer is not None else (row.layer if row.layer is not None else _whole(facts.get("layer")))
    return {
        "name": row.name or f"{model_name or 'SAE'} {hook}".strip(),
        "model": model,
        "model_name": model_name or (model.name if model else ""),
        "hook_name": hook,
        "hook_name_out": hook_out,
        "site": row.site or site,
        "layer": layer,
        "architecture": config.architecture,
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "k": _whole(config.k, most=2**31 - 1) or row.k,
        "config": config_of(sae),
        "read_at": timezone.now(),
        "verified_at": timezone.now(),
    }


def _hub_name(config: Any) -> str:
    extra = config.metadata.get("extra_metadata")
    found = config.metadata.get("hf_model_name") or (extra.get("hf_model_name") if isinstance(extra, dict) else "")
    return found if isinstance(found, str) else ""


def _whole(value: Any, most: int = 9_999) -> int | None:
    """A whole number that the database takes, else None: BatchTopK's k may be a fraction."""
    return int(value) if isinstance(value, int | float) and value == int(value) and 0 <= value <= most else None


def config_of(sae: Weights) -> dict[str, Any]:
    """The SAE's config as JSON that the database takes: its sizes, d_out among them, the weights' dtype, and what its
    architecture can do, which `saes.abilities` reads without torch."""
    values = {field.name: getattr(sae.config, field.name) for field in fields(sae.config)}
    dtype = next((str(tensor.dtype).removeprefix("torch.") for tensor in sae.state_dict().values()), "")
    return plain(values | {"dtype": dtype, "reconstructs": sae.reconstructs, "row_by_row": sae.row_by_row})
