"""Giving an SAE to others: archives of its files in the formats of other tools, and a place on the Hub. Without torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from django import forms
from django.core.exceptions import ValidationError

from saehub.accounts.access import OTHERS, check
from saehub.accounts.models import HubToken
from saehub.jobs.kinds import KINDS
from saehub.jobs.models import Job, State, enqueue
from saes.models import SAE, HubRepository

AS_IS = "as_is"
FORMATS = {  # those that can be written; a test holds them against the table of formats
    "saelens": "SAELens 6",
    "sparsify": "sparsify",
    "dictionary_learning": "dictionary_learning",
    "mi_crow": "mi_crow",
    "mistudio_community": "miStudio, community layout",
    AS_IS: "as its files are here",
}
LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
BLOCK = 1 << 20


@dataclass(frozen=True)
class Archive:
    """A zip that was made of an SAE."""

    format: str
    path: Path

    @property
    def word(self) -> str:
        return FORMATS[self.format]

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    @property
    def made_at(self) -> datetime:
        return datetime.fromtimestamp(self.path.stat().st_mtime, UTC)

    @property
    def name(self) -> str:
        """What a browser calls the file."""
        return f"sae-{self.path.parent.name}-{self.format}.zip"

    def pieces(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            while block := file.read(BLOCK):
                yield block


def archives(sae: SAE) -> list[Archive]:
    """What was made of it and is still here."""
    return [found for form in FORMATS if (found := archive(sae, form))]


def archive(sae: SAE, form: str) -> Archive | None:
    path = sae.exports / f"{form}.zip"
    return Archive(form, path) if form in FORMATS and path.is_file() else None


def licence_of(sae: SAE) -> str:
    """What somebody said of it, else what its repository's card names; "" where neither is known."""
    if sae.licence or not sae.repo_id:
        return sae.licence
    return HubRepository.objects.filter(repo_id=sae.repo_id).values_list("licence", flat=True).first() or ""


def uploads_of(sae: SAE) -> list[Job]:
    """Where it was put on the Hub from here, the newest first: each job's result has the address."""
    done = Job.objects.filter(kind="upload_sae", subject_id=sae.pk, state=State.DONE)
    return list(done.select_related("owner").order_by("-pk")[:20])


def licence_field() -> forms.CharField:
    return forms.CharField(
        required=False,
        max_length=60,
        label="Licence",
        help_text="As the Hub names it: mit, apache-2.0, cc-by-4.0, gemma, …; it stands in the model card",
        widget=forms.TextInput(attrs={"autocomplete": "off", "spellcheck": "false"}),
    )


class ExportForm(forms.Form):
    """An archive in a format; the same form with a place is an upload."""

    format = forms.ChoiceField(
        choices=list(FORMATS.items()),
        initial="saelens",
        help_text="What a format cannot hold is refused, never left out; the archive is read back and compared",
    )
    licence = licence_field()

    def __init__(self, *args: Any, sae: SAE, **kwargs: Any) -> None:
        self.sae = sae
        super().__init__(*args, **kwargs)
        self.fields["licence"].initial = licence_of(sae)

    def clean_licence(self) -> str:
        said = str(self.cleaned_data["licence"]).strip().lower()
        if said and not LICENCE.fullmatch(said):
            raise ValidationError("A licence is a short name of letters, digits, dots and dashes, such as cc-by-4.0.")
        return said

    def make(self, user: Any) -> Job:
        """Queue it, or return the one that is on. Raises PermissionDenied, ValueError."""
        return self._queue("export_sae", user, format=self.cleaned_data["format"])

    def _queue(self, kind: str, user: Any, **params: Any) -> Job:
        check(user, KINDS[kind].permission)
        if not self.sae.ready:
            raise ValueError(f"{self.sae.name} has no files on this machine; download it first.")
        wanted = params | {"sae": self.sae.pk, "licence": self.cleaned_data["licence"]}
        running = Job.objects.live().filter(kind=kind, subject_id=self.sae.pk, params=wanted).first()
        return running or enqueue(kind, user, title=f"{KINDS[kind].title}: {self.sae.name}", **wanted)


class UploadForm(ExportForm):
    """A place on the Hub for it, put there with the token of who asks."""

    repo_id = forms.CharField(
        max_length=200,
        label="Repository",
        help_text="It is made when there is none of this name",
        widget=forms.TextInput(attrs={"placeholder": "your-name/your-saes", "spellcheck": "false"}),
    )
    path = forms.CharField(
        required=False,
        max_length=300,
        label="Folder in it",
        help_text="Files of the same names there are replaced, in a new commit",
        widget=forms.TextInput(attrs={"spellcheck": "false"}),
    )
    private = forms.BooleanField(required=False, initial=True, label="Private, if it is made now")
    field_order = ("repo_id", "path", "format", "licence", "private")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fields["path"].initial = self.sae.hook_name.replace("/", "-")[:300]
        self.fields["format"].help_text = ""

    def clean_repo_id(self) -> str:
        said = str(self.cleaned_data["repo_id"]).strip()
        if not REPOSITORY.fullmatch(said):
            raise ValidationError("A repository is written name/repository, such as my-lab/my-saes.")
        return said

    def clean_path(self) -> str:
        said = str(self.cleaned_data["path"]).strip().strip("/")
        parts = said.split("/") if said else []
        if any(part in ("", ".", "..") or not re.fullmatch(r"[\w.+= -]+", part) for part in parts):
            raise ValidationError("A folder is written of letters, digits, dots, dashes and slashes.")
        return said

    def make(self, user: Any) -> Job:
        """Queue it. Raises PermissionDenied for somebody else's SAE, ValueError where there is no token to do it with."""
        check(user, KINDS["upload_sae"].permission, self.sae)
        if not may_upload(user):
            raise ValueError("Uploads need a Hub token of your own: set one, with write access, in your account.")
        names = ("format", "repo_id", "path", "private")
        return self._queue("upload_sae", user, **{name: self.cleaned_data[name] for name in names})


def may_upload(user: Any) -> bool:
    """Whether there is a token that may write in somebody's name: one's own; the server's for who may act for others."""
    return HubToken.objects.filter(owner_id=user.pk).exists() or bool(user.has_perm(OTHERS))
