"""What features mean: harvested views of an SAE's features, their labels, concepts over them, and configs of edits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Self

from django.db import models, transaction
from django.urls import reverse

from concepts import compile as compiler
from concepts import featurefile
from concepts.interchange import LONGEST_NAME, Facts
from concepts.labels import Label as Label  # models of the app too, in a file of their own
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
    """A view stays open between pages: its columns are memory maps, and its summary a few bytes a feature."""
    return featurefile.open_view(folder)


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


# -------------------------------------------------------------------------------------------------------- dictionaries

# What a concept holds: {"description": text, "members": [[feature, weight, sign, score or None], ...] by feature}
ConceptState = dict[str, Any]
MANY = 1000  # names from which on a dictionary is read whole


class ConceptDictionary(models.Model):
    """Concepts over the features of one SAE. Everything that changes them goes through `change`, which keeps history."""

    sae = models.ForeignKey(SAE, on_delete=models.CASCADE, related_name="dictionaries")
    name = models.CharField(max_length=120)
    owner = owner_field()
    source = models.CharField(max_length=200, blank=True, help_text="Where it comes from: a paper, an address, a file")
    notes = models.TextField(blank=True)
    created_at = models.DateTimeField(auto_now_add=True)
    changed_at = models.DateTimeField(auto_now=True)

    class Meta:
        ordering = ("-pk",)
        verbose_name_plural = "concept dictionaries"
        constraints = [models.UniqueConstraint(fields=["sae", "name"], name="one_dictionary_of_a_name")]

    def __str__(self) -> str:
        return self.name

    def get_absolute_url(self) -> str:
        return reverse("concepts:dictionary_detail", args=[self.pk])

    def delete(self, *args: Any, **kwargs: Any) -> Any:
        """With the files of imports that wait."""
        for row in self.imports.all():
            row.delete()
        return super().delete(*args, **kwargs)

    def states(self, names: Iterable[str] | None = None) -> dict[str, ConceptState]:
        """What its concepts hold, by name: all of them, or those named."""
        wanted = None if names is None else set(names)
        concepts = self.concepts.all()
        members = ConceptFeature.objects.filter(concept__dictionary=self)
        if wanted is not None and len(wanted) <= MANY:
            concepts, members = concepts.filter(name__in=wanted), members.filter(concept__name__in=wanted)
        found: dict[str, ConceptState] = {
            name: {"description": text, "members": []}
            for name, text in concepts.values_list("name", "description")
            if wanted is None or name in wanted
        }
        rows = members.order_by("feature").values_list("concept__name", "feature", "weight", "sign", "score")
        for name, *member in rows:
            if name in found:
                found[name]["members"].append(member)
        return found

    @transaction.atomic
    def change(
        self,
        wanted: Mapping[str, ConceptState | None],
        user: Any,
        reason: str,
        *,
        renamed: tuple[str, str] | None = None,
    ) -> DictionaryRevision | None:
        """Make the named concepts hold what is wanted (None: be gone), and keep what they held before.

        renamed: (old, new), a concept that keeps its row and its address under another name. Returns the revision, or None
        when everything was so already.
        """
        ConceptDictionary.objects.select_for_update(no_key=True).get(pk=self.pk)
        before = self.states(wanted)
        changes = {name: [before.get(name), after] for name, after in wanted.items() if before.get(name) != after}
        if not changes:
            return None
        if renamed is not None:
            self.concepts.filter(name=renamed[0]).update(name=renamed[1])
        self._write({name: after for name, (_, after) in changes.items()})
        self.save(update_fields=["changed_at"])
        last = self.revisions.aggregate(n=models.Max("number"))["n"] or 0
        counts = {"added": 0, "changed": 0, "removed": 0}
        for held, after in changes.values():
            counts["added" if held is None else "removed" if after is None else "changed"] += 1
        return self.revisions.create(number=last + 1, owner=user, reason=reason[:300], changes=changes, **counts)

    def add_member(self, name: str, feature: int, user: Any) -> DictionaryRevision | None:
        """The feature into the concept of this name, made where there is none; None when it is in it already."""
        with transaction.atomic():
            ConceptDictionary.objects.select_for_update(no_key=True).get(pk=self.pk)
            state = self.states([name]).get(name) or {"description": "", "members": []}
            if feature in (member[0] for member in state["members"]):
                return None
            members = sorted([*state["members"], [feature, 1.0, 1, None]], key=lambda member: member[0])
            return self.change({name: state | {"members": members}}, user, f"Feature {feature} into {name}")

    def _write(self, states: Mapping[str, ConceptState | None]) -> None:
        gone = [name for name, state in states.items() if state is None]
        kept: dict[str, ConceptState] = {name: state for name, state in states.items() if state is not None}
        self.concepts.filter(name__in=gone).delete()
        Concept.objects.bulk_create(
            [Concept(dictionary=self, name=name, description=state["description"]) for name, state in kept.items()],
            batch_size=5000, update_conflicts=True, unique_fields=["dictionary", "name"], update_fields=["description"],
        )  # fmt: skip
        concepts = self.concepts.filter(name__in=kept) if len(kept) <= MANY else self.concepts.all()
        pks = {name: pk for name, pk in concepts.values_list("name", "pk") if name in kept}
        ConceptFeature.objects.filter(concept__in=pks.values()).delete()
        ConceptFeature.objects.bulk_create(
            (
                ConceptFeature(concept_id=pks[name], feature=feature, weight=weight, sign=sign, score=score)
                for name, state in kept.items()
                for feature, weight, sign, score in state["members"]
            ),
            batch_size=5000,
        )

    @transaction.atomic
    def revert(self, number: int, user: Any) -> DictionaryRevision | None:
        """Back to what it was after revision `number` (0: empty). This is a revision too, so it can be undone."""
        ConceptDictionary.objects.select_for_update(no_key=True).get(pk=self.pk)
        wanted: dict[str, ConceptState | None] = {}
        for revision in self.revisions.filter(number__gt=number).order_by("-number"):
            wanted |= {name: before for name, (before, _) in revision.changes.items()}
        return self.change(wanted, user, f"Back to revision {number}")


class Concept(models.Model):
    """An idea that several features carry together."""

    dictionary = models.ForeignKey(ConceptDictionary, on_delete=models.CASCADE, related_name="concepts")
    name = models.CharField(max_length=LONGEST_NAME)
    description = models.TextField(blank=True)

    class Meta:
        ordering = ("name",)
        constraints = [models.UniqueConstraint(fields=["dictionary", "name"], name="one_concept_of_a_name")]

    def __str__(self) -> str:
        return self.name

    def get_absolute_url(self) -> str:
        return reverse("concepts:concept_detail", args=[self.pk])

    def edit(self, mode: str, value: float) -> dict[str, Any]:
        """An edit of this concept as configs hold it: with its members as they are now."""
        members = [{"feature": m.feature, "weight": m.weight, "sign": m.sign} for m in self.members.all()]
        return {
            "concept": self.name, "dictionary": self.dictionary.name, "members": members, "mode": mode, "value": value,
        }  # fmt: skip


class ConceptFeature(models.Model):
    """A feature that belongs to a concept: how much, and in which direction."""

    concept = models.ForeignKey(Concept, on_delete=models.CASCADE, related_name="members")
    feature = models.PositiveIntegerField()
    weight = models.FloatField(default=1.0)
    sign = models.SmallIntegerField(default=1, choices=[(1, "+"), (-1, "−")])
    score = models.FloatField(null=True, blank=True, help_text="How well the name fits; null: not known")

    class Meta:
        ordering = ("feature",)
        constraints = [
            models.UniqueConstraint(fields=["concept", "feature"], name="one_feature_of_a_concept"),
            models.CheckConstraint(condition=models.Q(weight__gte=0), name="weight_of_a_member_from_0"),
            models.CheckConstraint(condition=models.Q(sign__in=(1, -1)), name="sign_of_a_member_1_or_minus_1"),
        ]

    def __str__(self) -> str:
        return f"{self.feature}"


class DictionaryRevision(models.Model):
    """One change of a dictionary: for every concept it touched, what it held before and after (null: there was none)."""

    dictionary = models.ForeignKey(ConceptDictionary, on_delete=models.CASCADE, related_name="revisions")
    number = models.PositiveIntegerField()
    owner = owner_field()
    reason = models.CharField(max_length=300)
    changes = models.JSONField(help_text="{name: [before, after]}")
    added = models.PositiveIntegerField(default=0)
    changed = models.PositiveIntegerField(default=0)
    removed = models.PositiveIntegerField(default=0)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ("-number",)
        constraints = [models.UniqueConstraint(fields=["dictionary", "number"], name="one_revision_of_a_number")]

    def __str__(self) -> str:
        return f"revision {self.number} of {self.dictionary_id}"


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
