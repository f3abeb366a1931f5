"""Generations: a prompt, the edits asked for, and what came out with and without them."""

from __future__ import annotations

from typing import Any

from django.db import models
from django.urls import reverse

from saehub.jobs.made import Made
from saes.models import SAE, LanguageModel


class Generation(Made):
    """One prompt generated twice, plain and steered, with everything that decides the result."""

    KIND = "generate"

    class Scope(models.TextChoices):
        ALL = "all", "all tokens"
        GENERATED = "generated", "generated tokens only"

    class Mode(models.TextChoices):
        """What an edit makes of a code z; named by its formula (those of inference.numerics.steer.MODES)."""

        ADD = "add", "add: z' = z + v"
        SCALE = "scale", "scale: z' = z * v"
        CLAMP = "clamp", "clamp: z' = v"
        ABLATE = "ablate", "ablate: z' = 0"

    model = models.ForeignKey(LanguageModel, on_delete=models.PROTECT, related_name="generations")
    sae = models.ForeignKey(SAE, null=True, blank=True, on_delete=models.CASCADE, related_name="generations")
    prompt = models.TextField()
    chat = models.BooleanField(default=False)
    edits = models.JSONField(default=list, help_text="[{feature, mode, value}]")
    scope = models.CharField(max_length=12, choices=Scope.choices, default=Scope.ALL)
    max_new_tokens = models.PositiveIntegerField(default=48)
    temperature = models.FloatField(default=0.0)
    seed = models.BigIntegerField(default=0)

    baseline = models.JSONField(default=dict, editable=False, help_text="{text, ids, pieces, logprobs, seconds}")
    steered = models.JSONField(default=dict, editable=False)
    policy = models.JSONField(default=dict, editable=False)
    versions = models.JSONField(default=dict, editable=False)
    seconds = models.FloatField(null=True, editable=False)

    class Meta:
        ordering = ("-pk",)

    def get_absolute_url(self) -> str:
        return reverse("inference:generation_detail", args=[self.pk])

    def edit_rows(self) -> list[dict[str, Any]]:
        """The edits, each with its mode's words."""
        words = dict(self.Mode.choices)
        return [edit | {"formula": words[edit["mode"]].partition(": ")[2]} for edit in self.edits]
