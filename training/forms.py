"""Forms on the way from text to an SAE. Torch-free: the trainer's own checks come again in the job."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from pathlib import Path
from typing import Any

from django import forms
from django.conf import settings
from django.core.exceptions import ValidationError
from django.core.files.uploadedfile import UploadedFile
from django.utils.text import get_valid_filename

from saehub.disk import free_bytes
from saes.fields import NewRow, server_path, size_of
from saes.forms import HUB_ID
from saes.uploads import refuse_links
from training.models import Corpus

SNIFF_BYTES = 65536
PARQUET = b"PAR1"
BOM_AND_SPACE = b"\xef\xbb\xbf \t\r\n"
FIELD_HELP = 'Column or key, such as data.text; when left empty "text", "messages" or "conversations"'


# ---------------------------------------------------------------------------------------------------- corpora


class CorpusForm(NewRow):
    """Text to add, from one of four places. The fields of the other places are ignored."""

    source = forms.ChoiceField(
        choices=Corpus.Source.choices,
        initial=Corpus.Source.UPLOAD,
        widget=forms.RadioSelect,
        label="Where it comes from",
    )
    file = forms.FileField(
        label="File",
        help_text="Text, JSON (an array), JSON Lines, CSV or Parquet; a row is a text, or a conversation as a list of messages",
        error_messages={"required": "Choose a file to upload.", "empty": "The file is empty; choose a file with text."},
    )
    text = forms.CharField(
        strip=False,
        widget=forms.Textarea(attrs={"rows": 10}),
        label="Text",
        help_text="Two empty lines part one document from the next. Above 4 MB, upload a file",
        error_messages={"required": "Paste some text."},
    )
    path = forms.CharField(
        max_length=400,
        label="Path on the server",
        help_text="A file, or a folder of files",
        error_messages={"required": "Give the path of a file or folder on the server."},
    )
    dataset = forms.CharField(
        max_length=400,
        label="Dataset id",
        help_text="As on the Hub: Salesforce/wikitext",
        error_messages={"required": "Give the dataset's id as on the Hub, such as Salesforce/wikitext."},
    )
    text_field = forms.CharField(required=False, max_length=80, label="Field with the text", help_text=FIELD_HELP)
    subset = forms.CharField(required=False, max_length=120, label="Subset", help_text="Configuration of a Hub dataset")
    split = forms.CharField(required=False, max_length=60, label="Split", help_text='"train" when left empty')
    revision = forms.CharField(required=False, max_length=80, label="Revision", help_text="Of a Hub dataset")
    advanced = ["name", "text_field", "subset", "split", "revision"]
    only_with = {
        "file": ("source", "upload"), "text": ("source", "text"), "path": ("source", "path"),
        "dataset": ("source", "hub"),
    }  # fmt: skip

    class Meta:
        model = Corpus
        fields = ("source", "name", "text_field", "subset", "split", "revision")

    def clean(self) -> dict[str, Any]:
        data = super().clean() or self.cleaned_data
        checks: dict[str, tuple[str, Callable[[Any], tuple[str, str]]]] = {
            Corpus.Source.UPLOAD: ("file", checked_upload),
            Corpus.Source.TEXT: ("text", checked_text),
            Corpus.Source.PATH: ("path", checked_path),
            Corpus.Source.HUB: ("dataset", checked_dataset),
        }
        if data.get("source") not in checks or checks[data["source"]][0] in self.errors:
            return data
        field, check = checks[data["source"]]
        try:
            self.instance.location, name = check(data[field])
        except ValidationError as error:
            self.add_error(field, error)
        else:
            hub = data["source"] == Corpus.Source.HUB
            parts = [data[part] for part in ("subset", "split", "revision") if hub and data.get(part)]
            self.check_name(lambda: " ".join([name, *parts]))
        return data

    def store(self, row: Corpus) -> None:
        """An uploaded file or pasted text goes into the row's folder, where its job reads it."""
        if row.source not in (Corpus.Source.UPLOAD, Corpus.Source.TEXT):
            return
        row.folder.mkdir(parents=True)
        if row.source == Corpus.Source.TEXT:
            row.file.write_text(self.cleaned_data["text"], encoding="utf-8", newline="\n")
            return
        with row.file.open("wb") as target:
            for chunk in self.cleaned_data["file"].chunks():
                target.write(chunk)


def checked_upload(file: UploadedFile) -> tuple[str, str]:
    """(file name to store it under, name of the corpus)."""
    if file.size is None or file.size > settings.UPLOAD_LIMIT:
        raise ValidationError(
            f"The file is larger than {settings.UPLOAD_LIMIT // 2**20} MB; put it on the server and give its path."
        )
    if file.size > free_bytes():
        raise ValidationError("The server's disk is too full for this file; free some space first.")
    name = get_valid_filename(Path(file.name or "file").name)
    refuse_what_is_not_text(name, file.read(SNIFF_BYTES))
    file.seek(0)
    return name[-100:], Path(file.name or "file").stem


def checked_text(text: str) -> tuple[str, str]:
    if not text.strip():
        raise ValidationError("Paste some text.")
    if "\0" in text:
        raise ValidationError("The text holds a zero byte, so it is not plain text.")
    return "text.txt", " ".join(text.split()[:5])[:60]


def checked_path(text: str) -> tuple[str, str]:
    path = server_path(text.strip(), settings.IMPORT_DIRS)
    if size_of(path) == 0:
        raise ValidationError(f"{path} is empty; choose a file with text.")
    refuse_links(path, settings.IMPORT_DIRS)
    if path.is_file():
        with path.open("rb") as file:
            refuse_what_is_not_text(path.name, file.read(SNIFF_BYTES))
    return str(path), path.stem


def checked_dataset(text: str) -> tuple[str, str]:
    wanted = text.strip().removeprefix("https://huggingface.co/").removeprefix("datasets/").strip("/")
    if not HUB_ID.fullmatch(wanted):
        raise ValidationError("Give the dataset's id as on the Hub, such as Salesforce/wikitext.")
    return wanted, wanted.rpartition("/")[2]


def refuse_what_is_not_text(name: str, start: bytes) -> None:
    """By the first bytes; the job reads the rest. Raises ValidationError."""
    if not start.strip():
        raise ValidationError(f"{name} is empty; choose a file with text.")
    suffix = Path(name).suffix.lower()
    if suffix == ".parquet":
        if not start.startswith(PARQUET):
            raise ValidationError(f"{name} is not a Parquet file: it does not begin with PAR1.")
        return
    if suffix == ".json" and start.lstrip(BOM_AND_SPACE)[:1] not in (b"[", b"{"):
        raise ValidationError(f"{name} is not a JSON array: save its documents as one, or as JSON Lines (.jsonl).")
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise ValidationError(f"{name} is not UTF-8 text; choose a text, JSON, CSV or Parquet file.")
