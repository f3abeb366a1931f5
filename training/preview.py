"""What the token policy does to a text, and how many characters make a token: with the model's own tokenizer.

The web process may not import transformers, but its tokenizers are plain tokenizer.json files, which the `tokenizers`
library reads by itself in milliseconds. A model without such a file has no preview.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from saes.models import LanguageModel

SHOWN_TOKENS = 48


@dataclass(frozen=True)
class PreviewToken:
    text: str
    stored: bool


@dataclass(frozen=True)
class Preview:
    """The start of the first context of a text."""

    tokens: list[PreviewToken]
    characters_per_token: float


def preview(model: LanguageModel, sample: str, prepend_bos: bool, store_special: bool) -> Preview | None:
    """None when the model has no tokenizer.json here, or the sample no tokens."""
    file = tokenizer_file(model)
    if file is None or not sample.strip():
        return None
    tokenizer, bos = _tokenizer(file, file.stat().st_mtime_ns)
    encoding = tokenizer.encode(sample, add_special_tokens=False)
    if not encoding.ids:
        return None
    tokens = [PreviewToken(sample[start:end], True) for start, end in encoding.offsets[:SHOWN_TOKENS]]
    if prepend_bos and bos:
        tokens.insert(0, PreviewToken(bos, store_special))
    return Preview(tokens, len(sample) / len(encoding.ids))


def tokenizer_file(model: LanguageModel) -> Path | None:
    if model.source != LanguageModel.Source.HUB:
        file = Path(model.load_from) / "tokenizer.json"
        return file if file.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model.location, "tokenizer.json", revision=model.revision or None)
    return Path(found) if isinstance(found, str) else None


@lru_cache(maxsize=8)
def _tokenizer(file: Path, written: int) -> tuple[Any, str]:
    """The tokenizer, and the text of its beginning-of-sequence token ("" without one)."""
    from tokenizers import Tokenizer

    facts = file.with_name("tokenizer_config.json")
    bos = json.loads(facts.read_text(encoding="utf-8")).get("bos_token") if facts.is_file() else None
    return Tokenizer.from_file(str(file)), (bos.get("content", "") if isinstance(bos, dict) else bos) or ""
