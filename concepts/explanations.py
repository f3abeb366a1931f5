"""Features named by a language model: what was asked for, what came out, and how names become labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from django.core.validators import MaxValueValidator, MinValueValidator
from django.db import models
from django.urls import reverse

from concepts.interchange import LONGEST_BY
from concepts.labels import METHOD_OF_MODELS, Label, LabelChange
from concepts.numerics.explain_prompts import name_turns, plain, tell_turns
from saehub.jobs.made import Made
from saes.models import SAE, LanguageModel

MOST_FEATURES = 1000
CHARACTERS_A_TOKEN = 4
WINDOW_CHARACTERS = 100  # of the 25 tokens that are shown of a context


class Explanation(Made):
    """Features of a view that a language model is to name, and what it said of each.

    `found` grows while the job runs, so that one that was killed goes on and one that was cancelled keeps what it has.
    """

    KIND = "explain"

    view = models.ForeignKey("concepts.FeatureView", on_delete=models.CASCADE, related_name="explanations")
    model = models.ForeignKey(LanguageModel, on_delete=models.PROTECT, related_name="explanations")
    features = models.JSONField(help_text="Their numbers")
    n_shown = models.PositiveSmallIntegerField(default=10, validators=[MinValueValidator(1), MaxValueValidator(50)])
    n_tested = models.PositiveSmallIntegerField(default=10, validators=[MaxValueValidator(100)])
    accept_from = models.FloatField(
        null=True, blank=True, default=0.8, validators=[MinValueValidator(0.5), MaxValueValidator(1)]
    )
    found = models.JSONField(
        default=list, editable=False, help_text="[{feature, text, score, n_active, n_silent, fault, accepted}]"
    )
    seconds = models.FloatField(null=True, editable=False)

    class Meta:
        ordering = ("-pk",)

    def get_absolute_url(self) -> str:
        return reverse("concepts:explanation_detail", args=[self.pk])

    @property
    def named(self) -> int:
        return sum(bool(one["text"]) for one in self.found)

    @property
    def accepted(self) -> int:
        return sum(one["accepted"] for one in self.found)

    @property
    def scores(self) -> list[float]:
        return sorted(one["score"] for one in self.found if one["score"] is not None)

    @property
    def median(self) -> float | None:
        """Of the scores."""
        scores = self.scores
        half = len(scores) // 2
        return None if not scores else (scores[half] + scores[~half]) / 2

    @property
    def tokens_a_feature(self) -> int:
        """About how many tokens the language model reads for each: the question, and the tests after what they share."""
        return tokens_a_feature(self.n_shown, self.n_tested)

    def keep(self, said: dict[str, Any]) -> None:
        """Write down what was said of a feature, and give it the name as a label.

        The label is accepted where the feature has no accepted one and the score reaches `accept_from`; what people
        accepted is never put aside.
        """
        text, score = said["text"], said["score"]
        accepted = False
        if text:
            sae, by = self.view.sae, self.model.name[:LONGEST_BY]
            with LabelChange.kept(sae, said["feature"], self.owner, f"Named by {by}: {text}"):
                label, _ = Label.objects.update_or_create(
                    sae=sae, feature=said["feature"], text=text, by=by, method=METHOD_OF_MODELS,
                    defaults={"source": Label.Source.MODEL, "owner": self.owner, "score": score},
                )  # fmt: skip
                free = not Label.objects.filter(sae=sae, feature=said["feature"], accepted=True).exists()
                if free and score is not None and self.accept_from is not None and score >= self.accept_from:
                    label.stand()
                    accepted = True
        self.found.append(said | {"accepted": accepted})
        self.save(update_fields=["found", "seconds"])


def tokens_a_feature(n_shown: int, n_tested: int) -> int:
    text = "x" * WINDOW_CHARACTERS
    asked = len(plain(name_turns([text] * n_shown), ""))
    told = tell_turns(text, text)
    tested = len(plain(told, "")) + 2 * n_tested * WINDOW_CHARACTERS if n_tested else 0
    return (asked + tested) // CHARACTERS_A_TOKEN


def expected_seconds(
    model: LanguageModel, n_features: int, n_shown: int, n_tested: int
) -> tuple[float, Explanation] | None:
    """How long it may take, by the newest finished work of the same model, scaled by tokens; with that work."""
    like = Explanation.objects.filter(model=model, ready_at__isnull=False, seconds__gt=0).first()
    if like is None or not like.found or like.seconds is None:
        return None
    each = like.seconds / len(like.found) / like.tokens_a_feature
    return each * tokens_a_feature(n_shown, n_tested) * n_features, like


def unnamed(sae: SAE, features: Sequence[int]) -> list[int]:
    """Those without an accepted label."""
    named = set(Label.objects.accepted_of(sae, features))
    return [feature for feature in features if feature not in named]


def as_ranges(features: Iterable[int]) -> str:
    """ "3, 7-9": the numbers as a person writes them, ascending."""
    runs: list[list[int]] = []
    for feature in sorted(set(features)):
        if runs and feature == runs[-1][1] + 1:
            runs[-1][1] = feature
        else:
            runs.append([feature, feature])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def from_ranges(text: str, n_features: int, most: int = MOST_FEATURES) -> list[int]:
    """The numbers of `as_ranges`, ascending. Raises ValueError with one sentence."""
    found: set[int] = set()
    for part in text.replace(";", ",").split(","):
        low, dash, high = (piece.strip() for piece in part.strip().partition("-"))
        ends = [low, high] if dash else [low]
        if not low and not dash:
            continue
        if not all(end.isdecimal() and len(end) <= 9 for end in ends):
            raise ValueError(f"“{part.strip()[:40]}” is no feature number or range; write numbers such as 3, 7-9.")
        first, last = int(ends[0]), int(ends[-1])
        if first > last:
            raise ValueError(f"The range {part.strip()[:40]} ends before it begins.")
        if last >= n_features:
            raise ValueError(f"There is no feature {last}; this SAE has features 0 to {n_features - 1:,}.")
        if len(found) + last - first + 1 > most + len(found & set(range(first, min(last, first + most) + 1))):
            raise ValueError(f"These are more than {most:,} features; choose fewer, and explain the rest afterwards.")
        found |= set(range(first, last + 1))
    if not found:
        raise ValueError("Write at least one feature number.")
    return sorted(found)
