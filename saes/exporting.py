"""Write an SAE for others: its files in a format of choice, read back and compared, with a model card, as an archive."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from saehub.causes import disk_is_full
from saehub.disk import free_bytes
from saehub.figures import bytes_text
from saehub.jobs.progress import JobError, Progress
from saes.adopt import FACTS, outputs, probe_batch, proof_of, second_name
from saes.card import model_card
from saes.models import SAE
from saes.numerics.folders import FolderError
from saes.numerics.formats import load_sae, save_sae
from saes.sharing import AS_IS, FORMATS

BLOCK = 1 << 20


def export(progress: Progress, row: SAE, form: str, licence: str) -> dict[str, Any]:
    """Make the archive of a format, in place of an older one. Raises JobError, or a ValueError with one sentence."""
    target = row.exports / f"{form}.zip"
    with work_folder(row, form) as folder:
        write_files(progress, row, form, folder / "sae", licence=licence)
        _pack(progress, folder / "sae", folder / target.name, f"sae-{row.pk}")
        (folder / target.name).replace(target)
    return {"sae": row.pk, "format": form, "bytes": target.stat().st_size}


@contextmanager
def work_folder(row: SAE, name: str) -> Iterator[Path]:
    """A folder beside its archives for as long as something is made of it. What a killed job left there goes first.

    Raises FolderError for a full disk.
    """
    place = row.exports / f".{name}"
    shutil.rmtree(place, ignore_errors=True)
    try:
        place.mkdir(parents=True)
        yield place
    except OSError as error:
        if disk_is_full(error):
            raise FolderError("The disk is full; free some space under the data folder, then press Retry.") from error
        raise
    finally:
        shutil.rmtree(place, ignore_errors=True)


def write_files(
    progress: Progress, row: SAE, form: str, folder: Path, *, licence: str = "", repo_id: str = "", path: str = ""
) -> None:
    """The SAE's files in the new folder `folder`, and README.md. What was written is loaded again and must give the same codes.

    Raises JobError where its own files are gone or the written ones differ, NotRepresentable, FolderError.
    """
    if not row.all_here:
        raise JobError(f"Files of {row.name} are missing on this machine.", "Download or import it again first.")
    proof: dict[str, Any] = {}
    if form == AS_IS:
        progress.start("Taking its files", unit="steps")
        _take_own(row, folder)
    else:
        proof = _save(progress, row, form, folder)
    card = model_card(row, form, licence=licence, repo_id=repo_id, path=path, proof=proof)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _take_own(row: SAE, folder: Path) -> None:
    """Its own files under second names, each inside of the folder."""
    anchor = row.files if row.files.is_dir() else row.files.parent
    names = row.checksums or [str(path.relative_to(anchor)) for path in anchor.rglob("*") if path.is_file()]
    for name in names:
        target = folder / name
        if ".." in Path(name).parts:  # a config that several SAEs of a repository share lies above
            target = folder / Path(name).name
        target.parent.mkdir(parents=True, exist_ok=True)
        second_name((anchor / name).resolve(), target)


def _save(progress: Progress, row: SAE, form: str, folder: Path) -> dict[str, Any]:
    progress.start(f"Writing it in the format {FORMATS[form]}", unit="steps", total=3)
    known = {name: row.facts[name] for name in FACTS if name in row.facts}
    sae = load_sae(row.files, facts=known, dtype=None, checked=True)
    _require_space(sum(tensor.numel() * tensor.element_size() for tensor in sae.state_dict().values()))
    progress(1, 3)
    save_sae(sae, folder, form)
    progress(2, 3, "Reading it back and comparing")
    plain = sae.float()
    x = probe_batch(plain)
    config = sae.config
    facts = {"hook_name": config.hook_name, "model_name": config.model_name, "k": config.k}
    again = load_sae(folder, facts={name: value for name, value in facts.items() if value})
    proof = proof_of(form, outputs(plain, x), outputs(again, x))
    if not proof["holds"]:
        raise JobError(
            f"What was written does not give what the SAE gives: codes differ by {proof['max_abs_acts']:.3g}, so nothing "
            "was kept.",
            "Please report it: this is a fault of the format's writer.",
        )
    progress(3, 3)
    return proof


def _require_space(size: int) -> None:
    free = free_bytes()
    if 2 * size > free:  # the files, and the archive of them
        raise JobError(
            f"This needs {bytes_text(2 * size)} for a moment, and the disk has {bytes_text(free)} to spare.",
            "Free some space under the data folder, then press Retry.",
        )


def _pack(progress: Progress, folder: Path, target: Path, name: str) -> None:
    """A zip of a folder, without compression: weights do not shrink."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    total = sum(path.stat().st_size for path in files)
    progress.start("Packing", unit="bytes", total=total)
    done = 0
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for path in files:
            info = zipfile.ZipInfo.from_file(path, f"{name}/{path.relative_to(folder).as_posix()}")
            with path.open("rb") as source, archive.open(info, "w", force_zip64=True) as made:
                while block := source.read(BLOCK):
                    made.write(block)
                    done += len(block)
                    progress(done, total)
