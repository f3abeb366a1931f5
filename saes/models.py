"""Language models and the SAEs of the registry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import models
from django.urls import reverse

from saehub.jobs.made import Made


class LanguageModel(Made):
    """A transformers causal language model this instance knows: a Hub repository, a folder, or an imported GGUF file."""

    KIND = "add_model"
    FOLDER = "models"

    class Source(models.TextChoices):
        HUB = "hub", "Hugging Face Hub"
        FOLDER = "folder", "folder of this server"
        GGUF = "gguf", "GGUF file of this server"

    name = models.CharField(max_length=120, unique=True)
    source = models.CharField(max_length=10, choices=Source.choices, default=Source.HUB)
    location = models.CharField(max_length=400, help_text="Repository id, or path on the server")
    revision = models.CharField(
        max_length=80, blank=True, help_text="Commit, branch or tag; pinned to the commit when added"
    )

    architecture = models.CharField(max_length=80, blank=True, editable=False)
    n_layers = models.PositiveIntegerField(null=True, editable=False)
    d_model = models.PositiveIntegerField(null=True, editable=False)
    vocabulary = models.PositiveIntegerField(null=True, editable=False)
    context_length = models.PositiveIntegerField(null=True, editable=False)
    n_parameters = models.BigIntegerField(null=True, editable=False)
    size_bytes = models.BigIntegerField(null=True, editable=False)
    has_bos = models.BooleanField(default=True, editable=False)
    has_chat = models.BooleanField(default=False, editable=False)
    hook_points = models.JSONField(default=list, editable=False, help_text="[{name, module, d, layer}]")

    class Meta:
        ordering = ("name",)

    def get_absolute_url(self) -> str:
        return reverse("saes:model_detail", args=[self.pk])

    @property
    def load_from(self) -> str:
        """What `load_lm` is given: the imported folder, the folder, or the repository id."""
        return str(self.folder) if self.source == self.Source.GGUF else self.location

    def hook(self, name: str) -> dict[str, Any] | None:
        """Row of a hook point by its TransformerLens name, or by its module path, which means the module's output."""
        rows = [row for row in self.hook_points if name in (row["name"], row["module"])]
        return min(rows, key=lambda row: (row["name"] != name, row.get("side") == "in"), default=None)


class SAE(Made):
    """One sparse autoencoder, trained here or brought from elsewhere; its files are in the SAELens form."""

    class Source(models.TextChoices):
        TRAINED = "trained", "trained here"
        HUB = "hub", "Hub"
        FILE = "file", "imported file"

    source = models.CharField(max_length=10, choices=Source.choices)
    model = models.ForeignKey(LanguageModel, null=True, blank=True, on_delete=models.PROTECT, related_name="saes")
    model_name = models.CharField(max_length=120)
    hook_name = models.CharField(max_length=200)
    layer = models.PositiveIntegerField(null=True, blank=True)
    architecture = models.CharField(max_length=40)
    d_in = models.PositiveIntegerField()
    d_sae = models.PositiveIntegerField()
    k = models.PositiveIntegerField(null=True, blank=True)
    format = models.CharField(max_length=40, default="saelens")
    path = models.CharField(max_length=400, help_text="Folder of its files, under the data folder")
    size_bytes = models.BigIntegerField(default=0)
    sha256 = models.CharField(max_length=64, blank=True)
    config = models.JSONField(default=dict)
    notes = models.TextField(blank=True)

    # Measured here, by the newest evaluation: null is "not measured", never 0 or 1.
    metrics = models.JSONField(default=dict, help_text="{name: {value, definition, n, data}}")
    l0 = models.FloatField(null=True, editable=False)
    explained_variance = models.FloatField(null=True, editable=False)

    class Meta:
        ordering = ("-pk",)
        verbose_name = "SAE"
        constraints = [models.UniqueConstraint(fields=["path"], name="one_sae_per_folder")]

    def get_absolute_url(self) -> str:
        return reverse("saes:sae_detail", args=[self.pk])

    @property
    def files(self) -> Path:
        return Path(settings.DATA_DIR) / self.path

    def own_files(self) -> list[Path]:
        """Its folder, where that lies in the one that holds nothing but SAEs."""
        files = self.files.resolve()
        return [files] if (Path(settings.DATA_DIR) / "sae").resolve() in files.parents else []
