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
        NOT_SPECIAL = "not_special", "all but control tokens"
        FROM = "from", "from a position on"

    class Mode(models.TextChoices):
        """What an edit makes of a code z; named by its formula (those of inference.numerics.steer.MODES)."""

        ADD = "add", "add: z' = z + v"
        SCALE = "scale", "scale: z' = z * v"
        CLAMP = "clamp", "clamp: z' = v"
        ABLATE = "ablate", "ablate: z' = 0"
        CAP = "cap", "cap: z' = min(z, v)"

    model = models.ForeignKey(LanguageModel, on_delete=models.PROTECT, related_name="generations")
    sae = models.ForeignKey(SAE, null=True, blank=True, on_delete=models.CASCADE, related_name="generations")
    prompt = models.TextField()
    chat = models.BooleanField(default=False)
    edits = models.JSONField(default=list, help_text="[{feature, mode, value}], and sae for an edit of another SAE")
    scope = models.CharField(max_length=12, choices=Scope.choices, default=Scope.ALL)
    scope_from = models.PositiveIntegerField(default=0, help_text="Position at which the edits begin, for scope `from`")
    instruction = models.TextField(blank=True, help_text="What is asked for in words in the prompt-only text")
    max_new_tokens = models.PositiveIntegerField(default=48)
    temperature = models.FloatField(default=0.0)
    seed = models.BigIntegerField(default=0)

    baseline = models.JSONField(default=dict, editable=False, help_text="{text, ids, pieces, logprobs, seconds}")
    steered = models.JSONField(default=dict, editable=False)
    prompted = models.JSONField(default=dict, editable=False, help_text="The prompt-only text, without edits")
    policy = models.JSONField(default=dict, editable=False)
    versions = models.JSONField(default=dict, editable=False)
    seconds = models.FloatField(null=True, editable=False)

    class Meta:
        ordering = ("-pk",)

    def get_absolute_url(self) -> str:
        return reverse("inference:generation_detail", args=[self.pk])

    def edit_rows(self) -> list[dict[str, Any]]:
        """The edits, each with its mode's words and its SAE's id."""
        words = dict(self.Mode.choices)
        rows = [{"sae": self.sae_id, **edit} for edit in self.edits]
        return [edit | {"formula": words[edit["mode"]].partition(": ")[2]} for edit in rows]

    def edited_saes(self) -> dict[int, SAE]:
        """The SAEs of its edits that are still there, by id; the first is its own."""
        ids = [pk for pk in dict.fromkeys([self.sae_id, *(edit["sae"] for edit in self.edit_rows())]) if pk]
        found = SAE.objects.select_related("model").in_bulk(ids)
        return {pk: found[pk] for pk in ids if pk in found}

    @property
    def prompt_only(self) -> str:
        """The prompt with the instruction in front, for the text that words alone make of it."""
        return f"{self.instruction}\n\n{self.prompt}" if self.instruction else ""


class Sweep(Made):
    """A generation made again at several strengths of its edits."""

    KIND = "sweep"

    generation = models.ForeignKey(Generation, on_delete=models.CASCADE, related_name="sweeps")
    factors = models.JSONField(default=list, help_text="Multiples of the edits' strengths")
    points = models.JSONField(default=list, editable=False, help_text="As inference.numerics.sweep.Point, in order")
    versions = models.JSONField(default=dict, editable=False)
    seconds = models.FloatField(null=True, editable=False)

    class Meta:
        ordering = ("-pk",)

    def get_absolute_url(self) -> str:
        return reverse("inference:sweep_detail", args=[self.pk])


class Resident(models.Model):
    """A model or SAE that a live worker holds in memory now, as that worker last wrote it."""

    host = models.CharField(max_length=120)
    pid = models.PositiveIntegerField()
    started = models.FloatField(help_text="When the process began: process ids are used again")
    kind = models.CharField(max_length=10)
    name = models.CharField(max_length=200)
    n_bytes = models.BigIntegerField()
    budget = models.BigIntegerField()
    used_at = models.DateTimeField()

    class Meta:
        ordering = ("host", "pid", "-used_at")

    def __str__(self) -> str:
        return f"{self.name} in {self.host}:{self.pid}"


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
