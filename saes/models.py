"""Language models and the SAEs of the registry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from django.conf import settings
from django.contrib.postgres.indexes import GinIndex
from django.contrib.postgres.search import SearchVectorField
from django.db import models
from django.db.models import F, TextField
from django.db.models.functions import Coalesce
from django.urls import reverse

from saehub.jobs.made import Made
from saehub.jobs.models import Job
from saes.facets import FacetsText, WordsVector


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


class Release(models.Model):
    """A set of SAEs that somebody published together, as the public directory names it."""

    name = models.CharField(max_length=200, unique=True)
    repo_id = models.CharField(max_length=200)
    model_name = models.CharField(max_length=120, blank=True)
    format = models.CharField(max_length=40, help_text="Name in the table of formats")
    links = models.JSONField(default=dict, help_text="{dashboards, model, publication}")
    facts = models.JSONField(default=dict, help_text="What its files cannot tell, for all of its SAEs")
    directory = models.CharField(max_length=80, blank=True, help_text="Where this entry was read, with its version")
    synced_at = models.DateTimeField(null=True, editable=False)

    class Meta:
        ordering = ("name",)

    def __str__(self) -> str:
        return self.name


class HubRepository(models.Model):
    """What the Hub says of a repository as a whole; of repositories that were looked at."""

    repo_id = models.CharField(max_length=200, unique=True)
    licence = models.CharField(max_length=60, blank=True, help_text="As its card names it")
    gated = models.CharField(
        max_length=10, blank=True, help_text="auto or manual: who accepts its terms gets its files"
    )
    checked_at = models.DateTimeField(auto_now=True)

    class Meta:
        verbose_name_plural = "Hub repositories"

    def __str__(self) -> str:
        return self.repo_id


class SAE(Made):
    """One sparse autoencoder: trained here, brought from elsewhere, or known from the catalogue and not here yet.

    `ready_at` says whether its files are on this machine. What is null is not known.
    """

    KIND = "download"

    class Source(models.TextChoices):
        TRAINED = "trained", "trained here"
        HUB = "hub", "Hub"
        FILE = "file", "imported file"

    class Curation(models.TextChoices):
        DRAFT = "draft", "draft"
        REVIEWED = "reviewed", "reviewed"
        PUBLISHED = "published", "published"
        DEPRECATED = "deprecated", "deprecated"

    source = models.CharField(max_length=10, choices=Source.choices)
    curation = models.CharField(max_length=10, choices=Curation.choices, default=Curation.DRAFT)
    name = models.CharField(max_length=200)

    # What it reads and writes.
    model = models.ForeignKey(LanguageModel, null=True, blank=True, on_delete=models.PROTECT, related_name="saes")
    model_name = models.CharField(max_length=120, blank=True)
    hook_name = models.CharField(max_length=200, blank=True)
    hook_name_out = models.CharField(max_length=200, blank=True, help_text="Of a transcoder: what it predicts")
    site = models.CharField(
        max_length=20, blank=True, help_text="resid_pre, resid_post, mlp_out, hook_z, transcoder, …"
    )
    layer = models.PositiveIntegerField(null=True, blank=True)
    architecture = models.CharField(max_length=40, blank=True)
    d_in = models.PositiveIntegerField(null=True, blank=True)
    d_sae = models.PositiveIntegerField(null=True, blank=True)
    k = models.PositiveIntegerField(null=True, blank=True)

    # Where it was published.
    release = models.ForeignKey(Release, null=True, blank=True, on_delete=models.SET_NULL, related_name="saes")
    sae_id = models.CharField(max_length=200, blank=True, help_text="Its id in the release")
    aliases = models.JSONField(default=list, help_text="Other release/id pairs of the same files")
    repo_id = models.CharField(max_length=200, blank=True)
    repo_path = models.CharField(max_length=300, blank=True, help_text="Folder or file in the repository")
    revision = models.CharField(max_length=80, blank=True, help_text="Pinned to the commit when downloaded")
    neuronpedia_id = models.CharField(max_length=120, blank=True)
    published_l0 = models.FloatField(null=True, blank=True)
    published_variance = models.FloatField(null=True, blank=True)
    gone_at = models.DateTimeField(null=True, editable=False, help_text="When the public directory named it no more")

    # Its files here.
    format = models.CharField(max_length=40, default="saelens")
    path = models.CharField(
        max_length=400, blank=True, help_text="Its files: under the data folder, or in the Hub's cache"
    )
    facts = models.JSONField(default=dict, help_text="What its files cannot tell, as asked for on import")
    asked = models.JSONField(default=list, editable=False, help_text="Names of facts that its import waits for")
    size_bytes = models.BigIntegerField(default=0)
    sha256 = models.CharField(max_length=64, blank=True, db_index=True, help_text="Of its weights, as published")
    checksums = models.JSONField(default=dict, editable=False, help_text="Of its files here: {name: {sha256, bytes}}")
    config = models.JSONField(default=dict)
    proof = models.JSONField(default=dict, help_text="Of the conversion: source format, n rows, largest difference")
    read_at = models.DateTimeField(
        null=True, editable=False, help_text="When config and shapes were read from the files"
    )
    verified_at = models.DateTimeField(null=True, editable=False, help_text="When the checksums last agreed")
    notes = models.TextField(blank=True)
    tags = models.JSONField(default=list, blank=True, help_text="The team's own words for it, in order of the alphabet")
    licence = models.CharField(
        max_length=60, blank=True, help_text="As the Hub names it (mit, apache-2.0, …); empty: its repository's"
    )
    pin = models.CharField(
        max_length=200, blank=True, help_text="Why a curator recommends it at its place; empty: it is not pinned"
    )

    # Written by the database, for the list (saes/registry.py).
    facets = models.GeneratedField(expression=FacetsText(), output_field=TextField(), db_persist=True)
    words = models.GeneratedField(expression=WordsVector(), output_field=SearchVectorField(), db_persist=True)

    # Measured here, by the newest evaluation: null is "not measured", never 0 or 1.
    metrics = models.JSONField(default=dict, help_text="{name: {value, definition, n, data}}")
    l0 = models.FloatField(null=True, editable=False)
    explained_variance = models.FloatField(null=True, editable=False)

    class Meta:
        ordering = ("-pk",)
        verbose_name = "SAE"
        permissions = (("tag_sae", "Can tag SAEs"), ("star_sae", "Can star SAEs"))
        constraints = [
            models.UniqueConstraint(fields=["path"], condition=~models.Q(path=""), name="one_sae_per_folder"),
            models.UniqueConstraint(
                fields=["repo_id", "repo_path"], condition=~models.Q(repo_id=""), name="one_sae_per_place_on_the_hub"
            ),
        ]
        indexes = [
            models.Index(fields=["release", "sae_id"], name="sae_of_release"),
            models.Index(fields=["model_name", "site", "layer"], name="sae_of_model"),
            models.Index(fields=["facets"], include=["layer", "l0", "published_l0"], name="sae_facets"),
            models.Index(
                F("ready_at").desc(nulls_last=True), F("job").desc(nulls_last=True), "id", name="sae_here_first"
            ),
            models.Index(fields=["name", "id"], name="sae_by_name"),
            models.Index(F("d_sae").desc(nulls_last=True), "id", name="sae_by_width"),
            models.Index(F("size_bytes").desc(nulls_last=True), "id", name="sae_by_size"),
            models.Index(Coalesce("l0", "published_l0").desc(nulls_last=True), "id", name="sae_by_l0"),
            models.Index(
                Coalesce("explained_variance", "published_variance").desc(nulls_last=True), "id", name="sae_by_variance"
            ),
            # what is not known comes last both ways, so one index cannot be walked both ways
            models.Index(fields=["architecture", "id"], name="sae_by_architecture"),
            models.Index(fields=["d_sae", "id"], name="sae_by_width_up"),
            models.Index(Coalesce("l0", "published_l0").asc(), "id", name="sae_by_l0_up"),
            models.Index(Coalesce("explained_variance", "published_variance").asc(), "id", name="sae_by_variance_up"),
            models.Index(fields=["neuronpedia_id"], name="sae_by_neuronpedia"),
            GinIndex(fields=["words"], name="sae_words"),
            GinIndex(fields=["tags"], name="sae_tags"),
        ]

    def get_absolute_url(self) -> str:
        return reverse("saes:sae_detail", args=[self.pk])

    def delete(self, *args: Any, **kwargs: Any) -> Any:
        """With its files. Jobs that worked on it are kept; they have no page to open and nothing to try again."""
        from saehub.jobs.kinds import KINDS

        pk, subject = self.pk, KINDS[SAE.KIND].subject
        gone = super().delete(*args, **kwargs)
        kinds = [kind.name for kind in KINDS.values() if kind.subject == subject]
        Job.objects.filter(kind__in=kinds, subject_id=pk).update(subject_id=None)
        return gone

    def start(self, user: Any, *, title: str = "") -> Any:
        self.KIND = "adopt" if self.source == self.Source.FILE else "download"
        return super().start(user, title=title)

    @property
    def n_features(self) -> int:
        """d_sae; 0 while it is not known."""
        return self.d_sae or 0

    @property
    def files(self) -> Path:
        """Its folder or file; a path outside of the data folder is stored whole."""
        return Path(settings.DATA_DIR) / self.path

    @property
    def all_here(self) -> bool:
        """Whether it is ready and none of its files was taken away since, as clearing the Hub's cache does."""
        anchor = self.files if self.files.is_dir() else self.files.parent
        return self.ready and self.files.exists() and all((anchor / name).is_file() for name in self.checksums)

    @property
    def upload(self) -> Path:
        """Where what a person sent waits for its import."""
        return Path(settings.DATA_DIR) / "uploads" / str(self.pk)

    @property
    def exports(self) -> Path:
        """Where the archives lie that were made of it, one a format."""
        return Path(settings.DATA_DIR) / "exports" / str(self.pk)

    def own_files(self) -> list[Path]:
        """Its folder, where that lies in the one that holds nothing but SAEs, and what was sent for it."""
        home = (Path(settings.DATA_DIR) / "sae").resolve()
        files = self.files.resolve()
        kept = [folder for folder in (self.upload, self.exports) if self.pk and folder.exists()]
        if not self.path or home not in files.parents:
            return kept
        return [home.joinpath(*files.relative_to(home).parts[:2]), *kept]


class Star(models.Model):
    """An SAE that one person wants at hand. Nobody else sees it, and it keeps nothing from being deleted."""

    user = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="+")
    sae = models.ForeignKey(SAE, on_delete=models.CASCADE, related_name="+")

    class Meta:
        default_permissions = ()
        constraints = [models.UniqueConstraint(fields=["user", "sae"], name="one_star_a_person")]

    def __str__(self) -> str:
        return f"{self.user} ★ {self.sae}"
