"""What people and files call a feature: labels, which one of them stands for it, and how that came to be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Self

from django.conf import settings
from django.contrib.postgres.indexes import GinIndex
from django.contrib.postgres.search import SearchVector
from django.db import models, transaction
from django.urls import reverse

from concepts.interchange import LONGEST_BY, LONGEST_METHOD, LONGEST_NAME
from concepts.numerics.explain_prompts import DEFINITIONS
from saes.filters import search_query
from saes.models import SAE

KEPT = ("text", "by", "method", "source", "confidence", "score", "notes", "accepted", "owner_id", "imported_id")
METHOD_OF_MODELS = "top_contexts_1"  # a language model here was shown the contexts on which the feature fires most
LabelState = dict[str, Any]  # a label as history keeps it: what KEPT names


def owner_field() -> Any:
    return models.ForeignKey(
        settings.AUTH_USER_MODEL, null=True, blank=True, on_delete=models.SET_NULL, related_name="+"
    )


class LabelQuerySet(models.QuerySet):
    def accepted_of(self, sae: SAE, features: Iterable[int]) -> dict[int, str]:
        """Text of the accepted label of each of these features that has one."""
        wanted = [int(i) for i in features]
        found = self.filter(sae=sae, accepted=True, feature__in=wanted) if wanted else self.none()
        return dict(found.values_list("feature", "text"))

    def with_words(self, text: str) -> Self:
        """Labels with every word of the text as the beginning of one of theirs; without such, those that hold the text."""
        query = search_query(text)
        found = self.annotate(words=SearchVector("text", config="simple")).filter(words=query) if query else self.none()
        return found if query and found.exists() else self.filter(text__icontains=text)

    def name_feature(
        self, sae: SAE, feature: int, text: str, user: Any, *, confidence: float | None = None, notes: str = ""
    ) -> Label:
        """What a person calls a feature: a label of theirs, accepted unless another person's is.

        What is said of confidence and notes replaces what a label of theirs of this text had; what is not said is left.
        """
        with LabelChange.kept(sae, feature, user, f"Named {text}"):  # two people may press Enter at once
            wanted = {"sae": sae, "feature": feature, "text": text, "by": "", "method": ""}
            told = {
                name: value for name, value in (("confidence", confidence), ("notes", notes)) if value not in (None, "")
            }
            label: Any = self.get_or_create(**wanted, defaults={"owner": user} | told)[0]
            if told and label.owner_id in (None, user.pk):
                self.filter(pk=label.pk).update(**told)
                label.refresh_from_db(fields=told)
            held: Any = self.filter(sae=sae, feature=feature, accepted=True).first()
            if held is None or held.source != Label.Source.PERSON or held.owner_id in (None, user.pk):
                label.stand()
        return label


class Label(models.Model):
    """What somebody calls a feature. A feature may have many labels; at most one is accepted and stands for it."""

    class Source(models.TextChoices):
        PERSON = "person", "person"
        IMPORT = "import", "import"
        MODEL = "model", "model"

    sae = models.ForeignKey(SAE, on_delete=models.CASCADE, related_name="labels")
    feature = models.PositiveIntegerField()
    text = models.CharField(max_length=LONGEST_NAME)
    owner = owner_field()
    source = models.CharField(max_length=10, choices=Source.choices, default=Source.PERSON)
    by = models.CharField(
        max_length=LONGEST_BY, blank=True, help_text="Which model or author, as the imported file says"
    )
    method = models.CharField(
        max_length=LONGEST_METHOD, blank=True, help_text="How it was found, as the imported file says"
    )
    confidence = models.FloatField(null=True, blank=True, help_text="0 to 1, as its author puts it; null: not said")
    score = models.FloatField(null=True, blank=True, help_text="Measured; null: not known")
    notes = models.TextField(blank=True, help_text="Why it is called so, and what does not fit")
    accepted = models.BooleanField(default=False)
    imported = models.ForeignKey(
        "concepts.ConceptImport",
        null=True,
        blank=True,
        on_delete=models.SET_NULL,
        related_name="labels",
        editable=False,
    )
    created_at = models.DateTimeField(auto_now_add=True)

    objects: Any = LabelQuerySet.as_manager()

    class Meta:
        ordering = ("-accepted", "-pk")
        indexes = [GinIndex(SearchVector("text", config="simple"), name="label_words")]
        constraints = [
            models.UniqueConstraint(fields=["sae", "feature", "text", "by", "method"], name="one_label_of_a_text"),
            models.UniqueConstraint(
                fields=["sae", "feature"], condition=models.Q(accepted=True), name="one_accepted_label_a_feature"
            ),
            models.CheckConstraint(
                condition=models.Q(confidence=None) | models.Q(confidence__gte=0, confidence__lte=1),
                name="confidence_of_a_label_from_0_to_1",
            ),
        ]

    def __str__(self) -> str:
        return self.text

    def get_absolute_url(self) -> str:
        return reverse("concepts:feature_detail", args=[self.sae_id, self.feature])

    @property
    def score_means(self) -> str:
        """The definition of its score, where it was measured here."""
        return f"detection_auroc_1: {DEFINITIONS['detection_auroc_1']}" if self.method == METHOD_OF_MODELS else ""

    @property
    def rival(self) -> Label | None:
        """The label of a person that stands for the feature now, and that accepting this one would put aside."""
        others = Label.objects.filter(sae=self.sae_id, feature=self.feature, accepted=True).exclude(pk=self.pk)
        return others.filter(source=self.Source.PERSON).first()

    def accept(self, user: Any) -> None:
        """Make it the one that stands for the feature; the feature's history keeps who did so."""
        with LabelChange.kept(self.sae, self.feature, user, f"Accepted {self.text}"):
            self.stand()

    def remove(self, user: Any) -> None:
        """Delete it; the feature's history can bring it back."""
        with LabelChange.kept(self.sae, self.feature, user, f"Deleted {self.text}"):
            self.delete()

    def describe(self, user: Any, *, confidence: float | None, notes: str) -> None:
        """What its author says about it."""
        with LabelChange.kept(self.sae, self.feature, user, f"Described {self.text}"):
            Label.objects.filter(pk=self.pk).update(confidence=confidence, notes=notes)
            self.confidence, self.notes = confidence, notes

    def stand(self) -> None:
        """Put the others aside. Within `LabelChange.kept`."""
        others = Label.objects.filter(sae=self.sae_id, feature=self.feature, accepted=True)
        others.exclude(pk=self.pk).update(accepted=False)
        self.accepted = True
        self.save(update_fields=["accepted"])


