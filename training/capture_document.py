"""One YAML document for a capture: the same for the page, the API and `manage.py capture`.

Its keys are those of the form; what a document leaves out has the form's own defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from saehub.typed import whole_number
from saes.api_forms import laid_over
from saes.models import LanguageModel
from training import yaml_document
from training.capture_form import CaptureForm
from training.models import Capture, Corpus
from training.yaml_document import DocumentError

SETTINGS = (
    "max_tokens", "context_length", "packed", "prepend_bos", "chat_template", "plain_chats", "roles", "store_special",
    "max_norm_ratio", "stored", "dtype", "compute_dtype", "parts", "location",
)  # fmt: skip
KEYS = ("name", "model", "model_name", "corpus", "corpus_name", "corpus_sha256", "hook_names", *SETTINGS)


def of_capture(row: Capture) -> dict[str, Any]:
    """The document that makes this capture again."""
    place = {
        "name": row.name,
        "model": row.model_id,
        "model_name": row.model.name,
        "corpus": row.corpus_id,
        "corpus_name": row.corpus.name,
        "corpus_sha256": row.corpus.sha256,
        "hook_names": row.hook_names,
    }
    settings = {name: getattr(row, name) for name in SETTINGS}
    return place | {name: value for name, value in settings.items() if value not in (None, "")}


def from_yaml(text: str) -> dict[str, Any]:
    """Raises DocumentError, naming the line or the key."""
    return yaml_document.from_yaml(text, KEYS)


def form_of(document: Mapping[str, Any], user: Any) -> CaptureForm:
    """The bound form that a document fills; its errors are the document's. Raises DocumentError for a model or a corpus that
    is not here, or not of the same text."""
    model = _row(LanguageModel.objects.ready(), document, "model", "language model")
    corpus = _row(Corpus.objects.ready(), document, "corpus", "corpus")
    digest = document.get("corpus_sha256")
    if digest and corpus.sha256 and digest != corpus.sha256:
        raise DocumentError(
            f"The corpus {corpus.name} is of another text than the document's (corpus_sha256 differs); leave corpus_sha256 "
            "out to capture from it all the same."
        )
    given = {name: document[name] for name in ("name", "hook_names", *SETTINGS) if name in document}
    if isinstance(given.get("hook_names"), str):
        given["hook_names"] = given["hook_names"].replace(",", " ").split()
    unsaid = {"model": model.pk, "chat_template": False}  # a page shows what it proposes; a document has to say it
    blank = CaptureForm(user=user, initial=unsaid)
    return CaptureForm(laid_over(blank, given | {"model": model.pk, "corpus": corpus.pk}), user=user)


def said(form: CaptureForm) -> list[str]:
    """A form's errors, a line each."""
    return yaml_document.errors_of(form, {})


def _row(rows: Any, document: Mapping[str, Any], key: str, what: str) -> Any:
    """By its number, where the row of that number has the name that is said; else by its name."""
    number, name = document.get(key), document.get(f"{key}_name")
    if number is None and name is None:
        raise DocumentError(f"Say which {what}, such as `{key}: 1` or its name.")
    pk = whole_number(number)
    name = name if name is not None or pk is not None else number
    named = rows.filter(name=name).order_by("-pk").first() if name is not None else None
    numbered = rows.filter(pk=pk).first() if pk is not None else None
    found = numbered if numbered is not None and name in (None, numbered.name) else named
    if found is None:
        raise DocumentError(f"There is no {what} {name if name is not None else number} here that is ready.")
    return found


__all__ = ["KEYS", "DocumentError", "form_of", "from_yaml", "of_capture", "said"]
