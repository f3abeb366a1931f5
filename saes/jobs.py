"""Jobs of language models and SAEs: bring one here, find out what it is, see that it is still the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from saehub.accounts.hub_tokens import hub_token
from saehub.jobs.progress import JobError, Progress
from saes import catalogue, downloads, hub
from saes.exporting import export
from saes.fields import size_of
from saes.imports import import_files
from saes.model_names import link_waiting
from saes.models import SAE, LanguageModel
from saes.numerics.lm import describe_config, import_gguf, plain_errors
from saes.publishing import upload
from saes.remote import read_remote
from saes.verify import verify_files

MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
MOST_WARNINGS = 50  # of a sync that its log shows
Source = LanguageModel.Source


def add_model(progress: Progress, model: int) -> dict[str, Any]:
    """Fetch or convert a model if need be, then describe it. Its weights are not read; a capture loads them."""
    row = LanguageModel.objects.get(pk=model)
    bring = {Source.HUB: _download, Source.GGUF: _convert, Source.FOLDER: _folder}[Source(row.source)]
    folder = bring(progress, row)
    progress.start("Reading its config and tokenizer", unit="steps")
    row.finish(**_describe(folder), revision=row.revision)
    progress.log(f"{row.architecture}, {row.n_layers} layers of {row.d_model}")
    if linked := link_waiting(row):
        progress.log(f"{linked} SAEs that were here before it are of this model")
    return {"model": row.pk, "folder": str(folder), "saes": linked}


def _folder(progress: Progress, row: LanguageModel) -> Path:
    return Path(row.location)


def _convert(progress: Progress, row: LanguageModel) -> Path:
    """GGUF -> ordinary folder, once: import_gguf makes it complete or not at all."""
    if not row.folder.exists():
        progress.start(f"Converting {Path(row.location).name} to safetensors", unit="steps")
        import_gguf(row.location, row.folder)
    return row.folder


def _download(progress: Progress, row: LanguageModel) -> Path:
    progress.start(f"Asking the Hub for {row.location}", unit="steps")
    token = hub_token(progress.job.owner)
    listing = hub.list_repository(row.location, row.revision, token=token)
    files = [file for file in hub.matching(listing.files, *MODEL_FILES) if not file.path.startswith("consolidated")]
    if not any(file.path.endswith(".safetensors") for file in files):
        raise JobError(
            f"{row.location} has no safetensors weights, and other formats could run code when opened.",
            "Choose a repository or revision with .safetensors files; many have a branch refs/pr/… with them.",
        )
    folder = hub.download(progress, listing, files, token)
    row.revision = listing.commit  # what is captured from now on is this commit, whatever the branch becomes
    return folder


def _describe(folder: Path) -> dict[str, Any]:
    facts = describe_config(folder)
    with plain_errors(str(folder), missing="tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return {
        "architecture": facts["architecture"],
        "n_layers": facts["n_layers"],
        "d_model": facts["d_model"],
        "vocabulary": facts["vocab_size"],
        "context_length": facts["max_context"],
        "n_parameters": facts["n_parameters"],
        "size_bytes": sum(size_of(file) for file in folder.glob("*.safetensors")),
        "has_bos": tokenizer.bos_token_id is not None,
        "has_chat": bool(tokenizer.chat_template),
        "hook_points": facts["hook_points"],
    }


# ---------------------------------------------------------------------------------------------------- SAEs


def download(progress: Progress, sae: int) -> dict[str, Any]:
    """Bring an SAE from the Hub. Run again, it goes on with what is here."""
    return downloads.bring(progress, SAE.objects.select_related("release", "model").get(pk=sae))


def adopt(progress: Progress, sae: int) -> dict[str, Any]:
    """Import an SAE from what was sent or from a path of the server. Run again, it goes on with the same files."""
    row = SAE.objects.select_related("release", "model").get(pk=sae)
    if row.ready:
        return {"sae": row.pk, "format": row.format, "sha256": row.sha256}
    return import_files(progress, row)


def verify(progress: Progress, sae: int) -> dict[str, Any]:
    """Compare the checksums of an SAE's files with what they were, and with the Hub's."""
    return verify_files(progress, SAE.objects.get(pk=sae))


def inspect(progress: Progress, sae: int) -> dict[str, Any]:
    """Read config and shapes of an SAE on the Hub, without its weights."""
    return read_remote(progress, SAE.objects.select_related("release").get(pk=sae), hub_token(progress.job.owner))


def export_sae(progress: Progress, sae: int, format: str, licence: str = "") -> dict[str, Any]:
    """Write an SAE in a format of others, with a model card, as an archive to download."""
    return export(progress, SAE.objects.select_related("release", "model").get(pk=sae), format, licence)


def upload_sae(
    progress: Progress, sae: int, repo_id: str, path: str, format: str, private: bool = True, licence: str = ""
) -> dict[str, Any]:
    """Put an SAE on the Hub, in one commit. Run again, it sends only what the Hub has not yet."""
    row = SAE.objects.select_related("release", "model").get(pk=sae)
    return upload(progress, row, form=format, repo_id=repo_id, path=path, private=private, licence=licence)


def sync(progress: Progress, source: str = "", version: str = "") -> dict[str, Any]:
    """Fill the catalogue from sae-lens' directory."""
    progress.start("Reading the public directory of SAEs", unit="steps")
    summary = catalogue.sync(source, version, progress.log)
    for warning in summary.pop("warnings")[:MOST_WARNINGS]:
        progress.log(f"warning: {warning}")
    return summary
