"""Concept dictionaries: what features mean together, and every change of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from django.db import models, transaction
from django.urls import reverse

from concepts.interchange import LONGEST_NAME
from concepts.labels import owner_field
from saes.models import SAE

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