class LabelChange(models.Model):
    """One change that a person made to the labels of a feature: all of its labels before and after, so that it can be undone.

    Imports of files are no such changes: they are taken back as a whole.
    """

    sae = models.ForeignKey(SAE, on_delete=models.CASCADE, related_name="label_changes")
    feature = models.PositiveIntegerField()
    owner = owner_field()
    what = models.CharField(max_length=LONGEST_NAME + 40)
    before = models.JSONField()
    after = models.JSONField()
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ("-pk",)
        indexes = [models.Index(fields=["sae", "feature"], name="label_changes_of_a_feature")]

    def __str__(self) -> str:
        return self.what

    @classmethod
    @contextmanager
    def kept(cls, sae: SAE, feature: int, user: Any, what: str) -> Iterator[None]:
        """Keep what is done inside as one change, one person at a time; nothing where nothing changed."""
        with transaction.atomic():
            SAE.objects.select_for_update(no_key=True).get(pk=sae.pk)
            before = _states(sae, feature)
            yield
            after = _states(sae, feature)
            if after != before:
                cls.objects.create(
                    sae=sae, feature=feature, owner=user, what=what[:LONGEST_NAME], before=before, after=after
                )

    @property
    def rival(self) -> Label | None:
        """The label of a person that stands for the feature now, and that undoing this would put aside."""
        stood = next((key for key, state in self._undone() if state and state["accepted"]), None)
        held = Label.objects.filter(sae=self.sae_id, feature=self.feature, accepted=True, source=Label.Source.PERSON)
        return None if stood is None else next((row for row in held if (row.text, row.by, row.method) != stood), None)

    def undo(self, user: Any) -> None:
        """Make the labels that this change touched what they were before it; others stay. That is a change too."""
        with LabelChange.kept(self.sae, self.feature, user, f"Undid: {self.what}"):
            labels = Label.objects.filter(sae=self.sae, feature=self.feature)
            for (text, by, method), state in self._undone():
                there = labels.filter(text=text, by=by, method=method)
                if state is None:
                    there.delete()
                    continue
                values = _living(state)
                if values["accepted"]:
                    labels.update(accepted=False)
                if not there.update(**values):
                    Label.objects.create(sae=self.sae, feature=self.feature, **values)

    def _undone(self) -> list[tuple[tuple[str, str, str], LabelState | None]]:
        """What becomes of each label it touched; None: it goes. What is put aside comes before what stands again."""
        before, after = ({_key(state): state for state in states} for states in (self.before, self.after))
        changed = [(key, before.get(key)) for key in before | after if before.get(key) != after.get(key)]
        return sorted(changed, key=lambda pair: bool(pair[1] and pair[1]["accepted"]))


def _states(sae: SAE, feature: int) -> list[LabelState]:
    return list(Label.objects.filter(sae=sae, feature=feature).order_by("pk").values(*KEPT))


def _key(state: LabelState) -> tuple[str, str, str]:
    return state["text"], state["by"], state["method"]


def _living(state: LabelState) -> LabelState:
    """A state without the people and imports that are gone."""
    owner, imported = (Label._meta.get_field(name).related_model for name in ("owner", "imported"))
    there: list[tuple[str, Any]] = [("owner_id", owner), ("imported_id", imported)]
    return state | {name: None for name, model in there if not model.objects.filter(pk=state[name]).exists()}
