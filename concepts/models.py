"""What features mean: harvested views of an SAE's features, their labels, concepts over them, and configs of edits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Self

from django.db import models, transaction
from django.urls import reverse

from concepts import compile as compiler
from concepts import featurefile
from concepts.dictionaries import Concept as Concept  # models of the app too, in files of their own
from concepts.dictionaries import ConceptDictionary as ConceptDictionary
from concepts.dictionaries import ConceptFeature as ConceptFeature
from concepts.dictionaries import ConceptState as ConceptState
from concepts.dictionaries import DictionaryRevision as DictionaryRevision
from concepts.explanations import Explanation as Explanation
from concepts.interchange import Facts
from concepts.labels import Label as Label
from concepts.labels import LabelChange as LabelChange
from concepts.labels import owner_field
from saehub.jobs.made import Made, MadeQuerySet
from saes.models import SAE
from training.models import Capture


def captures_of(sae: SAE) -> list[Capture]:
    """Finished captures of the SAE's model that hold its hook point, newest first."""
    captures = Capture.objects.ready().filter(model=sae.model).select_related("model", "corpus")
    return [capture for capture in captures if FeatureView(sae=sae, capture=capture).hook]


@lru_cache(maxsize=8)
def _opened(folder: Path, written: int) -> featurefile.FeatureView:
    """A view stays open between pages: its columns are memory maps, and its summary a few bytes a feature.

    Raises ViewError for a column that is damaged or lost, here and not in the middle of a page.
    """
    columns = featurefile.open_view(folder)
    for file in folder.glob("*.npy"):
        columns.column(file.stem)
    columns.feature(0)  # needs every one that a page needs
    return columns


class FeatureViewQuerySet(MadeQuerySet):
    def largest_first(self, *before: str) -> Self:
        """By the tokens they rest on, the newest of equal ones first, what was never harvested last; `before` that by
        other fields."""
        return self.order_by(*before, models.F("n_tokens").desc(nulls_last=True), "-pk")


class FeatureView(Made):
    """Top texts and statistics of every feature of an SAE on one capture; one row points at their files."""

    KIND = "harvest"
    FOLDER = "views"

    sae = models.ForeignKey(SAE, on_delete=models.CASCADE, related_name="views")
    capture = models.ForeignKey(Capture, on_delete=models.PROTECT, related_name="views")
    k = models.PositiveIntegerField(default=20, help_text="Top contexts kept per feature")
    n_tokens = models.BigIntegerField(null=True, editable=False)
    alive = models.PositiveIntegerField(null=True, editable=False)
    dead = models.PositiveIntegerField(null=True, editable=False)
    seconds = models.FloatField(null=True, editable=False)

    objects: ClassVar[Any] = FeatureViewQuerySet.as_manager()

    class Meta:
        ordering = ("-pk",)

    def get_absolute_url(self) -> str:
        return reverse("concepts:feature_list", args=[self.sae_id])

    def start(self, user: Any, *, title: str = "") -> Any:
        from saehub.jobs.models import enqueue

        self.job = enqueue("harvest", user, title=title or f"Harvest {self.sae.name}", sae=self.sae_id, view=self.pk)
        self.save(update_fields=["job"])
        return self.job

    @property
    def layer_norm(self) -> float | None:
        """Mean L2 norm of the activations at the hook point, over the tokens captured."""
        return (self.capture.manifest or {}).get("norms", {}).get(self.hook)

    @property
    def hook(self) -> str | None:
        """The name under which the capture holds the SAE's hook point (TransformerLens name or module path)."""
        row = self.sae.model.hook(self.sae.hook_name) if self.sae.model else None
        names = {self.sae.hook_name} | ({row["name"], row["module"]} if row else set())
        return next((name for name in self.capture.hook_names if name in names), None)

    def opened(self) -> featurefile.FeatureView:
        """Its columns. Raises featurefile.ViewError when they are missing, unfinished or damaged."""
        try:
            written = (self.folder / featurefile.FACTS).stat().st_mtime_ns
        except FileNotFoundError:
            return featurefile.open_view(self.folder)  # says what is missing
        lens = self.folder / featurefile.LENS_FACTS  # comes after the view, when that is a first look
        return _opened(self.folder, written + (lens.stat().st_mtime_ns if lens.exists() else 0))

    def own_files(self) -> list[Path]:
        """With what a killed harvest left."""
        return [*super().own_files(), *self.folder.parent.glob(f"{self.pk}.new*")]


NAME_TOKENS = 3


def name_of(columns: featurefile.FeatureView, feature: int, n: int = NAME_TOKENS) -> list[str]:
    """The feature's first top tokens, which stand for a name until it has a label."""
    ids = columns.summary["top_token_ids"][feature, :n]
    return columns.token_texts(ids[ids >= 0])


USUAL_SHARE = 0.5


@dataclass(frozen=True)
class Known:
    """What makes a steering value readable: the feature's maximum, and the length of its direction in layer norms."""

    feature: int
    name: list[str]
    maximum: float  # 0 when it never fired
    per_norm: float | None  # decoder norm / mean norm of the layer: share of the layer's norm that one unit adds

    @property
    def usual(self) -> float:
        """A strength to begin steering with."""
        return usual_strength(self.maximum, self.per_norm)


def usual_strength(maximum: float, per_norm: float | None) -> float:
    """Half of the layer's mean norm: much less changes little, much more breaks the text. Where the norm is not known, the
    feature's maximum."""
    return USUAL_SHARE / per_norm if per_norm else maximum


