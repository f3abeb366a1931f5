"""Forms of an import: what is sent, and the facts that files cannot tell."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from itertools import islice
from typing import Any

from django import forms
from django.conf import settings
from django.core.exceptions import ValidationError
from django.core.files.uploadedfile import UploadedFile

from saes.fields import NewRow, server_path
from saes.models import SAE
from saes.uploads import MAX_FILES, checked, refuse_links, store

NORMALIZATIONS = {
    "": "as the files say",
    "none": "none",
    "constant_norm_rescale": "constant_norm_rescale: every row to norm √d_in",
    "layer_norm": "layer_norm: every row to mean 0 and deviation 1",
    "expected_average_only_in": "expected_average_only_in: a constant factor",
}


def _text(label: str, limit: int, help: str, placeholder: str = "") -> forms.CharField:
    return forms.CharField(
        required=False,
        max_length=limit,
        label=label,
        help_text=help,
        widget=forms.TextInput(attrs={"placeholder": placeholder} if placeholder else {}),
    )


FACT_FIELDS: dict[str, forms.Field] = {
    "entry": _text("Only this SAE of several", 400, "Its folder or file; all of them without it"),
    "repo_id": _text("Repository", 200, "Where it was published; some formats say nothing without it", "org/name"),
    "repo_path": _text("Path in the repository", 300, "Folder or file of the SAE there"),
    "model_name": _text("Language model", 120, "What it was trained on", "google/gemma-2-2b"),
    "hook_name": _text("Hook point", 200, "What it reads", "blocks.12.hook_resid_post"),
    "hook_name_out": _text("Hook point it predicts", 200, "Of a transcoder", "blocks.12.hook_mlp_out"),
    "layer": forms.IntegerField(required=False, min_value=0, max_value=9999, label="Layer"),
    "k": forms.IntegerField(
        required=False, min_value=1, max_value=2**31 - 1, label="k, features per token", help_text="Of a TopK SAE"
    ),
    "architecture": _text(
        "Architecture", 40, "Where the files do not name it: standard, topk, jumprelu, gated", "jumprelu"
    ),
    "normalize_activations": forms.ChoiceField(
        required=False, choices=list(NORMALIZATIONS.items()), label="Normalisation of the input"
    ),
    "norm_scaling_factor": forms.FloatField(
        required=False, min_value=1e-12, max_value=1e12, label="Scaling factor", help_text="Of the input, in training"
    ),
    "apply_b_dec_to_input": forms.TypedChoiceField(
        required=False,
        choices=[("", "as the files say"), ("yes", "yes"), ("no", "no")],
        coerce=lambda value: value == "yes",
        empty_value=None,
        label="b_dec is subtracted from the input",
    ),
    "tensors": forms.CharField(
        required=False,
        max_length=4000,
        label="Which tensor is which",
        help_text="Of a file of your own, whose names are no format's: one a line, our name first. "
        ".T where the file holds it transposed, .exp() where it holds the logarithm",
        widget=forms.Textarea(
            attrs={
                "placeholder": "W_enc = encoder.weight.T\nb_enc = encoder.bias\nW_dec = decoder.weight.T\nb_dec = pre_bias",
                "rows": 5,
                "spellcheck": "false",
                "class": "id",
            }
        ),
    ),
}


class FactsForm(forms.Form):
    """The facts in `names`, all of which must be said."""

    def __init__(self, names: Iterable[str], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in names:
            if name in FACT_FIELDS:
                field: Any = _fresh(name)
                field.required = True
                if hasattr(field, "choices"):
                    field.choices = [("", "choose"), *field.choices[1:]]  # the files do not say it
                self.fields[name] = field

    def facts(self) -> dict[str, Any]:
        return _said(self.cleaned_data)


def _fresh(name: str) -> forms.Field:
    return deepcopy(FACT_FIELDS[name])


def _said(data: dict[str, Any]) -> dict[str, Any]:
    return {name: data[name] for name in FACT_FIELDS if data.get(name) not in ("", None)}


class ManyFiles(forms.FileInput):
    allow_multiple_selected = True


class FilesField(forms.FileField):
    """Several files in one field, as a list."""

    def clean(self, data: Any, initial: Any = None) -> list[UploadedFile]:
        given = data if isinstance(data, list | tuple) else [data] if data else []
        if not given and self.required:
            raise ValidationError(self.error_messages["required"], code="required")
        return [super(FilesField, self).clean(file, initial) for file in given]


class ImportForm(NewRow):
    """An SAE to import: files or a folder that are sent, or a path on the server."""

    where = forms.ChoiceField(
        choices=[
            ("upload", "a file, several files, or a zip"),
            ("folder", "a folder of this computer"),
            ("path", "a path on the server"),
        ],
        initial="upload",
        widget=forms.RadioSelect,
        label="Where it is",
    )
    files = FilesField(  # type: ignore[assignment]  # a form's own `files` is its data
        label="Files",
        widget=ManyFiles(attrs={"multiple": True}),
        allow_empty_file=True,
        help_text="Config and weights of any format, or one zip of them. A zip that holds several SAEs brings all of them, each as an SAE of its own",
        error_messages={"required": "Choose the files to import."},
    )
    tree = FilesField(
        label="Folder",
        widget=ManyFiles(attrs={"multiple": True, "webkitdirectory": True}),
        allow_empty_file=True,
        help_text="The folder of the SAE, or one above several, which brings all of them, each as an SAE of its own",
        error_messages={"required": "Choose the folder to import."},
    )
    paths = forms.CharField(required=False, widget=forms.HiddenInput, max_length=4_000_000, strip=False)
    path = forms.CharField(
        max_length=400,
        label="Path on the server",
        help_text="A folder or a file. What is in the SAELens form is used where it is; other formats are converted",
        error_messages={"required": "Give the path of a folder or file on the server."},
    )
    second_copy = forms.BooleanField(
        required=False, label="Keep a second copy", help_text="Even if the same weights are here already"
    )
    advanced = ["name", "second_copy", *FACT_FIELDS]
    only_with = {"files": ("where", "upload"), "tree": ("where", "folder"), "path": ("where", "path")}

    class Meta:
        model = SAE
        fields = ("name",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in FACT_FIELDS:
            self.fields[name] = _fresh(name)
        self.placed: list[Any] = []

    def clean(self) -> dict[str, Any]:
        data = super().clean() or self.cleaned_data
        field = {"upload": "files", "folder": "tree", "path": "path"}.get(data.get("where", ""))
        if field is None or field in self.errors:
            return data
        try:
            name = self._place(data) if field == "path" else self._placed(data[field], data)
        except ValidationError as error:
            self.add_error(field, error)
        else:
            self.check_name(lambda: name[:110] or "SAE")
        return data

    def _placed(self, files: list[UploadedFile], data: dict[str, Any]) -> str:
        told = data.get("paths", "").split("\n") if data["where"] == "folder" else []
        self.placed = checked(files, told)
        first = self.placed[0][0]
        return first.parts[0] if len(first.parts) > 1 else first.stem

    def _place(self, data: dict[str, Any]) -> str:
        path = server_path(data["path"].strip(), settings.IMPORT_DIRS)
        if path.is_dir() and any(islice(path.rglob("*"), MAX_FILES, None)):
            raise ValidationError(f"{path} holds more than {MAX_FILES:,} files; give the folder of the SAE itself.")
        refuse_links(path, settings.IMPORT_DIRS)
        twin = SAE.objects.filter(path=str(path)).first()
        if twin is not None:
            raise ValidationError(f"{path} is in the registry already, as {twin.name} (SAE {twin.pk}).")
        data["server_path"] = str(path)
        return path.stem if path.is_file() else path.name

    def save(self, commit: bool = True) -> SAE:
        data = self.cleaned_data
        self.instance.source = SAE.Source.FILE
        self.instance.format = ""
        self.instance.facts = _said(data) | {
            name: data[name] for name in ("server_path", "second_copy") if data.get(name)
        }
        return super().save(commit)

    def store(self, row: SAE) -> None:
        if self.placed:
            store(row.upload, self.placed)
