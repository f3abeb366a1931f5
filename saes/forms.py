"""The form that adds a language model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from django import forms
from django.conf import settings
from django.core.exceptions import ValidationError

from saes.fields import NewRow, server_path
from saes.models import LanguageModel

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
Source = LanguageModel.Source


class LanguageModelForm(NewRow):
    """A language model to add: where it is; everything else its job finds out."""

    source = forms.ChoiceField(
        choices=Source.choices, initial=Source.HUB, widget=forms.RadioSelect, label="Where it is"
    )
    location = forms.CharField(
        max_length=400,
        label="Repository id, or path on the server",
        help_text="HuggingFaceTB/SmolLM2-135M, or a folder with config.json and safetensors, or a .gguf file",
    )
    revision = forms.CharField(
        max_length=80,
        required=False,
        label="Revision",
        help_text="Commit, branch or tag; pinned to the commit when added",
    )
    advanced = ["name", "revision"]

    class Meta:
        model = LanguageModel
        fields = ("source", "location", "name", "revision")

    def clean_location(self) -> str:
        text = self.cleaned_data["location"].strip()
        source = self.data.get("source")
        if source == Source.HUB:
            return _hub_id(text)
        path = server_path(text, [*settings.IMPORT_DIRS, settings.DATA_DIR / "models"])
        return str(_gguf(path) if source == Source.GGUF else _model_folder(path))

    def clean(self) -> dict[str, Any]:
        data = super().clean() or self.cleaned_data
        if data.get("revision") and data.get("source") != Source.HUB:
            self.add_error("revision", "Only a repository on the Hub has revisions; leave this empty.")
        if data.get("location"):
            self.check_name(lambda: Path(data["location"]).name.removesuffix(".gguf"))
        return data


def _hub_id(text: str) -> str:
    text = text.removeprefix("https://huggingface.co/").strip("/")
    if not HUB_ID.fullmatch(text):
        raise ValidationError(f"{text} is not a repository id; they look like HuggingFaceTB/SmolLM2-135M.")
    return text


def _model_folder(path: Path) -> Path:
    if path.is_file():
        raise ValidationError(f"{path} is a file; give the folder it is in, or choose GGUF for a .gguf file.")
    if not (path / "config.json").is_file():
        raise ValidationError(f"{path} holds no config.json, so it is not the folder of a transformers model.")
    if not any(path.glob("*.safetensors")):
        raise ValidationError(f"{path} holds no .safetensors weights; save the model with save_pretrained first.")
    return path


def _gguf(path: Path) -> Path:
    if not path.is_file():
        raise ValidationError(f"{path} is a folder; give the .gguf file itself.")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValidationError(f"{path.name} is not a GGUF file: it does not begin with the letters GGUF.")
    return path
