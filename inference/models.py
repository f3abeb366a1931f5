"""What was asked of a model with SAEs: generations with edits, texts read by SAEs, batches of texts read by SAEs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from django.db import models
from django.urls import reverse

from saehub.jobs.made import Made
from saes.models import SAE, LanguageModel
from training.models import Corpus


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


class Inference(Made):
    """One text read by one or more SAEs of its model: which features fire on which token. The codes are files."""

    KIND = "infer"
    FOLDER = "inferences"

    model = models.ForeignKey(LanguageModel, on_delete=models.PROTECT, related_name="inferences")
    saes = models.ManyToManyField(SAE, related_name="inferences")
    prompt = models.TextField()
    chat = models.BooleanField(default=False)
    prepend_bos = models.BooleanField(default=True)
    probabilities = models.BooleanField(default=True)

    n_tokens = models.PositiveIntegerField(null=True, editable=False)
    facts = models.JSONField(
        default=list,
        editable=False,
        help_text="[{sae, name, sha256, hook_name, d_sae, fires, l0}], in the files' order",
    )
    policy = models.JSONField(default=dict, editable=False)
    versions = models.JSONField(default=dict, editable=False)
    seconds = models.FloatField(null=True, editable=False)

    class Meta:
        ordering = ("-pk",)

    def get_absolute_url(self) -> str:
        return reverse("inference:inference_detail", args=[self.pk])


class PromptBatch(Made):
    """The texts of a corpus, each read on its own by one or more SAEs, as one Parquet table of what fires."""

    KIND = "infer_prompts"
    FOLDER = "batches"
    FILE = "features.parquet"

    model = models.ForeignKey(LanguageModel, on_delete=models.PROTECT, related_name="batches")
    saes = models.ManyToManyField(SAE, related_name="batches")
    corpus = models.ForeignKey(Corpus, on_delete=models.PROTECT, related_name="batches")
    prepend_bos = models.BooleanField(default=True)
    top = models.PositiveIntegerField(default=20, help_text="Strongest features kept of every token; 0 keeps all")
    max_prompts = models.PositiveIntegerField(null=True, blank=True)

    n_prompts = models.PositiveIntegerField(null=True, editable=False)
    n_cut = models.PositiveIntegerField(null=True, editable=False, help_text="Prompts longer than the model reads")
    n_tokens = models.BigIntegerField(null=True, editable=False)
    n_rows = models.BigIntegerField(null=True, editable=False)
    size_bytes = models.BigIntegerField(null=True, editable=False)
    facts = models.JSONField(default=list, editable=False)
    policy = models.JSONField(default=dict, editable=False)
    versions = models.JSONField(default=dict, editable=False)
    seconds = models.FloatField(null=True, editable=False)

    class Meta:
        ordering = ("-pk",)
        verbose_name_plural = "prompt batches"

    @property
    def file(self) -> Path:
        return self.folder / self.FILE

    def get_absolute_url(self) -> str:
        return reverse("inference:promptbatch_detail", args=[self.pk])
