"""Jobs of language models: bring one here and find out what it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from saehub.jobs.progress import JobError, Progress
from saes import hub
from saes.fields import size_of
from saes.models import LanguageModel
from saes.numerics.lm import describe_config, import_gguf, plain_errors

MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
Source = LanguageModel.Source


def add_model(progress: Progress, model: int) -> dict[str, Any]:
    """Fetch or convert a model if need be, then describe it. Its weights are not read; a capture loads them."""
    row = LanguageModel.objects.get(pk=model)
    bring = {Source.HUB: _download, Source.GGUF: _convert, Source.FOLDER: _folder}[Source(row.source)]
    folder = bring(progress, row)
    progress.start("Reading its config and tokenizer", unit="steps")
    row.finish(**_describe(folder), revision=row.revision)
    progress.log(f"{row.architecture}, {row.n_layers} layers of {row.d_model}")
    return {"model": row.pk, "folder": str(folder)}


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
    listing = hub.list_repository(row.location, row.revision)
    files = [file for file in hub.matching(listing.files, *MODEL_FILES) if not file.path.startswith("consolidated")]
    if not any(file.path.endswith(".safetensors") for file in files):
        raise JobError(
            f"{row.location} has no safetensors weights, and other formats could run code when opened.",
            "Choose a repository or revision with .safetensors files; many have a branch refs/pr/… with them.",
        )
    folder = hub.download(progress, listing, files)
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