def largest_view(sae: SAE) -> tuple[FeatureView, featurefile.FeatureView] | None:
    """The SAE's view over the most tokens with its columns; None without one that can be read.

    Names, densities and maxima come from it wherever nobody has chosen a view, so that a small harvest made for a test
    does not take the place of a large one.
    """
    views = FeatureView.objects.ready().filter(sae=sae).largest_first().select_related("capture__model", "sae__model")
    view = views.first()
    try:
        return None if view is None else (view, view.opened())
    except featurefile.ViewError:
        return None


def known_features(sae: SAE, features: Iterable[int]) -> dict[int, Known]:
    """`Known` of each feature by the SAE's largest view; empty without a view that can be read."""
    found = largest_view(sae)
    try:
        return {i: _known(*found, i) for i in features if 0 <= i < found[1].n_features} if found else {}
    except featurefile.ViewError:
        return {}


def _known(view: FeatureView, columns: featurefile.FeatureView, i: int) -> Known:
    norm = float(columns.column("decoder_norm")[i]) if columns.logit_lens and view.layer_norm else None
    maximum = float(columns.summary["max"][i])
    return Known(i, name_of(columns, i), maximum, norm / view.layer_norm if norm and view.layer_norm else None)


# ------------------------------------------------------------------------------------------------------------- configs


class ConceptConfig(models.Model):
    """One version of a set of edits over features and concepts. A version never changes: a change is the next version.

    Concepts are stored with the members they had, so that a version means the same for ever.
    """

    sae = models.ForeignKey(SAE, on_delete=models.CASCADE, related_name="configs")
    name = models.CharField(max_length=120)
    number = models.PositiveIntegerField()
    owner = owner_field()
    note = models.CharField(max_length=300, blank=True)
    edits = models.JSONField(help_text="[{feature | concept, dictionary, members; mode, value}]")
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ("-pk",)
        constraints = [models.UniqueConstraint(fields=["sae", "name", "number"], name="one_config_of_a_version")]

    def __str__(self) -> str:
        return f"{self.name} v{self.number}"

    def get_absolute_url(self) -> str:
        return reverse("concepts:config_detail", args=[self.pk])

    def save(self, *args: Any, **kwargs: Any) -> None:
        if self.pk is not None:
            raise ValueError("A version of a concept config does not change; save the next version.")
        super().save(*args, **kwargs)

    @classmethod
    @transaction.atomic
    def next_version(cls, sae: SAE, name: str, edits: list[dict[str, Any]], user: Any, note: str = "") -> ConceptConfig:
        """Save these edits as the newest version under this name. Raises compiler.ConfigError when they do not compile."""
        compiler.compile(edits)
        SAE.objects.select_for_update(no_key=True).get(pk=sae.pk)
        last = cls.objects.filter(sae=sae, name=name).aggregate(n=models.Max("number"))["n"] or 0
        return cls.objects.create(sae=sae, name=name, number=last + 1, edits=edits, owner=user, note=note)

    def compiled(self) -> list[dict[str, Any]]:
        """The edits as steering takes them: [{feature, mode, value}]."""
        return compiler.compile(self.edits)


# ------------------------------------------------------------------------------------------------------------- imports


class ConceptImport(Made):
    """A file somebody sent, looked at first (not ready) and then applied (ready): to a dictionary, or to the labels of an SAE."""

    KIND = "import_concepts"
    LOOK = "look_concepts"
    FOLDER = "concept-imports"

    sae = models.ForeignKey(SAE, on_delete=models.CASCADE, related_name="concept_imports")
    dictionary = models.ForeignKey(
        ConceptDictionary, null=True, blank=True, on_delete=models.CASCADE, related_name="imports"
    )
    accept = models.BooleanField(default=True, help_text="Accept imported labels of features that have none accepted")
    size_bytes = models.BigIntegerField(default=0, editable=False)
    sha256 = models.CharField(max_length=64, blank=True, editable=False)
    form = models.CharField(max_length=20, blank=True, editable=False)
    counts = models.JSONField(default=dict, editable=False, help_text="{added, changed, unchanged, refused}")
    look = models.JSONField(
        null=True, editable=False, help_text="What a job found a long file would do; null: no job did"
    )
    replaced = models.JSONField(default=list, editable=False, help_text="[[label, {score, confidence, notes} it had]]")

    class Meta:
        ordering = ("-pk",)

    def get_absolute_url(self) -> str:
        return reverse("concepts:import_detail", args=[self.pk])

    def look_at(self, user: Any) -> None:
        """Queue the job that looks through a long file."""
        from saehub.jobs.models import enqueue

        self.job = enqueue(self.LOOK, user, title=f"Look at {self.name}", imported=self.pk)
        self.save(update_fields=["job"])

    @property
    def by_job(self) -> bool:
        """Whether looking at it is, or was, a job's work."""
        return self.look is not None or (self.job is not None and self.job.kind == self.LOOK)

    @property
    def looking(self) -> bool:
        return self.busy and self.job is not None and self.job.kind == self.LOOK

    @property
    def file(self) -> Path:
        return self.folder / "sent"

    @property
    def facts(self) -> Facts:
        return facts_of(self.sae)


def facts_of(sae: SAE) -> Facts:
    """What files about this SAE's features are checked against."""
    return Facts(sae.n_features, sae.neuronpedia_id)
